"""What the device can do at most, by the libraries that are there: memory bandwidth and matrix products.

All figures of the engine are shares of these, taken in the same process minutes apart.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from measure import Stopwatch
from torch import Tensor
from torch.nn.functional import linear

from ropeway.modelspec import ModelSpec

_COLD = 256 << 20
"""Bytes of weights to go round, so that none is still in a cache when its turn comes again."""


def products(spec: ModelSpec) -> dict[str, tuple[int, int]]:
    """(out, in) features of the matrix products of one layer, and of the head."""
    names = ("qkv", "out", "gate and up", "down")
    return dict(zip(names, spec.linears[: len(names)], strict=True)) | {"head": (spec.vocab, spec.hidden)}


@dataclass
class Ceilings:
    """Bytes/s that can be read, and read plus written; operations/s of the best product by type; seconds of each
    product by (name, rows) in bfloat16."""

    read: float = 0.0
    copy: float = 0.0
    flops: dict[str, float] = field(default_factory=dict)
    gemm: dict[tuple[str, int], float] = field(default_factory=dict)

    def learn(self, row: dict[str, Any]) -> None:
        """Take in a row of `bandwidth` or `gemm`."""
        if row.get("what") == "copy":
            self.copy = row["gb_s"] * 1e9
        elif "what" in row:
            self.read = max(self.read, row["gb_s"] * 1e9)
        elif "tflop_s" in row:
            kind = row["type"]
            self.flops[kind] = max(self.flops.get(kind, 0.0), row["tflop_s"] * 1e12)
            if kind == "bfloat16":
                self.gemm[row["product"], row["rows"]] = row["us"] / 1e6

    def linear_seconds(self, spec: ModelSpec, rows: int) -> float | None:
        """All products of a step of `rows` rows, each as fast as the library's; None if one was not measured."""
        found = {name: self.gemm.get((name, rows)) for name in products(spec)}
        if None in found.values():
            return None
        return sum(seconds * (1 if name == "head" else spec.layers) for name, seconds in found.items() if seconds)


def bandwidth(watch: Stopwatch, size: int) -> Iterator[dict[str, Any]]:
    """A copy, counted as bytes read plus bytes written, and three ways to read a buffer and write next to nothing."""
    source = torch.randn(size // 4, device=watch.device)
    yield {"what": "copy", "gb_s": 2 * size / watch.seconds(partial(torch.empty_like(source).copy_, source)) / 1e9}
    matrix = source.view(torch.bfloat16).view(-1, 1024)
    vector = torch.randn(1024, device=watch.device, dtype=torch.bfloat16)
    ways: dict[str, Callable[[], object]] = {
        "read by sum": lambda: torch.sum(source),
        "read by maximum": lambda: torch.amax(source),
        "read by matrix times vector": lambda: torch.mv(matrix, vector),
    }
    for name, run in ways.items():
        yield {"what": name, "gb_s": size / watch.seconds(run) / 1e9}


def _each(runs: Sequence[Callable[[], object]]) -> None:
    for run in runs:
        run()


def gemm(watch: Stopwatch, spec: ModelSpec, rows: tuple[int, ...]) -> Iterator[dict[str, Any]]:
    """The products of `spec` in bfloat16, and in fp8 where torch has it here, at several numbers of rows."""
    for dtype, make in (("bfloat16", _bfloat16), ("fp8", _fp8)):
        for name, (outs, ins) in products(spec).items():
            for count in rows:
                if name == "head" and count > 256:
                    continue  # no step has so many rows that want logits
                try:
                    run, size = make(count, outs, ins, watch.device)
                    more = max(0, min(63, _COLD // size - 1))
                    runs = [run, *(make(count, outs, ins, watch.device)[0] for _ in range(more))]
                    seconds = watch.seconds(partial(_each, runs), len(runs))
                except (RuntimeError, NotImplementedError, AttributeError) as error:
                    yield {"type": dtype, "product": name, "rows": count, "lacks": str(error).splitlines()[0]}
                    if dtype == "fp8":
                        return
                    continue
                moved = size + 2 * count * (outs + ins)
                yield {
                    "type": dtype, "product": name, "rows": count, "outs": outs, "ins": ins, "us": seconds * 1e6,
                    "tflop_s": 2 * count * outs * ins / seconds / 1e12, "gb_s": moved / seconds / 1e9,
                }  # fmt: skip


def _bfloat16(rows: int, outs: int, ins: int, device: torch.device) -> tuple[Callable[[], Tensor], int]:
    """A product with weights of its own, and their bytes."""
    x = torch.randn(rows, ins, device=device, dtype=torch.bfloat16)
    weight = torch.randn(outs, ins, device=device, dtype=torch.bfloat16)
    return lambda: linear(x, weight), 2 * outs * ins


def _fp8(rows: int, outs: int, ins: int, device: torch.device) -> tuple[Callable[[], Tensor], int]:
    """The same with a scale for each row of both operands. Raises RuntimeError or NotImplementedError where torch does
    not have it, AttributeError where torch does not know it."""
    if device.type != "cuda":
        raise NotImplementedError("it is measured on GPUs only")
    x = torch.randn(rows, ins, device=device).to(torch.float8_e4m3fn)
    weight = torch.randn(outs, ins, device=device).to(torch.float8_e4m3fn)
    here, there = torch.ones(rows, 1, device=device), torch.ones(1, outs, device=device)

    def run() -> Tensor:
        return torch._scaled_mm(x, weight.t(), scale_a=here, scale_b=there, out_dtype=torch.bfloat16)

    return run, outs * ins
