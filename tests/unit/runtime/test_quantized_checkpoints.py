"""Every quantized layout gives the weights that it stands for, and what cannot be computed is refused by name."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from quantized_checkpoints import A8, F8, LAYOUTS, W4, W8, compressed, save_quantized
from ropeway.config import EngineConfig
from ropeway.errors import ConfigError, ModelError
from ropeway.modelspec import load_spec
from ropeway.runtime import quantization
from ropeway.runtime.layers.quantized import QuantizedWeight
from ropeway.runtime.weights.formats import pack_nibbles, unpack_nibbles
from ropeway.runtime.weights.loader import Weights

Make = Callable[[str], Path]
ATTENTION = "model.layers.1.self_attn."
QKV = [f"{ATTENTION}{part}_proj" for part in "qkv"]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A plain checkpoint whose layers all have multiples of 64 inputs."""
    import transformers

    torch.manual_seed(5)
    config = transformers.LlamaConfig(
        vocab_size=300, hidden_size=128, intermediate_size=192, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=128, initializer_range=0.1, attention_bias=True,
    )  # fmt: skip
    directory = tmp_path_factory.mktemp("source")
    model = transformers.LlamaForCausalLM(config)
    for name, weight in model.named_parameters():
        if name.endswith(".bias"):
            torch.nn.init.normal_(weight, std=0.3)
    model.save_pretrained(directory)
    return directory


@pytest.fixture
def stored(source: Path, tmp_path: Path) -> Make:
    return lambda layout: save_quantized(source, layout, tmp_path / layout)


def reader(directory: Path, **changes: Any) -> Weights:
    """Of a device that computes whatever is stored."""
    stored = load_spec(directory).quantization
    assert stored is not None
    return Weights(directory, torch.float32, replace(stored, widened=False), **changes)


def configure(directory: Path, quantization: dict[str, Any]) -> Path:
    path = directory / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "quantization_config": quantization}))
    return directory


def rewrite(directory: Path, **tensors: torch.Tensor | None) -> None:
    """Change or remove tensors of a checkpoint; dots in names are written as double underscores."""
    path = directory / "model.safetensors"
    found = load_file(path)
    for name, tensor in tensors.items():
        found.pop(name.replace("__", "."), None)
        if tensor is not None:
            found[name.replace("__", ".")] = tensor
    save_file(found, path)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_stands_for_what_was_stored(stored: Make, layout: str) -> None:
    directory = stored(layout)
    meant = load_file(directory / "plain" / "model.safetensors")
    with reader(directory) as weights:
        for modules, outs, ins in ((QKV, [128, 64, 64], 128), (["model.layers.0.mlp.down_proj"], [128], 192)):
            found = weights.linear(modules, outs, ins)
            assert isinstance(found, QuantizedWeight)
            assert found.group in (0, 32, 64, 128)
            expected = torch.cat([meant[module + ".weight"] for module in modules])
            expected = expected if found.order is None else expected[:, found.order]
            torch.testing.assert_close(found.dequantize(), expected, rtol=1e-6, atol=1e-7)
            assert torch.equal(found.widen(torch.bfloat16), found.dequantize().bfloat16())
        head = weights.linear(["lm_head"], [300], 128)
        assert isinstance(head, torch.Tensor)
        assert torch.equal(head, meant["lm_head.weight"])


@pytest.mark.parametrize("quantization", ["auto", "int8", "int4"])
@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name.startswith("fp8")])
def test_fp8_is_plain_where_the_device_has_none(stored: Make, layout: str, quantization: Any) -> None:
    directory = stored(layout)
    spec = load_spec(directory)
    meant = load_file(directory / "plain" / "model.safetensors")
    expected = torch.cat([meant[module + ".weight"] for module in QKV])
    with Weights(directory, torch.float32, spec.quantization, quantization) as weights:
        found = weights.linear(QKV, [128, 64, 64], 128)
        head = weights.head("lm_head", 300, 128)
    if quantization == "auto":
        assert isinstance(found, torch.Tensor)
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-7)
    else:
        assert isinstance(found, QuantizedWeight)
        assert isinstance(head, QuantizedWeight)
        assert (found.format, head.format) == (quantization, "int8")
        assert (found.dequantize() - expected).abs().mean() < (0.002 if quantization == "int8" else 0.02)


def test_fp8_is_kept_or_widened_as_the_device_can(stored: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    plain, fp8 = load_spec(stored("w8a8") / "plain"), load_spec(stored("fp8"))
    device = torch.device("cpu")

    def config(quantization: Any) -> EngineConfig:
        return EngineConfig(model="", quantization=quantization)

    with pytest.raises(ConfigError, match=r"quantization is fp8, but it needs a GPU. Use --quantization int8"):
        quantization.fit(plain, config("fp8"), device)
    widened = quantization.fit(fp8, config("auto"), device)
    assert quantization.linear_scheme(config("auto"), widened) == "plain"
    assert widened.weight_bytes("bfloat16") == 2 * fp8.parameters
    assert quantization.notes(config("auto"), widened, device, "bfloat16") == [
        "Quantization: the checkpoint's fp8 (fp8) is widened to bfloat16 while loading: it needs a GPU."
    ]
    assert quantization.notes(config("int8"), widened, device, "bfloat16")[1] == (
        "Quantization: int8, while loading; the LM head int8. Activations int8 per token."
    )
    assert widened.weight_bytes("bfloat16", "int8") == plain.weight_bytes("bfloat16", "int8")
    monkeypatch.setattr(quantization, "lacks_fp8", lambda _: "")
    kept = quantization.fit(fp8, config("auto"), device)
    assert quantization.linear_scheme(config("auto"), kept) == "fp8"
    assert quantization.notes(config("auto"), kept, device, "bfloat16") == [
        "Quantization: fp8 in blocks of 128 x 128, the checkpoint's (fp8). Activations fp8 per token."
    ]
    assert quantization.fit(plain, config("fp8"), device) is plain
    assert quantization.linear_scheme(config("int8"), quantization.fit(fp8, config("int8"), device)) == "int8"


@pytest.mark.parametrize("layout", LAYOUTS)
def test_counts(source: Path, stored: Make, layout: str) -> None:
    directory = stored(layout)
    found, plain = load_spec(directory), load_spec(source)
    assert found.parameters == plain.parameters == plain.stored_parameters
    linear = sum(outs * ins for outs, ins in plain.linears)
    assert found.quantization is not None
    assert found.quantization.weights == linear
    rest = (plain.parameters - linear) * 2
    fewest = linear // 2 if found.quantization.format == "int4" else linear
    assert found.quantization.widened == (found.quantization.format == "fp8")
    found = replace(found, quantization=replace(found.quantization, widened=False))
    assert rest + fewest < found.weight_bytes("bfloat16") < rest + 1.3 * fewest
    (directory / "model.safetensors").unlink()
    # Without weights at hand the formula has to do.
    stored_as = replace(found.quantization, weights=None, scales=None)
    by_formula = replace(load_spec(directory), quantization=stored_as)
    assert abs(by_formula.weight_bytes("bfloat16") - found.weight_bytes("bfloat16")) <= 0.03 * linear


def test_all_tensors_are_accounted_for(stored: Make) -> None:
    directory = stored("w8a8")
    rewrite(directory, model__layers__0__mlp__up_proj__input_scale=torch.ones(1))
    spec = load_spec(directory)
    with reader(directory) as weights:
        for number in range(2):
            prefix = f"model.layers.{number}."
            weights.linear([f"{prefix}self_attn.{p}_proj" for p in "qkv"], [128, 64, 64], 128)
            weights.fuse([f"{prefix}self_attn.{p}_proj.bias" for p in "qkvo"], [(128,), (64,), (64,), (128,)])
            weights.linear([prefix + "self_attn.o_proj"], [128], 128)
            weights.linear([f"{prefix}mlp.{p}_proj" for p in ("gate", "up")], [192, 192], 128)
            weights.linear([prefix + "mlp.down_proj"], [128], 192)
            for norm in ("input_layernorm", "post_attention_layernorm"):
                weights.take(f"{prefix}{norm}.weight", (128,))
        weights.take("model.norm.weight", (128,))
        weights.take("model.embed_tokens.weight", (300, 128))
        with pytest.raises(ModelError, match=r"1 tensor \('lm_head.weight'\)"):
            weights.finish()
        weights.linear(["lm_head"], [300], spec.hidden)
        weights.finish()


def test_a_bias_that_matters_is_not_dropped(stored: Make) -> None:
    directory = stored("gptq")
    with reader(directory) as weights:
        weights.linear(["model.layers.0.mlp.down_proj"], [128], 192)
        weights.linear([ATTENTION + "o_proj"], [128], 128)
        with pytest.raises(ModelError) as caught:
            weights.finish()
        assert "down_proj.bias" not in caught.value.message
        left = {name for name in weights._left if name.endswith(".bias")}
        assert ATTENTION + "o_proj.bias" in left
        assert "model.layers.0.mlp.down_proj.bias" not in left


def test_layers_that_are_computed_as_one_must_have_one_order(stored: Make) -> None:
    directory = stored("gptq")
    order = torch.arange(128, dtype=torch.int32) // 32
    rewrite(directory, **{f"{QKV[0]}.g_idx".replace(".", "__"): order.flip(0).contiguous()})
    with reader(directory) as weights, pytest.raises(ModelError, match=r"q_proj.*k_proj.*act-order"):
        weights.linear(QKV, [128, 64, 64], 128)


def test_groups_of_unequal_size_are_refused(stored: Make) -> None:
    directory = stored("gptq")
    order = torch.arange(128, dtype=torch.int32) // 32
    order[0] = 3
    rewrite(directory, **{f"{QKV[0]}.g_idx".replace(".", "__"): order})
    with reader(directory) as weights, pytest.raises(ModelError, match=r"q_proj.g_idx .*31 .*33"):
        weights.linear([QKV[0]], [128], 128)


def test_layers_that_are_computed_as_one_must_agree(stored: Make) -> None:
    directory = stored("w4a16")
    part = QKV[1].replace(".", "__")
    rewrite(directory, **{
        f"{part}__weight_packed": None, f"{part}__weight_scale": None, f"{part}__weight": torch.zeros(64, 128),
    })  # fmt: skip
    with reader(directory) as weights, pytest.raises(ModelError, match=r"leaves .*k_proj plain and quantizes the"):
        weights.linear(QKV, [128, 64, 64], 128)


def test_a_damaged_tensor_is_named(stored: Make) -> None:
    directory = stored("awq")
    rewrite(directory, **{f"{QKV[0]}.scales".replace(".", "__"): torch.ones(3, 128).half()})
    with reader(directory) as weights, pytest.raises(ModelError, match=r"q_proj.scales.* has shape \[3, 128\].*\[2, 1"):
        weights.linear(QKV, [128, 64, 64], 128)


@pytest.mark.parametrize(
    ("quantization", "named"),
    [
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "quant_method 'bitsandbytes'"),
        ({"quant_method": "fp8", "fmt": "e5m2"}, "fp8 of the kind 'e5m2'"),
        ({"quant_method": "fp8", "weight_block_size": [128, 100]}, r"every block of \[128, 100\]"),
        ({"quant_method": "gptq", "bits": 8, "group_size": 128}, "8-bit GPTQ"),
        ({"quant_method": "gptq", "bits": 4, "group_size": 128, "checkpoint_format": "marlin"}, "'marlin'"),
        ({"quant_method": "gptq", "bits": 4, "group_size": 16}, "every 16 input features"),
        ({"quant_method": "gptq", "bits": 4, "dynamic": {".*": {"bits": 8}}}, "'dynamic'"),
        ({"quant_method": "awq", "bits": 4, "version": "gemv", "group_size": 128}, "layout 'gemv'"),
        (compressed("float-quantized", F8, A8), "8-bit int activations"),
        (compressed("float-quantized", W8, None), "8-bit int weights in the format 'float-quantized'"),
        (compressed("float-quantized", {**F8, "strategy": "group"}, None), "8-bit weights symmetric per group"),
        (compressed("marlin-24", W4, None), "the format 'marlin-24'"),
        (compressed("pack-quantized", {**W4, "num_bits": 8}, None), "8-bit int weights in the format 'pack-quantized'"),
        (compressed("int-quantized", {**W8, "strategy": "group", "group_size": 128}, A8), "symmetric per group"),
        (compressed("int-quantized", {**W8, "symmetric": False}, A8), "with zero points per channel"),
        (compressed("pack-quantized", W4, {**A8, "num_bits": 4}), "4-bit int activations"),
        (compressed("int-quantized", W8, {**A8, "type": "float"}), "8-bit float activations"),
        (compressed("int-quantized", W8, A8, sparsity_config={"format": "sparse-24-bitmask"}), "sparsity"),
    ],
)
def test_refusals_name_what_is_supported(stored: Make, quantization: dict[str, Any], named: str) -> None:
    directory = configure(stored("w8a8"), quantization)
    with pytest.raises(ModelError, match=f"{named}.* cannot be loaded. Supported: .*int-quantized.*GPTQ and AWQ"):
        load_spec(directory)


def test_layers_of_different_schemes_are_refused(stored: Make) -> None:
    both = compressed("int-quantized", W8, A8)
    both["config_groups"]["group_1"] = {"targets": ["re:.*down"], "format": "pack-quantized", "weights": W4}
    with pytest.raises(ModelError, match="2 different schemes"):
        load_spec(configure(stored("w8a8"), both))


def test_what_is_computed_otherwise_is_said(stored: Make) -> None:
    static = compressed("int-quantized", W8, {**A8, "dynamic": False, "strategy": "tensor"}, kv_cache_scheme={"b": 8})
    found = load_spec(configure(stored("w8a8"), static)).quantization
    assert found is not None
    assert [note.split(" not used")[0] for note in found.notes] == [
        "Static activation scales are",
        "The checkpoint's scheme for the KV cache is",
    ]
    uneven = compressed("int-quantized", W8, {**A8, "symmetric": False})
    found = load_spec(configure(stored("w8a8"), uneven)).quantization
    assert found is not None
    assert found.notes == ("Activations are quantized symmetrically, where the checkpoint asks for zero points.",)


def test_another_quantization_than_the_stored_one_is_refused(stored: Make) -> None:
    directory = stored("w4a16")
    with pytest.raises(ConfigError, match=r"quantization is int8, but .* in int4 \(compressed-tensors\). Use --quant"):
        reader(directory, quantization="int8")
    with reader(directory, quantization="int4") as weights:
        # What the checkpoint leaves plain is then quantized on the way.
        head = weights.head("lm_head", 300, 128)
        assert isinstance(head, QuantizedWeight)
        assert head.format == "int8"


@pytest.mark.parametrize("columns", [1, 7, 8, 24, 33])
def test_nibbles(columns: int) -> None:
    values = torch.from_numpy(np.random.default_rng(columns).integers(0, 16, (5, columns))).to(torch.uint8)
    packed = pack_nibbles(values)
    assert packed.shape == (5, -(-columns // 8))
    assert torch.equal(unpack_nibbles(packed)[:, :columns], values)
