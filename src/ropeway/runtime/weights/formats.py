"""The layouts in which quantized checkpoints store a linear layer, each as one `QuantizedWeight`.

All of them hold (value - zero) * scale. compressed-tensors
(https://github.com/vllm-project/compressed-tensors) stores int8 and fp8 plainly, and nibbles and zero points plus 8 in
words of eight along the input and output features. GPTQ (https://github.com/ModelCloud/GPTQModel) and AWQ
(https://github.com/casper-hansen/AutoAWQ) store the transposed matrix: GPTQ packs along the input features and its zero
points along the output features, AWQ both along the output features and in an order of its own. DeepSeek's fp8 has a
scale for each block of outputs and inputs, which it calls the inverse of a scale.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from ropeway.errors import ModelError
from ropeway.modelspec import QuantSpec
from ropeway.modelspec.quantization import kernel_group
from ropeway.runtime.layers.quantized import QuantizedWeight, as_bytes

_AWQ_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)
"""Where AWQ keeps the nibble of each of eight neighbouring output features."""
_MARKS = (".weight_scale", ".weight_scale_inv", ".weight_packed", ".qweight")


class Stored(Protocol):
    """What the readers need of a checkpoint; see `loader.Weights`."""

    def has(self, name: str) -> bool: ...

    def raw(self, name: str, shapes: Sequence[tuple[int, ...]]) -> Tensor:
        """The tensor as it is stored. Raises ModelError if it is missing or of another shape than `shapes`."""


def is_quantized(stored: Stored, module: str) -> bool:
    """Whether the checkpoint has `module` in one of the layouts."""
    return any(stored.has(module + part) for part in _MARKS)


def read(stored: Stored, spec: QuantSpec, module: str, outs: int, ins: int) -> QuantizedWeight:
    """The weight of the linear layer `module`, (outs, ins). Raises ModelError if it cannot be computed with."""
    if spec.format == "int8":
        return _read_int8(stored, module, outs, ins)
    if spec.format == "fp8":
        return _read_fp8(stored, spec, module, outs, ins)
    group = spec.group or ins
    if ins % group or ins % 32:
        raise ModelError(
            f"{module} has {ins} input features and a scale for every {group}, which does not come out even or is no "
            "multiple of 32: the int4 kernels cannot compute it. Quantize it with another group size."
        )
    return _READERS[spec.method](stored, spec, module, outs, ins, group)


def join(parts: Sequence[QuantizedWeight], modules: Sequence[str]) -> QuantizedWeight:
    """Layers with the same input as one, their outputs side by side. Raises ModelError if their orders differ."""
    first = parts[0]
    if len(parts) == 1:
        return first
    for part in parts[1:]:
        if (part.order is None) != (first.order is None) or (
            part.order is not None and first.order is not None and not torch.equal(part.order, first.order)
        ):
            raise ModelError(
                f"{', '.join(modules)} have the same input and are computed as one, but their input features are "
                "grouped in different orders (act-order, desc_act). Take a checkpoint made with desc_act=False, or the "
                "plain one with --quantization int4."
            )
    zeros: Tensor | None = None
    if any(p.zeros is not None for p in parts):
        zeros = torch.cat(
            [torch.full_like(p.scales, 8, dtype=torch.uint8) if p.zeros is None else p.zeros for p in parts]
        )
    return QuantizedWeight(
        format=first.format,
        values=torch.cat([as_bytes(p.values) for p in parts]).view(first.values.dtype),
        scales=torch.cat([p.scales for p in parts]),
        zeros=zeros,
        group=first.group,
        order=first.order,
    )


def unpack_nibbles(packed: Tensor) -> Tensor:
    """(R, C) int32 to (R, 8 C) uint8 in 0..15, the lowest nibble of each word first."""
    pairs = packed.contiguous().view(torch.uint8)
    return torch.stack((pairs & 15, pairs >> 4), dim=-1).view(packed.shape[0], -1)


def pack_nibbles(values: Tensor) -> Tensor:
    """The inverse of `unpack_nibbles`; columns are filled up with 0 to a multiple of 8."""
    padded = torch.nn.functional.pad(values, (0, -values.shape[1] % 8))
    pairs = padded[:, 0::2] | (padded[:, 1::2] << 4)
    return pairs.flatten().view(torch.int32).view(pairs.shape[0], -1)  # a single row need not have a stride of words


def _read_int8(stored: Stored, module: str, outs: int, ins: int) -> QuantizedWeight:
    # Scales made for 255 steps put the largest weights at -127.5: -127 is as near as -128.
    values = _bytes(stored, module, outs, ins, torch.int8).clamp_(min=-127)
    return QuantizedWeight(format="int8", values=values, scales=_by_channel(stored, module, outs))


def _read_fp8(stored: Stored, spec: QuantSpec, module: str, outs: int, ins: int) -> QuantizedWeight:
    values = _bytes(stored, module, outs, ins, torch.float8_e4m3fn)
    if not spec.tall:
        return QuantizedWeight(format="fp8", values=values, scales=_by_channel(stored, module, outs))
    name = module + (".weight_scale_inv" if spec.method == "fp8" else ".weight_scale")
    blocks = stored.raw(name, [(-(-outs // spec.tall), -(-ins // spec.group))]).float()
    scales = blocks.repeat_interleave(spec.tall, dim=0)[:outs].contiguous()
    return QuantizedWeight(format="fp8", values=values, scales=scales, group=spec.group)


def _bytes(stored: Stored, module: str, outs: int, ins: int, dtype: torch.dtype) -> Tensor:
    values = stored.raw(module + ".weight", [(outs, ins)])
    if values.dtype != dtype:
        announced = str(dtype).removeprefix("torch.")
        raise ModelError(f"{module}.weight is {values.dtype} where config.json announces {announced}.")
    return values


def _by_channel(stored: Stored, module: str, outs: int) -> Tensor:
    """A scale for each output, (outs,) float32, whether stored so or as one for all."""
    scales = stored.raw(module + ".weight_scale", [(outs, 1), (outs,), (1,), (), (1, 1)])
    return scales.float().reshape(-1).expand(outs).contiguous()


def _read_packed(stored: Stored, spec: QuantSpec, module: str, outs: int, ins: int, group: int) -> QuantizedWeight:
    groups = ins // group
    words = stored.raw(module + ".weight_packed", [(outs, -(-ins // 8))])
    scales = stored.raw(module + ".weight_scale", [(outs, groups)])
    stored.raw(module + ".weight_shape", [(2,)])
    order = _order(stored, module + ".weight_g_idx", ins, group)
    zeros = None
    if not spec.symmetric:
        packed = stored.raw(module + ".weight_zero_point", [(-(-outs // 8), groups)])
        zeros = unpack_nibbles(packed.T)[:, :outs].T
    return _grouped(unpack_nibbles(words)[:, :ins], scales, zeros, group, order)


def _read_gptq(stored: Stored, spec: QuantSpec, module: str, outs: int, ins: int, group: int) -> QuantizedWeight:
    groups = ins // group
    words = stored.raw(module + ".qweight", [(ins // 8, outs)])
    scales = stored.raw(module + ".scales", [(groups, outs)])
    zeros = unpack_nibbles(stored.raw(module + ".qzeros", [(groups, -(-outs // 8))]))[:, :outs].T
    order = _order(stored, module + ".g_idx", ins, group)
    return _grouped(unpack_nibbles(words.T), scales.T, (zeros + spec.zero_offset) & 15, group, order)


def _read_awq(stored: Stored, spec: QuantSpec, module: str, outs: int, ins: int, group: int) -> QuantizedWeight:
    def unpack(packed: Tensor) -> Tensor:
        return unpack_nibbles(packed).view(packed.shape[0], -1, 8)[:, :, _AWQ_ORDER].reshape(packed.shape[0], outs).T

    groups = ins // group
    if outs % 8:
        raise ModelError(f"{module} has {outs} output features; AWQ packs multiples of 8. Check config.json.")
    values = unpack(stored.raw(module + ".qweight", [(ins, outs // 8)]))
    scales = stored.raw(module + ".scales", [(groups, outs)])
    zeros = unpack(stored.raw(module + ".qzeros", [(groups, outs // 8)])) if stored.has(module + ".qzeros") else None
    return _grouped(values, scales.T, zeros, group)


_READERS: dict[str, Callable[[Stored, QuantSpec, str, int, int, int], QuantizedWeight]] = {
    "compressed-tensors": _read_packed,
    "gptq": _read_gptq,
    "awq": _read_awq,
}


def _grouped(
    values: Tensor, scales: Tensor, zeros: Tensor | None, group: int, order: Tensor | None = None
) -> QuantizedWeight:
    """With groups that the kernels know: a larger one is several of them with the same scale. `order` brings the input
    features of a group together."""
    smaller = kernel_group(group)
    values = values if order is None else values[:, order]
    if zeros is not None and bool((zeros == 8).all()):
        zeros = None
    if smaller != group:
        scales = scales.repeat_interleave(group // smaller, dim=1)
        zeros = None if zeros is None else zeros.repeat_interleave(group // smaller, dim=1)
    return QuantizedWeight(
        format="int4",
        values=values.contiguous(),
        scales=scales.float().contiguous(),
        zeros=None if zeros is None else zeros.contiguous(),
        group=smaller,
        order=order,
    )


def _order(stored: Stored, name: str, ins: int, group: int) -> Tensor | None:
    """The input features group by group, where `name` (ins,), the group of each, says that they are not neighbours."""
    if not stored.has(name):
        return None
    groups = stored.raw(name, [(ins,)]).long()
    if bool((groups == torch.arange(ins) // group).all()) or bool((groups == -1).all()):
        return None
    sizes = torch.bincount(groups.clamp(min=0), minlength=ins // group)
    if bool((sizes != group).any()) or bool((groups < 0).any()):
        raise ModelError(
            f"{name} makes groups of {int(sizes.min())} to {int(sizes.max())} input features where config.json "
            f"announces {group}. The checkpoint is damaged; download it again."
        )
    return groups.argsort(stable=True)
