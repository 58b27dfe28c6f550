"""A whole step of a model in one native call: no interpreter between layers and no fresh memory for their results.

The call runs the kernels that the layers would call one by one (see kernels/cpu/step.cpp), so the logits are the same,
bit for bit, at any number of rows and for prefill chunks too.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from ctypes import c_double, c_int64, c_void_p

import torch
from torch import Tensor

from ropeway.errors import KernelError
from ropeway.runtime.attention.cpu import CpuBackend
from ropeway.runtime.batch import BatchInputs
from ropeway.runtime.kernels.ops import NativeOps
from ropeway.runtime.layers.attention import Attention
from ropeway.runtime.layers.linear import PackedLinear
from ropeway.runtime.layers.mlp import GatedMLP
from ropeway.runtime.layers.norm import RMSNorm
from ropeway.runtime.models.llama import Layer, Llama

TYPES = {torch.float32: 0, torch.bfloat16: 1}


class StepLayer(ctypes.Structure):
    """One decoder layer; mirrors the struct of this name in kernels/cpu/step.h, as do the other two."""

    _fields_ = (
        *((name, c_void_p) for name in ("input_norm", "post_norm", "q_norm", "k_norm")),
        *((name, c_void_p) for name in ("qkv", "out", "gate_up", "down")),
        ("window", c_int64),
    )


class StepModel(ctypes.Structure):
    """What no step changes."""

    _fields_ = (
        *((name, c_int64) for name in ("type", "layers", "hidden", "half")),
        ("eps", c_double),
        *((name, c_void_p) for name in ("cosine", "sine", "layer", "norm", "head")),
    )


class StepCall(ctypes.Structure):
    """One step."""

    _fields_ = (
        *((name, c_void_p) for name in ("positions", "wanted")),
        ("wanted_count", c_int64),
        *((name, c_void_p) for name in ("residual", "kv", "scratch", "logits")),
    )


class FusedModel:
    """`model`, computed by one native call per step. Use `fuse`, which checks that it can be."""

    def __init__(self, model: Llama, backend: CpuBackend) -> None:
        self.model = model  # owns everything that the structures point to
        self.backend = backend
        self._scratch = torch.empty(0, dtype=torch.uint8)
        self._layers = (StepLayer * len(model.layers))(
            *(_describe(layer, backend.spec.windows[number]) for number, layer in enumerate(model.layers))
        )
        cosine, sine = model.rotary
        self._step = StepModel(
            type=TYPES[model.norm.weight.dtype],
            layers=len(model.layers),
            hidden=model.norm.weight.shape[0],
            half=cosine.shape[1],
            eps=model.norm.eps,
            cosine=cosine.data_ptr(),
            sine=sine.data_ptr(),
            layer=ctypes.addressof(self._layers),
            norm=model.norm.weight.data_ptr(),
            head=_address(model.head),
        )
        self._address = ctypes.addressof(self._step)

    def forward(self, inputs: BatchInputs, kv: Tensor) -> Tensor:
        """Compute the step's tokens, write their K and V to `kv`, and return logits (E, vocab) float32."""
        library = self.backend.library
        meta = self.backend.prepare(inputs)
        residual = self.model.embed(inputs.token_ids)
        wanted = inputs.logits_rows
        logits = torch.empty((wanted.shape[0], self.model.head.out_features), dtype=torch.float32)
        call = StepCall(
            positions=inputs.positions.data_ptr(),
            wanted=wanted.data_ptr(),
            wanted_count=wanted.shape[0],
            residual=residual.data_ptr(),
            kv=kv.data_ptr(),
            logits=logits.data_ptr(),
        )
        address = ctypes.addressof(call)
        size = library.step_scratch(self._address, meta.step_address, address)
        if size > self._scratch.numel():
            self._scratch = torch.empty(size, dtype=torch.uint8)
        call.scratch = self._scratch.data_ptr()
        status = library.step(self._address, meta.step_address, address)
        if status:
            raise KernelError(_FAILURES.get(status, f"The native step failed with status {status}."))
        return logits

    def hidden(self, inputs: BatchInputs, kv: Tensor) -> Tensor:
        """Layer by layer: the native call ends with logits."""
        return self.model.hidden(inputs, kv)

    def logits(self, states: Tensor) -> Tensor:
        return self.model.logits(states)


def fuse(model: object) -> FusedModel | str:
    """`model` as one native call per step, or the reason why it cannot be one."""
    if not isinstance(model, Llama) or type(model).hidden is not Llama.hidden:
        return f"{type(model).__name__} does not have the layers of the Llama family"
    odd = {type(part).__name__ for layer in model.layers for part in _parts(layer) if not isinstance(part, _KNOWN)}
    if odd:
        return f"it does not compute {' and '.join(sorted(odd))}"
    backend = model.backend
    if not isinstance(backend, CpuBackend):
        return f"attention is {backend.name}, not the native one"
    if not isinstance(model.ops, NativeOps):
        return f"the small operations are {model.ops.name}, not native"
    if any(linear.native is None for linear in _linears(model)):
        return "a linear layer is not native"
    dtype = backend.spec.dtype
    if any(norm.weight.dtype != dtype or not norm.weight.is_contiguous() for norm in _norms(model)):
        return f"a norm is not {str(dtype).removeprefix('torch.')}"
    return FusedModel(model, backend)


_KNOWN = (Attention, GatedMLP)


def _parts(layer: Layer) -> tuple[object, object]:
    return layer.attention, layer.mlp


def _dense(layer: Layer) -> tuple[Attention, GatedMLP]:
    assert isinstance(layer.attention, Attention), "fuse() has looked"
    assert isinstance(layer.mlp, GatedMLP), "fuse() has looked"
    return layer.attention, layer.mlp


def _linears(model: Llama) -> Iterator[PackedLinear]:
    for attention, mlp in map(_dense, model.layers):
        yield from (attention.qkv, attention.out, mlp.gate_up, mlp.down)
    yield model.head


def _norms(model: Llama) -> Iterator[RMSNorm]:
    for layer in model.layers:
        attention, _ = _dense(layer)
        optional = (attention.q_norm, attention.k_norm)
        yield from (layer.input_norm, layer.post_norm, *(norm for norm in optional if norm is not None))
    yield model.norm


def _describe(layer: Layer, window: int | None) -> StepLayer:
    attention, mlp = _dense(layer)
    return StepLayer(
        input_norm=layer.input_norm.weight.data_ptr(),
        post_norm=layer.post_norm.weight.data_ptr(),
        q_norm=None if attention.q_norm is None else attention.q_norm.weight.data_ptr(),
        k_norm=None if attention.k_norm is None else attention.k_norm.weight.data_ptr(),
        qkv=_address(attention.qkv),
        out=_address(attention.out),
        gate_up=_address(mlp.gate_up),
        down=_address(mlp.down),
        window=window or 0,
    )


def _address(linear: PackedLinear) -> int:
    weight = linear.native
    assert weight is not None, "fuse() has looked"
    return ctypes.addressof(weight)


_FAILURES = {
    1: "A block table or a write slot holds a negative id where KV is needed: the step's plan is wrong. "
    "Please report this with the engine's log.",
    2: "The kernels were built for other shapes than they were called with. Delete the kernel cache and restart.",
    3: "A step ran out of memory for its work space. Lower --max-num-batched-tokens.",
}
