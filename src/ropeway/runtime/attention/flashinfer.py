"""Paged attention by FlashInfer (Ye et al. 2025), where that package is installed."""

from __future__ import annotations

from importlib.util import find_spec

import torch
from torch import Tensor

from ropeway.runtime.attention.backend import AttentionSpec
from ropeway.runtime.attention.rotation import Rotation
from ropeway.runtime.batch import BatchInputs

HEAD_DIMS = (64, 128, 256)
_WORKSPACE = 128 * 2**20
"""Bytes for the parts of split rows: what FlashInfer's documentation recommends."""


class FlashInferBackend:
    """FlashInfer's attention over pages, planned once for each step and each window that layers have.

    Its kernel for prompts serves single tokens too: it is the one that its decoding takes where query heads share KV
    heads. `plan` copies to the host and waits for the device, so that a step cannot be captured, nor be begun while
    another runs. The layout inside a block is (2, kv_heads, block_size, head_dim), which FlashInfer calls HND.
    """

    name = "flashinfer"
    capturable = False

    def __init__(self, spec: AttentionSpec, device: torch.device) -> None:
        import flashinfer

        from ropeway.runtime.kernels.triton import cache

        self.spec, self.device = spec, device
        self._cache = cache
        vector = spec.block_size * spec.head_dim
        self._layout = cache.Layout(vector, spec.kv_heads * vector)
        # Layers run one after the other, so that all may use the same workspace.
        workspace = torch.empty(_WORKSPACE, dtype=torch.uint8, device=device)
        self._wrappers = {
            window: flashinfer.BatchPrefillWithPagedKVCacheWrapper(workspace, "HND")
            for window in dict.fromkeys(spec.windows)
        }

    @classmethod
    def supports(cls, spec: AttentionSpec, device: torch.device) -> str | None:
        if device.type != "cuda":
            return f"it runs on CUDA devices, not on {device.type}"
        for package in ("flashinfer", "triton"):  # K and V are written by our own kernel
            if find_spec(package) is None:
                return f"the package {package} is not installed"
        capability = torch.cuda.get_device_capability(device)
        if capability < (8, 0):
            return "it needs compute capability 8.0 or higher, not {}.{}".format(*capability)
        return lacking(spec)

    def block_shape(self) -> tuple[int, ...]:
        spec = self.spec
        return (2, spec.kv_heads, spec.block_size, spec.head_dim)

    def prepare(self, inputs: BatchInputs) -> BatchInputs:
        spec = self.spec
        needed = (inputs.lengths + spec.block_size - 1) // spec.block_size
        ends = torch.zeros_like(inputs.cu_q)
        ends[1:] = needed.cumsum(0)
        column = torch.arange(inputs.block_tables.shape[1], device=inputs.device)
        pages = inputs.block_tables[column < needed[:, None]]
        last = (inputs.lengths - 1) % spec.block_size + 1
        for window, wrapper in self._wrappers.items():
            wrapper.plan(
                inputs.cu_q, ends, pages, last, spec.heads, spec.kv_heads, spec.head_dim, spec.block_size,
                causal=True, sm_scale=spec.scale, window_left=-1 if window is None else window - 1,
                logits_soft_cap=spec.softcap, q_data_type=spec.dtype, kv_data_type=spec.dtype,
            )  # fmt: skip
        return inputs

    def forward(
        self,
        layer: int,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        kv: Tensor,
        meta: BatchInputs,
        rotation: Rotation | None = None,
    ) -> Tensor:
        spec = self.spec
        q = self._cache.write(q, k, v, kv, layer, meta.write_slots, spec, self._layout, rotation)
        pages = (kv[:, layer, 0], kv[:, layer, 1])
        found: Tensor = self._wrappers[spec.windows[layer]].run(q.contiguous(), pages)
        return found.reshape(q.shape[0], spec.heads * spec.head_dim)


def lacking(spec: AttentionSpec) -> str | None:
    """What FlashInfer, as it is used here, does not do that `spec` asks for, on any device."""
    if spec.dtype not in (torch.bfloat16, torch.float16):
        return f"it computes bfloat16 and float16, not {str(spec.dtype).removeprefix('torch.')}"
    if spec.quantized:
        return f"it knows no scale for each token, which a cache of {spec.kv_cache_dtype} has here"
    if spec.latent:
        return "it is not used for a latent (MLA) here"
    if spec.head_dim not in HEAD_DIMS:
        return f"head_dim is {spec.head_dim}; it has kernels for {', '.join(map(str, HEAD_DIMS))}"
    return None
