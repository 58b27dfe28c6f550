"""How fast weights are loaded, beside how fast their files can be read at all.

    python benchmarks/load_weights.py [--gib 1] [--model DIRECTORY] [--device cpu|cuda] [--rounds 3] [-o FILE]

Without a model, random weights in the layout of a Llama are written to a temporary directory first. Everything is
measured with the files in the system's cache: by `--cold` they are dropped from it before each round (which needs no
privileges, but a file system that listens). Rates are bytes of the files by seconds; each is the best of the rounds.

    reading     the files are read once, by one thread and by as many as loading uses, each into one buffer
    buffers     they are read as for another device than the CPU, which takes everything at once and for nothing
    tensors     each tensor of the checkpoint is brought to the device as it is stored
    model       the whole model is built: fused, converted, packed for its kernels
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from safetensors.torch import save_file

from ropeway import checkpoint
from ropeway.config import EngineConfig
from ropeway.modelspec import load_spec
from ropeway.runtime.kernels.ops import select_ops
from ropeway.runtime.models.build import build
from ropeway.runtime.weights.loader import Weights
from ropeway.runtime.weights.upload import CHUNK, READERS, Uploader

GIB = 2**30
HIDDEN, INTERMEDIATE, HEADS, KV_HEADS, VOCAB = 2048, 8192, 32, 8, 32000


def make(directory: Path, gib: float) -> None:
    """A checkpoint of about `gib` GiB in bfloat16, with random weights in two files."""
    kv = HIDDEN // HEADS * KV_HEADS
    shapes = {
        "self_attn.q_proj": (HIDDEN, HIDDEN), "self_attn.k_proj": (kv, HIDDEN), "self_attn.v_proj": (kv, HIDDEN),
        "self_attn.o_proj": (HIDDEN, HIDDEN), "mlp.gate_proj": (INTERMEDIATE, HIDDEN),
        "mlp.up_proj": (INTERMEDIATE, HIDDEN), "mlp.down_proj": (HIDDEN, INTERMEDIATE),
    }  # fmt: skip
    each = 2 * sum(rows * columns for rows, columns in shapes.values())
    layers = max(1, round((gib * GIB - 4 * VOCAB * HIDDEN) / each))
    config = {
        "architectures": ["LlamaForCausalLM"], "hidden_size": HIDDEN, "intermediate_size": INTERMEDIATE,
        "num_hidden_layers": layers, "num_attention_heads": HEADS, "num_key_value_heads": KV_HEADS,
        "vocab_size": VOCAB, "max_position_embeddings": 4096, "rms_norm_eps": 1e-5, "rope_theta": 10000.0,
        "torch_dtype": "bfloat16", "tie_word_embeddings": False,
    }  # fmt: skip
    (directory / "config.json").write_text(json.dumps(config))
    norms = ("input_layernorm", "post_attention_layernorm")
    tensors = {f"model.layers.{n}.{name}.weight": torch.ones(HIDDEN) for n in range(layers) for name in norms}
    for n in range(layers):
        tensors |= {f"model.layers.{n}.{name}.weight": torch.randn(shape) * 0.02 for name, shape in shapes.items()}
    tensors |= {name: torch.randn(VOCAB, HIDDEN) * 0.02 for name in ("model.embed_tokens.weight", "lm_head.weight")}
    tensors["model.norm.weight"] = torch.ones(HIDDEN)
    files = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    halves = {name: files[place * 2 // len(tensors)] for place, name in enumerate(tensors)}
    for file in files:
        save_file({name: t.bfloat16() for name, t in tensors.items() if halves[name] == file}, directory / file)
    (directory / checkpoint.INDEX).write_text(json.dumps({"weight_map": halves}))


def read(files: list[Path], threads: int) -> None:
    """Every byte of `files` once, `CHUNK` at a time."""

    def part(file: Path, begin: int) -> None:
        if not hasattr(local, "into"):
            local.into = memoryview(bytearray(CHUNK))
        os.preadv(opened[file], [local.into], begin)

    local = threading.local()
    opened = {file: os.open(file, os.O_RDONLY) for file in files}
    places = [(file, begin) for file in files for begin in range(0, file.stat().st_size, CHUNK)]
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(lambda place: part(*place), places))
    for number in opened.values():
        os.close(number)


def drop(files: list[Path]) -> None:
    """Ask the system to forget what it has cached of `files`."""
    for file in files:
        with file.open("rb") as stream:
            os.fsync(stream.fileno())
            os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


class Nowhere:
    """The queues of a device, and marks in them, that are always done: what is left is this process's own part."""

    def put(self, *_: object) -> None:
        pass

    def mark(self, *_: object) -> Nowhere:
        return self

    def after(self, *_: object) -> None:
        pass

    def pinned(self, elements: int, dtype: torch.dtype) -> torch.Tensor:
        return torch.ones(elements, dtype=dtype)

    def passed(self) -> bool:
        return True

    def wait(self) -> None:
        pass

    def since(self, earlier: object) -> float:
        return 0.0

    def close(self) -> None:
        pass


def buffers(directory: Path) -> None:
    with Weights(directory, torch.bfloat16, uploader=Uploader(Nowhere())) as weights:
        for name, shape in weights.shapes().items():
            weights.take(name, shape)


def tensors(directory: Path, device: torch.device) -> None:
    with Weights(directory, torch.bfloat16, device=device) as weights:
        for name, shape in weights.shapes().items():
            weights.take(name, shape)
        if device.type == "cuda":
            torch.cuda.synchronize()


def model(directory: Path, device: torch.device) -> None:
    spec = load_spec(directory)
    dtype = getattr(torch, spec.dtype)
    ops, _ = select_ops(device, dtype)
    build(spec, EngineConfig(model=str(directory)), dtype, device, ops, 3, 1024)
    if device.type == "cuda":
        torch.cuda.synchronize()


def best(work: Callable[[], None], before: Callable[[], None], rounds: int) -> float:
    seconds = []
    for _ in range(rounds):
        before()
        begun = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - begun)
    return min(seconds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gib", type=float, default=1.0)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--cold", action="store_true")
    parser.add_argument("-o", "--output", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        directory = options.model or Path(temporary)
        if options.model is None:
            make(directory, options.gib)
        files = checkpoint.shards(directory)
        size = sum(file.stat().st_size for file in files)
        device = torch.device(options.device)
        read(files, 1)
        ways: dict[str, Callable[[], None]] = {
            "reading, 1 thread": lambda: read(files, 1),
            f"reading, {READERS} threads": lambda: read(files, READERS),
            "buffers": lambda: buffers(directory),
            "tensors": lambda: tensors(directory, device),
            "model": lambda: model(directory, device),
        }
        before = (lambda: drop(files)) if options.cold else (lambda: None)
        rates = {name: size / best(work, before, options.rounds) / 1e9 for name, work in ways.items()}
    # Loading for a CPU copies with one thread, to another device with several.
    ceiling = rates["reading, 1 thread"] if options.device == "cpu" else max(list(rates.values())[:2])
    print(f"{size / GIB:.2f} GiB in {len(files)} files, {options.device}, {'not cached' if options.cold else 'cached'}")
    for name, rate in rates.items():
        print(f"{name:<22} {rate:6.2f} GB/s  {rate / ceiling:5.0%}")
    if options.output is not None:
        found = {
            "bytes": size,
            "device": options.device,
            "cold": options.cold,
            "gb_per_s": rates,
            "torch": torch.__version__,
        }
        options.output.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
