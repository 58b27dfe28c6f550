"""What a safetensors checkpoint holds, read from its headers alone and trusted in nothing.

The format (https://github.com/huggingface/safetensors#format): 8 bytes of little-endian header length, a JSON object
from tensor name to dtype, shape and byte range, then the data. Every number is checked against the file before use,
so that a truncated or forged file is refused here and not by a crash while reading.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from ropeway.errors import ModelError

MAX_HEADER = 100 * 1024 * 1024
MAX_SHARDS = 4096
ITEM_SIZE = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1,
             "F8_E4M3": 1, "F8_E5M2": 1, "U16": 2, "U32": 4, "U64": 8}  # fmt: skip
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
POINTER = b"version https://git-lfs"
"""What stands for a file where Git LFS has not fetched it."""


@dataclass(frozen=True)
class TensorInfo:
    """Where one tensor lies: bytes [begin, end) of `file`, in safetensors' name of its dtype."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Path
    begin: int
    end: int

    @property
    def elements(self) -> int:
        return prod(self.shape)


def read_json(path: Path, *, limit: int) -> dict[str, Any]:
    """The JSON object in `path`. Raises ModelError if it is missing, longer than `limit` bytes, or no object."""
    try:
        size = path.stat().st_size
        if size > limit:
            raise ModelError(f"{path} has {size} bytes; such a file has at most {limit}. Download the model again.")
        data = json.loads(path.read_bytes())
    except OSError as error:
        raise ModelError(f"{path} cannot be read: {error.strerror or error}. Check the model's directory.") from None
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{path} is not valid JSON ({error}). Download the model again.") from None
    if not isinstance(data, dict):
        raise ModelError(f"{path} must hold a JSON object, not a {type(data).__name__}. Download the model again.")
    return data


def has_weights(directory: Path) -> bool:
    """Whether all files that hold the weights are there: of a hub model the settings alone may be, or a part so far."""
    try:
        return bool(shards(directory))
    except ModelError:
        return False


def shards(directory: Path) -> list[Path]:
    """The safetensors files of a checkpoint, in order. Raises ModelError if there are none or one is missing."""
    index = directory / INDEX
    if not index.is_file():
        if (directory / SINGLE).is_file():
            return [directory / SINGLE]
        others = sorted(p.name for p in directory.glob("*.bin"))
        hint = (
            f" It has {others[0]}, a pickle, which can run code when opened. Convert it to safetensors."
            if others
            else " Check that the download is complete."
        )
        raise ModelError(f"{directory} has neither {SINGLE} nor {INDEX}.{hint}")
    names = read_json(index, limit=MAX_HEADER).get("weight_map")
    if not isinstance(names, dict) or not names or not all(isinstance(n, str) for n in names.values()):
        raise ModelError(f"{index} has no weight_map from tensor to file. Download the model again.")
    files = sorted(set(names.values()))
    if len(files) > MAX_SHARDS:
        raise ModelError(f"{index} names {len(files)} files; at most {MAX_SHARDS} are read. Download it again.")
    for name in files:
        if Path(name).name != name:
            raise ModelError(
                f"{index} names the file {name!r}, which is not inside the model's directory. Do not trust this model."
            )
        if not (directory / name).is_file():
            raise ModelError(
                f"The shard {name} of {len(files)} is missing from {directory}. Download the model again; "
                "an interrupted download can be resumed."
            )
    return [directory / name for name in files]


def tensors(directory: Path) -> dict[str, TensorInfo]:
    """Every tensor of the checkpoint in `directory`, by name. Raises ModelError."""
    found: dict[str, TensorInfo] = {}
    for file in shards(directory):
        for name, info in read_header(file).items():
            if name in found:
                both = f"{found[name].file.name} and {file.name}"
                raise ModelError(f"The tensor {name!r} is in both {both}. Download the model again.")
            found[name] = info
    return found


def read_header(file: Path) -> dict[str, TensorInfo]:
    """The tensors of one safetensors file. Raises ModelError unless they fill its data exactly."""
    try:
        size = file.stat().st_size
        with file.open("rb") as stream:
            head = stream.read(8)
            if head == POINTER[:8] and size < 1024:
                raise ModelError(f"{file} is a pointer of Git LFS. Run `git lfs pull` in its directory.")
            length = int.from_bytes(head, "little")
            if len(head) < 8 or length < 2 or length > MAX_HEADER or 8 + length > size:
                raise ModelError(
                    f"{file} has {size} bytes and announces a header of {length}: it is truncated or not safetensors. "
                    "Download it again."
                )
            header = json.loads(stream.read(length))
    except OSError as error:
        raise ModelError(f"{file} cannot be read: {error.strerror or error}. Check its permissions.") from None
    except (ValueError, RecursionError):
        raise ModelError(f"{file} has a damaged header (not JSON). Download it again.") from None
    if not isinstance(header, dict):
        raise ModelError(f"{file} has a damaged header (no JSON object). Download it again.")
    header.pop("__metadata__", None)
    found = {name: _tensor(file, name, entry, 8 + length, size) for name, entry in header.items()}
    end = 8 + length
    for info in sorted(found.values(), key=lambda t: (t.begin, t.end)):
        if info.begin != end:
            raise ModelError(f"{file} has a hole or an overlap before the tensor {info.name!r}. Download it again.")
        end = info.end
    if end != size:
        raise ModelError(f"{file} has {size} bytes but its tensors end at {end}. Download it again.")
    return found


def _tensor(file: Path, name: str, entry: Any, base: int, size: int) -> TensorInfo:
    try:
        dtype, shape, (begin, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
        if not all(type(n) is int and n >= 0 for n in (*shape, begin, end)):
            raise ValueError
        item = ITEM_SIZE[dtype]
    except (KeyError, TypeError, ValueError):
        raise ModelError(f"{file} describes the tensor {name!r} wrongly. Download it again.") from None
    if base + end > size:
        raise ModelError(
            f"{file} is truncated: the tensor {name!r} ends at byte {base + end}, the file has {size}. "
            "Download it again."
        )
    if end - begin != prod(shape) * item:
        raise ModelError(
            f"{file} gives the tensor {name!r} {end - begin} bytes, but {dtype} of shape {list(shape)} "
            f"has {prod(shape) * item}. Download it again."
        )
    return TensorInfo(name, dtype, tuple(shape), file, base + begin, base + end)
