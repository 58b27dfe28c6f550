"""Checkpoints in the layouts of other tools, written value by value, and the plain weights that they stand for.

Nothing here is shared with the code under test: packing is spelled out nibble by nibble.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from torch import Tensor

Array = NDArray[Any]
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
"""AWQ keeps output feature AWQ_ORDER[i] of every eight in nibble i."""
W8 = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel", "dynamic": False}
W4 = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 32, "dynamic": False}
F8 = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "channel", "dynamic": False}
A8 = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True}


def compressed(layout: str, weights: dict[str, Any], inputs: dict[str, Any] | None, **more: Any) -> dict[str, Any]:
    group = {"targets": ["Linear"], "weights": weights, "input_activations": inputs, "output_activations": None}
    return {
        "quant_method": "compressed-tensors", "format": layout, "quantization_status": "compressed",
        "config_groups": {"group_0": group}, "ignore": ["lm_head"], "kv_cache_scheme": None, **more,
    }  # fmt: skip


def pack(values: Array, axis: int, order: tuple[int, ...] = tuple(range(8))) -> Tensor:
    """Nibbles `values` (R, C) in words of eight along `axis`; nibble i of a word is value `order[i]` of its eight."""
    values = np.moveaxis(values, axis, 1)
    words = np.zeros((values.shape[0], -(-values.shape[1] // 8)), dtype=np.uint32)
    for column in range(values.shape[1]):
        nibble = order.index(column % 8)
        words[:, column // 8] |= values[:, column].astype(np.uint32) << np.uint32(4 * nibble)
    return torch.from_numpy(np.ascontiguousarray(np.moveaxis(words.view(np.int32), 1, axis)))


def steps(weight: Array, group: int, symmetric: bool) -> tuple[Array, Array, Array]:
    """Plain rounding: values 0..15 (N, K), scales and zeros (N, K / group)."""
    rows, depth = weight.shape
    grouped = weight.reshape(rows, depth // group, group)
    if symmetric:
        scale = np.abs(grouped).max(-1) / 7.5
        zero = np.full(scale.shape, 8)
    else:
        low, high = np.minimum(grouped.min(-1), 0), np.maximum(grouped.max(-1), 0)
        scale = (high - low) / 15
        zero = np.clip(np.round(-low / scale), 0, 15).astype(int)
    scale = scale.astype(np.float16).astype(np.float64)
    values = np.clip(np.round(grouped / scale[..., None]) + zero[..., None], 0, 15).astype(int)
    return values.reshape(rows, depth), scale, zero


def plain(values: Array, scale: Array, zero: Array, group: int) -> Tensor:
    """The weight that int4 values stand for."""
    expanded = (values - np.repeat(zero, group, axis=1)) * np.repeat(scale, group, axis=1)
    return torch.from_numpy(expanded.astype(np.float32))


def half(array: Array) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(array)).half()


def store_int8(name: str, weight: Array) -> tuple[dict[str, Tensor], Tensor]:
    """As compressed-tensors' min-max observer does: 255 steps, so that -128 occurs; it is computed with as -127."""
    scale = (np.abs(weight).max(1, keepdims=True) / 127.5).astype(np.float32)
    values = np.clip(np.round(weight / scale), -128, 127).astype(np.int8)
    stored = {f"{name}.weight": torch.from_numpy(values), f"{name}.weight_scale": torch.from_numpy(scale)}
    return stored, torch.from_numpy((np.maximum(values, -127) * scale).astype(np.float32))


def store_packed(name: str, weight: Array, group: int, symmetric: bool) -> tuple[dict[str, Tensor], Tensor]:
    values, scale, zero = steps(weight, group, symmetric)
    stored = {
        f"{name}.weight_packed": pack(values, 1),
        f"{name}.weight_scale": half(scale),
        f"{name}.weight_shape": torch.tensor(weight.shape),
    }
    if not symmetric:
        stored[f"{name}.weight_zero_point"] = pack(zero, 0)
    return stored, plain(values, scale, zero, group)


def store_gptq(name: str, weight: Array, group: int, symmetric: bool, offset: int) -> tuple[dict[str, Tensor], Tensor]:
    values, scale, zero = steps(weight, group, symmetric)
    stored = {
        f"{name}.qweight": pack(values.T, 0),
        f"{name}.qzeros": pack((zero.T - offset) & 15, 1),
        f"{name}.scales": half(scale.T),
        f"{name}.g_idx": torch.arange(weight.shape[1], dtype=torch.int32) // group,
        f"{name}.bias": torch.zeros(weight.shape[0], dtype=torch.float16),
    }
    return stored, plain(values, scale, zero, group)


def store_act_order(name: str, weight: Array, group: int) -> tuple[dict[str, Tensor], Tensor]:
    """GPTQ with desc_act: the input features of a group stand anywhere in the row."""
    order = np.random.default_rng(weight.shape[1]).permutation(weight.shape[1])
    back = np.argsort(order)
    stored, meant = store_gptq(name, weight[:, order], group, False, 1)
    values, _, _ = steps(weight[:, order], group, False)
    stored[f"{name}.qweight"] = pack(values[:, back].T, 0)
    stored[f"{name}.g_idx"] = torch.from_numpy((back // group).astype(np.int32))
    return stored, meant[:, torch.from_numpy(back)].contiguous()


def store_awq(name: str, weight: Array, group: int, symmetric: bool) -> tuple[dict[str, Tensor], Tensor]:
    values, scale, zero = steps(weight, group, symmetric)
    stored = {
        f"{name}.qweight": pack(values.T, 1, AWQ_ORDER),
        f"{name}.qzeros": pack(zero.T, 1, AWQ_ORDER),
        f"{name}.scales": half(scale.T),
    }
    return stored, plain(values, scale, zero, group)


def store_fp8(name: str, weight: Array, scale: Array, stored_as: str, kept: Array) -> tuple[dict[str, Tensor], Tensor]:
    """`scale` as large as the weight, `kept` as it is written."""
    values = torch.from_numpy(weight / scale).float().clamp(-448, 448).to(torch.float8_e4m3fn)
    stored = {f"{name}.weight": values, f"{name}.{stored_as}": torch.from_numpy(kept.astype(np.float32))}
    return stored, values.float() * torch.from_numpy(scale.astype(np.float32))


def store_fp8_channel(name: str, weight: Array) -> tuple[dict[str, Tensor], Tensor]:
    scale = np.abs(weight).max(1, keepdims=True) / 448
    return store_fp8(name, weight, np.broadcast_to(scale, weight.shape).copy(), "weight_scale", scale)


def store_fp8_tensor(name: str, weight: Array) -> tuple[dict[str, Tensor], Tensor]:
    scale = np.abs(weight).max() / 448
    return store_fp8(name, weight, np.full(weight.shape, scale), "weight_scale", np.array(scale))


def store_fp8_blocks(name: str, weight: Array, stored_as: str) -> tuple[dict[str, Tensor], Tensor]:
    """Blocks of 128 x 128, of which the last ones are smaller."""
    outs, ins = weight.shape
    blocks = np.array([
        [np.abs(weight[row : row + 128, column : column + 128]).max() / 448 for column in range(0, ins, 128)]
        for row in range(0, outs, 128)
    ])  # fmt: skip
    scale = np.array([[blocks[row // 128, column // 128] for column in range(ins)] for row in range(outs)])
    return store_fp8(name, weight, scale, stored_as, blocks)


Store = Callable[[str, Array], tuple[dict[str, Tensor], Tensor]]
LAYOUTS: dict[str, tuple[dict[str, Any], Store]] = {
    "w8a8": (compressed("int-quantized", W8, A8), store_int8),
    "fp8-channel": (compressed("float-quantized", F8, {**A8, "type": "float"}), store_fp8_channel),
    "fp8-block": (
        compressed("float-quantized", {**F8, "strategy": "block", "block_structure": [128, 128]}, None),
        lambda n, w: store_fp8_blocks(n, w, "weight_scale"),
    ),
    "fp8": (
        {"quant_method": "fp8", "activation_scheme": "dynamic", "fmt": "e4m3", "weight_block_size": [128, 128]},
        lambda n, w: store_fp8_blocks(n, w, "weight_scale_inv"),
    ),
    "fp8-tensor": ({"quant_method": "fp8", "activation_scheme": "static"}, store_fp8_tensor),
    "w4a16": (compressed("pack-quantized", W4, None), lambda n, w: store_packed(n, w, 32, True)),
    "w4a16-asym": (
        compressed("pack-quantized", {**W4, "symmetric": False, "group_size": 64}, None),
        lambda n, w: store_packed(n, w, 64, False),
    ),
    "w4a16-channel": (
        compressed("pack-quantized", {**W4, "strategy": "channel", "group_size": None}, None),
        lambda n, w: store_packed(n, w, w.shape[1], True),
    ),
    "gptq": (
        {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": False, "sym": False},
        lambda n, w: store_gptq(n, w, 32, False, 1),
    ),
    "gptq-act-order": (
        {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": True, "sym": False},
        lambda n, w: store_act_order(n, w, 32),
    ),
    "gptq-v2": (
        {"quant_method": "gptq", "bits": 4, "group_size": -1, "sym": True, "checkpoint_format": "gptq_v2"},
        lambda n, w: store_gptq(n, w, w.shape[1], True, 0),
    ),
    "awq": (
        {"quant_method": "awq", "bits": 4, "group_size": 64, "zero_point": True, "version": "gemm"},
        lambda n, w: store_awq(n, w, 64, False),
    ),
}  # fmt: skip


def save_quantized(source: Path, layout: str, directory: Path) -> Path:
    """Write the plain checkpoint `source` in `layout` to `directory`, and what it stands for to `directory`/plain."""
    config, store = LAYOUTS[layout]
    kept: dict[str, Tensor] = {}
    meant: dict[str, Tensor] = {}
    for name, tensor in load_file(source / "model.safetensors").items():
        module = name.removesuffix(".weight")
        if module.endswith("_proj") and module != name:
            stored, meant[name] = store(module, tensor.double().numpy())
            kept |= stored
        else:
            kept[name] = meant[name] = tensor
    # A layer's own bias replaces the zeros that some writers add.
    kept |= {name: tensor for name, tensor in meant.items() if name.endswith(".bias")}
    settings = json.loads((source / "config.json").read_text())
    for target, tensors, more in ((directory, kept, {"quantization_config": config}), (directory / "plain", meant, {})):
        target.mkdir(parents=True, exist_ok=True)
        save_file(tensors, target / "model.safetensors")
        (target / "config.json").write_text(json.dumps({**settings, **more}))
    return directory
