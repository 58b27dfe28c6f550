"""The wire between a service and its engine: frames that come in pieces, and those that are too large."""

from __future__ import annotations

import socket
from contextlib import closing

import pytest

from ropeway.contract import Cancel, Explain, GenerateRequest, SamplingParams, Submit, codec
from ropeway.remote.socket_channel import SocketChannel

COMMANDS = [
    Cancel(1),
    Submit(GenerateRequest(rid=2, tokens=list(range(300)), sampling=SamplingParams(stop=("é",)))),
    Explain(3, [1, 2]),
]


@pytest.mark.parametrize("size", [1, 3, 7, 10_000])
def test_commands_arrive_whole_however_their_bytes_come(size: int) -> None:
    ours, theirs = socket.socketpair()
    stream = b"".join(map(codec.encode, COMMANDS))
    found = []
    with closing(SocketChannel(theirs)) as channel:
        with ours:
            for at in range(0, len(stream), size):
                ours.sendall(stream[at : at + size])
                new = channel.recv(wait=False)
                assert new is not None
                assert at + size >= len(stream) or len(found) + len(new) < len(COMMANDS)
                found += new
        assert channel.recv(wait=True) is None
    assert found == COMMANDS


def test_frames_beyond_the_limit_are_refused_at_both_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = codec.encode(COMMANDS[1])
    monkeypatch.setattr(codec, "MAX_FRAME", len(whole) - 4)
    assert codec.encode(COMMANDS[1]) == whole
    assert codec.frame_length(whole[:4]) == len(whole) - 4
    monkeypatch.setattr(codec, "MAX_FRAME", len(whole) - 5)
    with pytest.raises(ValueError, match=f"{len(whole) - 4} bytes exceeds the frame limit"):
        codec.encode(COMMANDS[1])
    with pytest.raises(ValueError, match=f"announces {len(whole) - 4} bytes, more than the limit"):
        codec.frame_length(whole[:4])
