"""Damaged, forged and unsuitable checkpoints end in a ModelError that names what is wrong."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from ropeway import checkpoint as files
from ropeway.config import EngineConfig
from ropeway.errors import ModelError
from ropeway.modelspec import load_spec
from ropeway.runtime.local import LocalExecutor
from ropeway.runtime.perplexity import score
from ropeway.runtime.weights.loader import Weights

Make = Callable[[str], Path]


@pytest.fixture
def copy(checkpoint: Make, tmp_path: Path) -> Callable[[str], Path]:
    return lambda kind: Path(shutil.copytree(checkpoint(kind), tmp_path / "model"))


def build(directory: Path, **changes: Any) -> LocalExecutor:
    values = {"num_kv_blocks": 40, "threads": 1, "dtype": "float32"} | changes
    return LocalExecutor(EngineConfig(model=str(directory), **values))


def rewrite(directory: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    from safetensors.torch import load_file

    tensors = load_file(directory / "model.safetensors")
    change(tensors)
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})


def configure(directory: Path, **changes: object) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_missing_tensor(copy: Make) -> None:
    directory = copy("llama")
    rewrite(directory, lambda t: t.pop("model.layers.1.mlp.up_proj.weight"))
    with pytest.raises(ModelError, match=r"lacks the tensor 'model.layers.1.mlp.up_proj.weight' of shape \[112, 64\]"):
        build(directory)


def test_unexpected_tensors(copy: Make) -> None:
    directory = copy("llama")
    rewrite(directory, lambda t: t.update({f"model.layers.0.extra.{i}": torch.zeros(1) for i in range(7)}))
    with pytest.raises(ModelError, match=r"7 tensors \('model.layers.0.extra.0', .* and 2 more\)"):
        build(directory)


def test_stored_rotary_frequencies_and_a_tied_head_are_ignored(checkpoint: Make, copy: Make) -> None:
    directory = copy("llama-tied")
    extra = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(16), "lm_head.weight": torch.zeros(300, 64)}
    rewrite(directory, lambda t: t.update(extra))
    found, plain = (
        score(build(path).runner, range(50), context=50, chunk=50).nats
        for path in (directory, checkpoint("llama-tied"))
    )
    assert found == pytest.approx(plain, rel=1e-4)


def test_wrong_shape(copy: Make) -> None:
    directory = copy("qwen3")
    name = "model.layers.2.self_attn.k_norm.weight"
    rewrite(directory, lambda t: t.update({name: torch.ones(25)}))
    with pytest.raises(ModelError, match=rf"'{name}' in .*model.safetensors has shape \[25\], .* asks for \[24\]"):
        build(directory)


def test_integer_weights(copy: Make) -> None:
    directory = copy("llama")
    rewrite(directory, lambda t: t.update({"model.norm.weight": torch.ones(64, dtype=torch.int8)}))
    with pytest.raises(ModelError, match=r"'model.norm.weight' in .* is I8"):
        build(directory)


def test_damaged_weights(copy: Make) -> None:
    directory = copy("llama")
    rewrite(directory, lambda t: t["model.embed_tokens.weight"].fill_(torch.nan))
    with pytest.raises(ModelError, match="NaN or infinity"):
        build(directory)


def test_truncated_file(copy: Make) -> None:
    directory = copy("llama")
    file = directory / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ModelError, match=r"model.safetensors is truncated: the tensor .* ends at byte \d+"):
        build(directory)


def test_missing_shard(copy: Make) -> None:
    directory = copy("qwen3-sharded")
    parts = sorted(directory.glob("*.safetensors"))
    assert len(parts) > 2
    parts[1].unlink()
    with pytest.raises(ModelError, match=rf"shard {parts[1].name} of {len(parts)} is missing"):
        build(directory)


def test_shard_outside_the_directory(copy: Make) -> None:
    directory = copy("qwen3-sharded")
    index = directory / "model.safetensors.index.json"
    data = json.loads(index.read_text())
    data["weight_map"]["lm_head.weight"] = "../other/model.safetensors"
    index.write_text(json.dumps(data))
    with pytest.raises(ModelError, match="not inside the model's directory"):
        build(directory)


@pytest.mark.parametrize("names", [{}, [], None, {"a": 1}])
def test_an_index_without_its_map(tmp_path: Path, names: object) -> None:
    (tmp_path / files.INDEX).write_text(json.dumps({"weight_map": names}))
    with pytest.raises(ModelError, match="has no weight_map from tensor to file"):
        files.shards(tmp_path)
    assert not files.has_weights(tmp_path)


def test_more_shards_than_anybody_makes(tmp_path: Path) -> None:
    names = {f"t{n}": f"{n}.safetensors" for n in range(files.MAX_SHARDS + 1)}
    (tmp_path / files.INDEX).write_text(json.dumps({"weight_map": names}))
    with pytest.raises(ModelError, match=f"names {files.MAX_SHARDS + 1} files; at most {files.MAX_SHARDS} are read"):
        files.shards(tmp_path)


def test_a_tensor_in_two_shards(tmp_path: Path) -> None:
    for name in ("1.safetensors", "2.safetensors"):
        save_file({"a": torch.zeros(1)}, tmp_path / name)
    (tmp_path / files.INDEX).write_text(json.dumps({"weight_map": {"a": "1.safetensors", "b": "2.safetensors"}}))
    with pytest.raises(ModelError, match=r"'a' is in both 1.safetensors and 2.safetensors"):
        files.tensors(tmp_path)


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"cannot be read: Is a directory. Check its permissions"):
        files.read_header(tmp_path)


def test_a_configuration_that_is_no_configuration_by_its_size(tmp_path: Path) -> None:
    """It is not read to find that out."""
    with (tmp_path / "config.json").open("wb") as huge:
        huge.truncate(1 << 40)
    with pytest.raises(ModelError, match="has 1099511627776 bytes; such a file has at most"):
        load_spec(tmp_path)


def test_pickles_are_refused(copy: Make) -> None:
    directory = copy("llama")
    (directory / "model.safetensors").rename(directory / "pytorch_model.bin")
    with pytest.raises(ModelError, match=r"pytorch_model.bin, a pickle"):
        build(directory)


def test_unsupported_architecture(copy: Make) -> None:
    directory = copy("llama")
    configure(directory, architectures=["GPT2LMHeadModel"])
    with pytest.raises(ModelError, match=r"no native code for GPT2LMHeadModel, only for LlamaForCausalLM, Mistral"):
        build(directory, model_impl="native")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_size": "64"}, "hidden_size in .* is '64'; it must be a whole number"),
        ({"num_hidden_layers": -1}, "num_hidden_layers .* is -1"),
        ({"num_hidden_layers": True}, "num_hidden_layers .* is True"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers .* from 1 to 4096"),
        ({"num_key_value_heads": 3}, r"must divide num_attention_heads \(4\)"),
        ({"head_dim": 15}, "head_dim .* must be even"),
        ({"hidden_act": "gelu"}, "hidden_act .* 'gelu'; it must be 'silu'"),
        ({"quantization_config": {"bits": 4}}, "quant_method 'unknown', which cannot be loaded. Supported: compressed"),
        ({"rope_parameters": {"rope_type": "longrope"}}, "'longrope' .* Supported: default, linear"),
        ({"rope_parameters": {"rope_type": "linear"}}, "factor .* is None"),
        ({"rope_parameters": {"rope_type": "llama3", "factor": 2.0}}, "low_freq_factor"),
        ({"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
        ({"rms_norm_eps": "nan"}, "rms_norm_eps"),
        ({"tie_word_embeddings": "no"}, "tie_word_embeddings"),
        ({"eos_token_id": ["</s>"]}, "token id"),
        ({"architectures": "Llama"}, "architectures"),
    ],
)
def test_wrong_configuration(copy: Make, changes: dict[str, object], message: str) -> None:
    directory = copy("llama")
    configure(directory, **changes)
    with pytest.raises(ModelError, match=message):
        load_spec(directory)


def test_unreadable_configuration(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"config.json cannot be read"):
        load_spec(tmp_path)
    for text in ("{", "[]", "[" * 100_000):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(ModelError, match=r"config.json"):
            load_spec(tmp_path)


def header(entries: object, data: bytes = b"", length: int | None = None) -> bytes:
    text = json.dumps(entries).encode() if not isinstance(entries, bytes) else entries
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


GOOD = {"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x00\x00",
        header(GOOD, b"x" * 8, length=1 << 60),
        header(GOOD, b"x" * 7),
        header(GOOD, b"x" * 9),
        header(b"{", b""),
        header(b"[" * 99999, b""),
        header([], b""),
        header({"a": {"dtype": "F32", "shape": [2], "data_offsets": [8, 0]}}, b"x" * 8),
        header({"a": {"dtype": "F32", "shape": [3], "data_offsets": [0, 8]}}, b"x" * 8),
        header({"a": {"dtype": "F32", "shape": [-1, -2], "data_offsets": [0, 8]}}, b"x" * 8),
        header({"a": {"dtype": "F32", "shape": [2.0], "data_offsets": [0, 8]}}, b"x" * 8),
        header({"a": {"dtype": "X32", "shape": [2], "data_offsets": [0, 8]}}, b"x" * 8),
        header({"a": {"dtype": ["F32"], "shape": [2], "data_offsets": [0, 8]}}, b"x" * 8),
        header({"a": {"dtype": "F32", "shape": 2, "data_offsets": [0, 8]}}, b"x" * 8),
        header({"a": {"dtype": "F32", "shape": [2], "data_offsets": [4, 12]}}, b"x" * 12),
        header({**GOOD, "b": {"dtype": "F32", "shape": [2], "data_offsets": [4, 12]}}, b"x" * 12),
        header({"a": "x"}, b""),
        header({"a": None}, b""),
    ],
)
def test_forged_headers(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "f.safetensors").write_bytes(content)
    with pytest.raises(ModelError):
        files.read_header(tmp_path / "f.safetensors")


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.integers(0, 1 << 30), flips=st.integers(1, 6), cut=st.integers(0, 60))
def test_corrupted_headers_never_crash(checkpoint: Make, tmp_path: Path, seed: int, flips: int, cut: int) -> None:
    """Any bits of the header changed and any tail lost: a clean refusal, or a file that is right by its own words."""
    random = Random(seed)
    content = bytearray((checkpoint("llama") / "model.safetensors").read_bytes())
    for _ in range(flips):
        content[random.randrange(3000)] ^= 1 << random.randrange(8)
    file = tmp_path / "model.safetensors"
    file.write_bytes(content[: len(content) - cut])
    try:
        found = files.read_header(file)
    except ModelError:
        return
    assert sum(t.end - t.begin for t in found.values()) < len(content)


@pytest.mark.parametrize("stored", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("wanted", [torch.float32, torch.bfloat16])
def test_dtypes_and_fusing(tmp_path: Path, stored: torch.dtype, wanted: torch.dtype) -> None:
    a, b = torch.randn(3, 5).to(stored), torch.randn(2, 5).to(stored)
    save_file({"a": a, "b": b, "empty": torch.zeros(0, 5)}, tmp_path / "model.safetensors")
    with Weights(tmp_path, wanted) as weights:
        fused = weights.fuse(["b", "empty", "a"], [(2, 5), (0, 5), (3, 5)])
        weights.finish()
    assert fused.dtype == wanted
    assert torch.equal(fused, torch.cat([b, a]).to(wanted))


def test_unaligned_tensors(tmp_path: Path) -> None:
    values = torch.randn(4)
    entries = {"odd": {"dtype": "U8", "shape": [3], "data_offsets": [0, 3]},
               "a": {"dtype": "F32", "shape": [4], "data_offsets": [3, 19]}}  # fmt: skip
    (tmp_path / "model.safetensors").write_bytes(header(entries, b"xyz" + values.numpy().tobytes()))
    assert files.tensors(tmp_path)["a"].begin % 4
    with Weights(tmp_path, torch.float32) as weights:
        assert torch.equal(weights.take("a", (4,)), values)
