"""Compile the attention of some models for a GPU that is not there; the arguments are names of CASES and compute
capabilities, such as 80 for an A100 and 90 for an H200. Prints as JSON what each kernel takes of shared memory."""

from __future__ import annotations

import sys
from collections.abc import Iterator

import torch
from compiling import SHARED, Launch, recorded, report

from ropeway.runtime.attention.backend import AttentionSpec
from ropeway.runtime.attention.rotation import Rotation
from ropeway.runtime.attention.triton import Processor, TritonBackend
from ropeway.runtime.batch import BatchInputs
from ropeway.runtime.kernels.ops import TorchOps
from ropeway.runtime.kernels.triton import attention, cache
from ropeway.runtime.layers.norm import RMSNorm

META = torch.device("meta")
CASES: dict[str, dict[str, object]] = {
    "llama": {"heads": 32, "kv_heads": 8, "head_dim": 128},
    "llama-int8": {"heads": 32, "kv_heads": 8, "head_dim": 128, "kv_cache_dtype": "int8"},
    "qwen-fp8": {"heads": 16, "kv_heads": 8, "head_dim": 128, "kv_cache_dtype": "fp8", "norms": True},
    "gemma": {"heads": 8, "kv_heads": 4, "head_dim": 256, "softcap": 50.0, "windows": (4096,)},
    "deepseek": {"heads": 128, "kv_heads": 1, "head_dim": 576, "latent": 512},
    "deepseek-fp8": {"heads": 16, "kv_heads": 1, "head_dim": 576, "latent": 512, "kv_cache_dtype": "fp8"},
    "deepseek-v3-int8": {"heads": 128, "kv_heads": 1, "head_dim": 576, "latent": 512, "kv_cache_dtype": "int8"},
    "phi-half": {"heads": 32, "kv_heads": 32, "head_dim": 80, "dtype": torch.float16},
    "half-fp8": {"heads": 56, "kv_heads": 1, "head_dim": 64, "dtype": torch.float16, "kv_cache_dtype": "fp8"},
    "tiny-float32": {"heads": 15, "kv_heads": 5, "head_dim": 64, "dtype": torch.float32},
}


def launches(case: str, capability: int) -> Iterator[Launch]:
    """What a step of single tokens and a mixed step launch."""
    further = dict(CASES[case])
    norms = further.pop("norms", False)
    given = {"layers": 1, "block_size": 16, "dtype": torch.bfloat16, "scale": 0.1, "windows": (None,), **further}
    spec = AttentionSpec(**given)  # type: ignore[arg-type]
    backend = TritonBackend(spec, META, processor=Processor(132, SHARED[capability]))
    kv = torch.empty((100, 1, *backend.block_shape()), dtype=spec.kv_dtype, device=META)
    norm = RMSNorm(torch.empty(spec.head_dim, dtype=spec.dtype, device=META), 1e-6, TorchOps())
    table = torch.empty((4096, spec.head_dim // 2), device=META)
    with recorded((attention, "attend"), (attention, "combine"), (cache, "write_kernel")) as found:
        for rows, count in ((8, 1), (2, 200)):
            tokens = rows * count
            whole = torch.empty(
                (tokens, spec.heads + spec.vectors * spec.kv_heads, spec.head_dim), dtype=spec.dtype, device=META
            )
            q, k, v = whole[:, : spec.heads], whole[:, spec.heads : spec.heads + spec.kv_heads], whole
            positions = torch.empty(tokens, dtype=torch.int64, device=META)
            twice = (norm, norm) if norms else (None, None)
            rotation = None if spec.latent else Rotation(TorchOps(), table, table, positions, *twice)
            meta = backend.prepare(step(rows, count))
            backend.forward(0, q, k, v[:, -spec.kv_heads :], kv, meta, rotation)
    yield from found


def step(rows: int, count: int) -> BatchInputs:
    def empty(*shape: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device=META)

    tokens = rows * count
    return BatchInputs(
        token_ids=empty(tokens, dtype=torch.int64),
        positions=empty(tokens, dtype=torch.int64),
        cu_q=empty(rows + 1),
        starts=empty(rows),
        lengths=empty(rows),
        block_tables=empty(rows, 80),
        write_slots=empty(tokens),
        logits_rows=empty(rows, dtype=torch.int64),
        max_count=count,
        max_length=1280,
    )


def main() -> None:
    capabilities = [int(word) for word in sys.argv[1:] if word.isdigit()]
    for case in [word for word in sys.argv[1:] if not word.isdigit()]:
        for capability in capabilities:
            report(case, capability, launches(case, capability))


if __name__ == "__main__":
    main()
