"""Compile the experts and latents of some models for a GPU that is not there; the arguments are names of
CASES, or "latents", and a compute capability. Prints as JSON what each kernel takes of shared memory."""

from __future__ import annotations

import sys
from collections.abc import Iterator

import torch
from compiling import Launch, recorded, report

from ropeway.modelspec.experts import ExpertSpec
from ropeway.modelspec.latent import LatentSpec
from ropeway.runtime.kernels.ops import TorchOps
from ropeway.runtime.kernels.triton import latent as kernels
from ropeway.runtime.kernels.triton import moe, route
from ropeway.runtime.layers.norm import RMSNorm

META = torch.device("meta")
_QWEN = ExpertSpec(count=128, chosen=8, inner=768, sparse=(True,))
_V3 = ExpertSpec(
    count=256, chosen=8, inner=2048, sparse=(True,), scoring="sigmoid", biased=True, scale=2.5, groups=8, kept_groups=4,
    group_best=2,
)  # fmt: skip
CASES: dict[str, tuple[ExpertSpec, int, torch.dtype, str, tuple[int, ...]]] = {
    "qwen3-30b": (_QWEN, 2048, torch.bfloat16, "plain", (1, 600, 8192)),
    "qwen3-30b-int4": (_QWEN, 2048, torch.bfloat16, "int4", (64,)),
    "qwen3-30b-int8": (_QWEN, 2048, torch.float16, "int8", (64,)),
    "deepseek-v3": (_V3, 7168, torch.bfloat16, "fp8", (8192,)),
    "mixtral": (ExpertSpec(count=8, chosen=2, inner=14336, sparse=(True,)), 4096, torch.float32, "plain", (1, 2000)),
}
"""Experts, hidden size, x's type, the weights' format, and tokens of a step."""


def stacked(count: int, rows: int, depth: int, dtype: torch.dtype, format: str) -> moe.Stacked:
    def empty(width: int, kind: torch.dtype) -> torch.Tensor:
        return torch.empty((count, rows, width), dtype=kind, device=META)

    if format == "plain":
        return moe.Stacked(empty(depth, dtype))
    if format == "int8":
        return moe.Stacked(empty(depth, torch.int8), empty(1, torch.float32))
    if format == "fp8":
        return moe.Stacked(empty(depth, torch.float8_e4m3fn), empty(-(-depth // 128), torch.float32), group=128)
    scales, zeros = empty(depth // 64, torch.float16), empty(depth // 64, torch.uint8)
    return moe.Stacked(empty(depth // 2, torch.uint8), scales, zeros, group=64)


def launches(case: str) -> Iterator[Launch]:
    spec, hidden, dtype, format, tokens = CASES[case]
    gate_up = stacked(spec.count, 2 * spec.inner, hidden, dtype, format)
    down = stacked(spec.count, hidden, spec.inner, dtype, format)
    names = ("_order_kernel", "_expert_kernel", "_int4_kernel", "_combine_kernel")
    with recorded(*((moe, name) for name in names), (route, "_route_kernel")) as found:
        for count in tokens:
            logits = torch.empty((count, spec.count), device=META)
            bias = torch.empty(spec.count, device=META) if spec.biased else None
            weights, chosen = route.choose_experts(logits, bias, spec)
            moe.mixture(torch.empty((count, hidden), dtype=dtype, device=META), weights, chosen, gate_up, down)
    yield from found


def latents() -> Iterator[Launch]:
    """Of DeepSeek-V3."""
    latent, tokens, heads = LatentSpec(rank=512, rope=64, nope=128, value=128, q_rank=1536), 64, 128
    norm = RMSNorm(torch.empty(latent.rank, dtype=torch.bfloat16, device=META), 1e-6, TorchOps())
    table = torch.empty((4096, latent.rope // 2), device=META)
    queries = torch.empty((tokens, heads, latent.nope + latent.rope), dtype=torch.bfloat16, device=META)
    kept = torch.empty((tokens, latent.q_rank + latent.width), dtype=torch.bfloat16, device=META)
    with recorded((kernels, "_fill_kernel")) as found:
        positions = torch.empty(tokens, dtype=torch.int64, device=META)
        kernels.fill(latent, queries, kept[:, latent.q_rank :], norm, (table, table), positions)
    yield from found


def main() -> None:
    *cases, capability = sys.argv[1:]
    for case in cases:
        report(case, int(capability), latents() if case == "latents" else launches(case))


if __name__ == "__main__":
    main()
