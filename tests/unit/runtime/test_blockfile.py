"""KV blocks on disk: what was written is there again, what is damaged or foreign never is."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from ropeway.config import EngineConfig, check
from ropeway.errors import ConfigError
from ropeway.runtime import blockfile
from ropeway.runtime.blockfile import PAGE, BlockFile, slots_in
from ropeway.runtime.tiers import fingerprint

SIZE = 5000
MODEL = b"m" * 32


def _open(directory: Path, model: bytes = MODEL, blocks: int = 6) -> BlockFile:
    return BlockFile(directory, model, SIZE, 2 * PAGE + blocks * (2 * PAGE + 32))


def _name(number: int) -> bytes:
    return bytes([number + 1]) * 16


def _content(number: int) -> bytes:
    return bytes([number]) * SIZE


def _read(file: BlockFile, slot: int, number: int) -> bytes | None:
    into = bytearray(SIZE)
    return bytes(into) if file.read(slot, _name(number), memoryview(into)) else None


def _filled(directory: Path, numbers: int = 4) -> bytes:
    file = _open(directory)
    for number in range(numbers):
        file.write(number, _name(number), _content(number))
        assert _read(file, number, number) == _content(number), "it can be read before it is written"
    file.close()
    return file.secret


def test_blocks_are_there_again_with_their_secret(tmp_path: Path) -> None:
    secret = _filled(tmp_path)
    file = _open(tmp_path)
    assert file.kept == [(number, _name(number)) for number in range(4)]
    assert file.secret == secret
    assert file.found.startswith("4 of 6 blocks are there")
    assert [_read(file, number, number) for number in range(4)] == [_content(number) for number in range(4)]
    assert _read(file, 1, 2) is None, "another name than asked for"
    assert _read(file, 5, 5) is None, "never written"
    file.close()


def test_only_the_owner_may_read(tmp_path: Path) -> None:
    _filled(tmp_path / "new")
    assert stat.S_IMODE((tmp_path / "new").stat().st_mode) == 0o700
    assert {stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "new").iterdir()} == {0o600}


def test_the_last_content_of_a_slot_counts_and_an_empty_name_empties_it(tmp_path: Path) -> None:
    _filled(tmp_path)
    file = _open(tmp_path)
    for number in (0, 1, 2):
        file.write(3, _name(number + 10), _content(number))
    file.write(0, b"", _content(0))
    assert _read(file, 3, 12) == _content(2)
    assert _read(file, 0, 0) is None
    file.close()
    file = _open(tmp_path)
    assert file.kept == [(1, _name(1)), (2, _name(2)), (3, _name(12))], "least recently written first"
    file.close()


def test_of_two_blocks_with_one_name_the_later_is_kept(tmp_path: Path) -> None:
    file = _open(tmp_path)
    file.write(4, _name(1), _content(1))
    file.write(2, _name(1), _content(1))
    file.close()
    file = _open(tmp_path)
    assert file.kept == [(2, _name(1))]
    file.close()


@pytest.mark.parametrize("where", ["content", "entry", "cut"])
def test_damage_is_never_served(tmp_path: Path, where: str, caplog: pytest.LogCaptureFixture) -> None:
    _filled(tmp_path)
    path = tmp_path / "blocks"
    with path.open("r+b") as raw:
        if where == "cut":
            raw.truncate(2 * PAGE + 2 * PAGE + 100)  # in the middle of slot 1
        else:
            raw.seek(2 * PAGE + 2 * PAGE + 77 if where == "content" else PAGE + 32 + 18)
            raw.write(b"\xff")
    file = _open(tmp_path)
    assert _read(file, 0, 0) == _content(0)
    if where == "entry":
        assert [slot for slot, _ in file.kept] == [0, 2, 3]
        assert "1 damaged entries were dropped" in file.found
    else:
        assert _read(file, 1, 1) is None
        assert "is damaged and is computed again (slot 1)" in caplog.text
    file.close()


@pytest.mark.parametrize("what", ["model", "size", "secret", "header"])
def test_what_is_foreign_is_dropped(tmp_path: Path, what: str) -> None:
    secret = _filled(tmp_path)
    if what == "secret":
        (tmp_path / "secret").unlink()
    if what == "header":
        with (tmp_path / "blocks").open("r+b") as raw:
            raw.write(b"something else")
    file = _open(tmp_path, b"x" * 32 if what == "model" else MODEL, 5 if what == "size" else 6)
    assert file.kept == []
    assert file.secret != secret
    assert "dropped" in file.found
    assert _read(file, 0, 0) is None
    file.close()


def test_two_engines_cannot_share_a_directory(tmp_path: Path) -> None:
    file = _open(tmp_path)
    with pytest.raises(ConfigError, match="in use by another engine"):
        _open(tmp_path)
    file.close()
    _open(tmp_path).close()


def test_a_disk_that_takes_no_more_ends_keeping_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    file = _open(tmp_path)
    file.write(0, _name(0), _content(0))
    file.flush()
    honest = os.pwrite

    def full(fd: int, data: bytes, offset: int) -> int:
        if len(data) == SIZE:
            raise OSError(28, "No space left on device")
        return honest(fd, data, offset)

    monkeypatch.setattr(blockfile.os, "pwrite", full)
    for number in (1, 2):
        file.write(number, _name(number), _content(number))
    file.flush()
    assert [_read(file, number, number) is None for number in range(3)] == [False, True, True]
    assert caplog.text.count("No space left on device") == 1
    file.close()


def test_too_little_room_is_said_with_the_numbers(tmp_path: Path) -> None:
    assert slots_in(PAGE, SIZE) == 0
    with pytest.raises(ConfigError, match="hold no KV block"):
        BlockFile(tmp_path, MODEL, SIZE, 3 * PAGE)
    with pytest.raises(ConfigError, match="GiB more are needed"):
        BlockFile(tmp_path, MODEL, 1 << 20, 1 << 60)
    blocked = tmp_path / "file"
    blocked.write_text("")
    with pytest.raises(ConfigError, match="Check --kv-disk-path"):
        _open(blocked / "below")


def test_the_fingerprint_tells_models_and_layouts_apart(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(bytes(3 << 20))
    first = fingerprint(tmp_path, ("bfloat16",))
    assert first == fingerprint(tmp_path, ("bfloat16",))
    changed = [fingerprint(tmp_path, ("float32",))]
    weights.write_bytes(bytes((3 << 20) - 1) + b"x")
    changed.append(fingerprint(tmp_path, ("bfloat16",)))
    (tmp_path / "config.json").write_text("{ }")
    changed.append(fingerprint(tmp_path, ("bfloat16",)))
    assert len({first, *changed}) == 4


def test_half_of_an_option_is_refused() -> None:
    with pytest.raises(ConfigError, match="kv_disk_gib is given without kv_disk_path"):
        check(EngineConfig(kv_disk_gib=1.0))
    with pytest.raises(ConfigError, match="prefix caching is off"):
        check(EngineConfig(kv_host_gib=1.0, enable_prefix_caching=False))
