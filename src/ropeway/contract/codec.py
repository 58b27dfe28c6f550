"""Messages to bytes and back: msgpack frames with a length in front and a limit on it."""

from __future__ import annotations

import msgspec

from ropeway.contract.message import Command, Report

MAX_FRAME = 256 * 1024 * 1024
"""A frame larger than this many bytes is refused: no request that passed the API's body limit comes near it."""

_encoder = msgspec.msgpack.Encoder()
_commands = msgspec.msgpack.Decoder(Command)
_reports = msgspec.msgpack.Decoder(Report)


def encode(message: Command | Report) -> bytes:
    """A frame: 4 bytes of length, big-endian, then msgpack. Raises ValueError above MAX_FRAME."""
    body = _encoder.encode(message)
    if len(body) > MAX_FRAME:
        raise ValueError(f"a message of {len(body)} bytes exceeds the frame limit of {MAX_FRAME}")
    return len(body).to_bytes(4, "big") + body


def frame_length(head: bytes) -> int:
    """The body length announced by a 4-byte head. Raises ValueError above MAX_FRAME."""
    length = int.from_bytes(head, "big")
    if length > MAX_FRAME:
        raise ValueError(f"a frame announces {length} bytes, more than the limit of {MAX_FRAME}")
    return length


def decode_command(body: bytes) -> Command:
    command: Command = _commands.decode(body)
    return command


def decode_report(body: bytes) -> Report:
    report: Report = _reports.decode(body)
    return report
