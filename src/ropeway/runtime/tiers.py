"""The memory beneath the KV cache that a configuration asks for: RAM, and a directory on disk. Needs no torch."""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import blake2b
from pathlib import Path

from ropeway._version import __version__
from ropeway.config import EngineConfig
from ropeway.contract import Tier
from ropeway.runtime.blockfile import BlockFile
from ropeway.runtime.memory import GIB, Budget, gib

_SAMPLE = 1 << 20


def open_disk(config: EngineConfig, directory: Path, identity: Sequence[str], block_bytes: int) -> BlockFile | None:
    """The disk tier for blocks of `block_bytes` of the model in `directory`, or None if there is to be none.
    `identity` is what else the meaning of a block depends on. Raises ConfigError."""
    if config.kv_disk_gib is None or config.kv_disk_path is None:
        return None
    path = Path(config.kv_disk_path).expanduser()
    return BlockFile(path, fingerprint(directory, identity), block_bytes, int(config.kv_disk_gib * GIB))


def fingerprint(directory: Path, identity: Sequence[str]) -> bytes:
    """32 bytes that change with the version, `identity`, and the model in `directory`: its configuration, and of each
    file of weights name, size, first and last MiB. Training changes all weights, so those tell one model from another.
    """
    digest = blake2b(digest_size=32)
    for part in (__version__, *identity):
        digest.update(part.encode() + b"\0")
    digest.update((directory / "config.json").read_bytes())
    for file in sorted(directory.glob("*.safetensors")):
        size = file.stat().st_size
        digest.update(f"\0{file.name}\0{size}\0".encode())
        with file.open("rb") as weights:
            digest.update(weights.read(_SAMPLE))
            weights.seek(max(0, size - _SAMPLE))
            digest.update(weights.read())
    return digest.digest()


def tiers(budget: Budget, disk: BlockFile | None) -> list[Tier]:
    """The tiers as the scheduler sees them, nearest first."""
    host = [Tier("host", budget.host_blocks)] if budget.host_blocks else []
    return host if disk is None else [*host, Tier("disk", disk.slots, True, disk.kept)]


def tier_notes(config: EngineConfig, budget: Budget, disk: BlockFile | None) -> list[str]:
    """Sentences about them for the start-up banner."""
    notes = []
    if budget.host_blocks:
        notes.append(f"KV host tier: {budget.host_blocks:,} blocks in {gib((config.kv_host_gib or 0) * GIB)} of RAM.")
    if disk is not None:
        notes.append(f"KV disk tier: {config.kv_disk_path}, {disk.found}.")
    return notes
