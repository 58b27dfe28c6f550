"""Paged attention in native code: reads K and V where they are stored. See kernels/cpu/attention.cpp."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

import torch
from torch import Tensor

from ropeway.errors import KernelError
from ropeway.runtime.attention.backend import AttentionSpec
from ropeway.runtime.attention.rotation import Rotation
from ropeway.runtime.batch import BatchInputs
from ropeway.runtime.kernels.library import AttentionLayer, AttentionStep, NativeLibrary, load

MAX_HEAD_DIM = 256
BLOCK_SIZES = (8, 16, 32, 64)
_TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.int8: 2}


@dataclass(frozen=True)
class CpuMeta:
    """Arguments of a step as the kernels take them. `inputs` keeps alive the tensors that they point to."""

    inputs: BatchInputs
    step: AttentionStep
    layer: AttentionLayer
    step_address: int
    layer_address: int


class CpuBackend:
    """One kernel for decode and chunked prefill, for float32 and bfloat16, with a cache of that type or of int8.

    A row's result is the same bit for bit whatever its neighbours, the number of threads, and the way its prompt was
    cut into chunks. The layout inside a block is (kv_heads, K then V then any scales); see the kernel for more.
    """

    name = "cpu"
    capturable = False

    def __init__(self, spec: AttentionSpec, device: torch.device, *, library: NativeLibrary | None = None) -> None:
        """`library` defaults to the kernels for this processor. Raises KernelError if there are none."""
        loaded = library or load()
        if isinstance(loaded, str):
            raise KernelError(f"The native attention cannot start: {loaded}.")
        self.spec = spec
        self.device = device
        self.library = loaded
        self._kernel = loaded.attention

    @classmethod
    def supports(cls, spec: AttentionSpec, device: torch.device) -> str | None:
        if device.type != "cpu":
            return f"it runs on the CPU, not on {device.type}"
        if spec.dtype not in (torch.float32, torch.bfloat16):
            return f"it computes float32 and bfloat16, not {str(spec.dtype).removeprefix('torch.')}"
        if spec.head_dim % 8 or not 8 <= spec.head_dim <= MAX_HEAD_DIM:
            return f"head_dim is {spec.head_dim}; it needs a multiple of 8 up to {MAX_HEAD_DIM}"
        if spec.block_size not in BLOCK_SIZES:
            return f"block_size is {spec.block_size}; it needs one of {', '.join(map(str, BLOCK_SIZES))}"
        if spec.kv_dtype not in _TYPES:
            return f"it does not read a cache of {spec.kv_cache_dtype}"
        if spec.latent:
            return "it does not attend to a latent (MLA)"
        if spec.softcap is not None:
            return "it does not cap attention scores, as this model does"
        library = load()
        return library if isinstance(library, str) else None

    def block_shape(self) -> tuple[int, ...]:
        spec = self.spec
        elements = 2 * spec.head_dim * spec.block_size + 2 * spec.scale_bytes * spec.block_size
        return (spec.kv_heads, elements)

    def prepare(self, inputs: BatchInputs) -> CpuMeta:
        spec = self.spec
        step = AttentionStep(
            type=_TYPES[spec.dtype],
            kv_type=_TYPES[spec.kv_dtype],
            rows=inputs.num_rows,
            tokens=inputs.num_tokens,
            heads=spec.heads,
            kv_heads=spec.kv_heads,
            head_dim=spec.head_dim,
            block_size=spec.block_size,
            layers=spec.layers,
            table_stride=inputs.block_tables.stride(0),
            threads=self.library.refresh(),
            cu_q=inputs.cu_q.data_ptr(),
            starts=inputs.starts.data_ptr(),
            tables=inputs.block_tables.data_ptr(),
            slots=inputs.write_slots.data_ptr(),
            scale=spec.scale,
        )
        layer = AttentionLayer()
        return CpuMeta(inputs, step, layer, ctypes.addressof(step), ctypes.addressof(layer))

    def forward(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, kv: Tensor, meta: CpuMeta, rotation: Rotation | None = None
    ) -> Tensor:
        spec = self.spec
        if rotation is not None:
            q, k = rotation(q, k)
        out = torch.empty((q.shape[0], spec.heads * spec.head_dim), dtype=spec.dtype)
        call = meta.layer
        call.q, call.k, call.v = q.data_ptr(), k.data_ptr(), v.data_ptr()
        call.q_stride, call.k_stride, call.v_stride = q.stride(0), k.stride(0), v.stride(0)
        call.kv, call.out = kv.data_ptr(), out.data_ptr()
        call.layer, call.window = layer, spec.windows[layer] or 0
        status = self._kernel(meta.step_address, meta.layer_address)
        if status:
            raise KernelError(_FAILURES.get(status, f"The attention kernel failed with status {status}."))
        return out


_FAILURES = {
    1: "A block table or a write slot holds a negative id where KV is needed: the step's plan is wrong. "
    "Please report this with the engine's log.",
    2: "The attention kernel was built for other shapes than it was called with. Delete the kernel cache and restart.",
    3: "The attention kernel ran out of memory for its work space. Lower --max-num-batched-tokens.",
}
