"""`quantize` and `perplexity`: what they print and refuse, and that what is written is what loading would make."""

from __future__ import annotations

import json
import math
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from bundled_heldout import PATH, held_out_text

from ropeway.cli.main import main
from ropeway.config import EngineConfig
from ropeway.hub import BUNDLED
from ropeway.modelspec import load_spec
from ropeway.runtime.layers.quantized import QuantizedWeight, as_bytes
from ropeway.runtime.local import LocalExecutor
from ropeway.runtime.perplexity import score, windows
from ropeway.runtime.weights import export
from ropeway.runtime.weights.loader import Weights
from ropeway.runtime.weights.quant import quantize_int8

Make = Callable[[str], Path]


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    out, err = capsys.readouterr()
    return int(caught.value.code or 0), out, err


@pytest.mark.parametrize("format", ["int8", "int4", "fp8"])
def test_the_copy_is_what_loading_would_make(tmp_path: Path, capsys: pytest.CaptureFixture[str], format: str) -> None:
    out = tmp_path / "copy"
    code, text, _ = run(capsys, "quantize", "bundled", str(out), "--quantization", format)
    assert code == 0
    assert f"copy: {format}, " in text
    spec = load_spec(out)
    assert spec.quantization is not None
    assert (spec.quantization.method, spec.quantization.format) == ("compressed-tensors", format)
    assert spec.parameters == spec.stored_parameters
    assert {p.name for p in out.iterdir()} >= {"tokenizer.json", "generation_config.json", "chat_template.jinja"}
    with (
        Weights(out, torch.bfloat16, replace(spec.quantization, widened=False), format) as copied,
        Weights(BUNDLED, torch.bfloat16, None, format) as loaded,
    ):
        for modules, outs, ins in (
            ([f"model.layers.2.self_attn.{p}_proj" for p in "qkv"], [256, 128, 128], 256),
            (["model.layers.4.mlp.down_proj"], [256], 704),
        ):
            ours, theirs = copied.linear(modules, outs, ins), loaded.linear(modules, outs, ins)
            assert isinstance(ours, QuantizedWeight)
            assert isinstance(theirs, QuantizedWeight)
            assert torch.equal(as_bytes(ours.values), as_bytes(theirs.values))
            assert torch.equal(ours.scales, theirs.scales)
            assert torch.equal(ours.dequantize(), theirs.dequantize())
        name, shape = "model.embed_tokens.weight", (4096, 256)
        assert torch.equal(copied.take(name, shape), loaded.take(name, shape))


def test_shards(checkpoint: Make, tmp_path: Path) -> None:
    source = load_spec(checkpoint("qwen2"))
    files = export.write_quantized(
        source, tmp_path / "out", "int8", 0, lambda _, w: quantize_int8(w), shard_bytes=30_000
    )
    assert len(files) > 2
    assert [f.name for f in files] == [f"model-{n:05}-of-{len(files):05}.safetensors" for n in range(1, len(files) + 1)]
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == {f.name for f in files}
    config = EngineConfig(model=str(tmp_path / "out"), num_kv_blocks=8, max_model_len=64, threads=1)
    assert "the checkpoint's (compressed-tensors)" in " ".join(LocalExecutor(config).info.notes)


def test_a_copy_that_fails_leaves_nothing(checkpoint: Make, tmp_path: Path) -> None:
    def fail(module: str, _: torch.Tensor) -> QuantizedWeight:
        raise KeyboardInterrupt(module)

    with pytest.raises(KeyboardInterrupt, match=r"layers\.0\.self_attn\.q_proj"):
        export.write_quantized(load_spec(checkpoint("llama")), tmp_path / "out", "int8", 0, fail)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--quantization", "int4"], r"\[64, 112\] inputs cannot be split in groups of 64. Use --quantization int8"),
        (["--quantization", "int4", "--quantization-group", "48"], "'48'; it must be one of 32, 64, 128"),
        (["EXISTS"], "exists. Remove it"),
    ],
)
def test_quantize_refuses(
    checkpoint: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    out = tmp_path / "out"
    if arguments == ["EXISTS"]:
        out.mkdir()
        arguments = []
    code, _, err = run(capsys, "quantize", str(checkpoint("llama")), str(out), *arguments)
    assert code == 2
    assert re.search(message, err)


def test_a_quantized_model_is_not_quantized_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(capsys, "quantize", "bundled", str(tmp_path / "a"))[0] == 0
    code, _, err = run(capsys, "quantize", str(tmp_path / "a"), str(tmp_path / "b"))
    assert code == 2
    assert "is quantized already (compressed-tensors)" in err
    code, _, err = run(capsys, "perplexity", str(tmp_path / "a"), "--against", "bfloat16")
    assert code == 2
    assert "Give the plain model to --against" in err


@pytest.mark.parametrize(("quantization", "most"), [("int8", 1.01), ("int4", 1.04)])
def test_perplexity_of_the_bundled_model(capsys: pytest.CaptureFixture[str], quantization: str, most: float) -> None:
    code, text, _ = run(
        capsys, "perplexity", "--quantization", quantization, "--against", "bfloat16", "--max-tokens", "4000",
        "--threads", "1",
    )  # fmt: skip
    assert code == 0
    ratio = re.search(r"Ratio of perplexities: ([\d.]+)", text)
    assert ratio is not None
    # Better than the plain weights by more than chance would mean that the text is not what they are measured on.
    assert 0.97 < float(ratio[1]) < most
    assert "3,999 predicted in windows of 512" in text


def test_perplexity_by_itself_is_not_compared(capsys: pytest.CaptureFixture[str]) -> None:
    code, text, _ = run(capsys, "perplexity", "--max-tokens", "50", "--context", "32", "--threads", "1")
    assert code == 0
    assert "49 predicted in windows of 32" in text
    assert "Ratio" not in text


def test_a_tokenizer_of_another_model_is_found_out(
    checkpoint: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The bundled one has more tokens than these weights."""
    directory = Path(shutil.copytree(checkpoint("llama"), tmp_path / "model"))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(BUNDLED / name, directory / name)
    code, _, err = run(capsys, "perplexity", str(directory), "--context", "32", "--max-tokens", "200", "--threads", "1")
    assert (code, "knows tokens beyond the model's 300" in err) == (2, True)


def test_perplexity_refuses(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "binary").write_bytes(b"\xff\xfe\xff")
    (tmp_path / "short").write_text("a")
    for arguments, message in (
        (["--text", str(tmp_path / "none")], "cannot be read: No such file"),
        (["--text", str(tmp_path / "binary")], "is not UTF-8"),
        (["--text", str(tmp_path / "short")], "has 1 tokens; at least 2"),
        (["--context", "4096"], "made for 2048 tokens. Lower --context"),
    ):
        code, _, err = run(capsys, "perplexity", *arguments)
        assert code == 2
        assert message in err


@pytest.mark.parametrize(("length", "context"), [(2, 8), (8, 8), (9, 8), (30, 8), (31, 7), (5, 2)])
def test_windows_score_every_token_once(length: int, context: int) -> None:
    found = list(windows(length, context))
    scored = [token for _, end, first in found for token in range(first, end)]
    assert scored == list(range(1, length))
    assert all(end - begin <= context for begin, end, _ in found)
    assert all(first - begin >= context // 2 for begin, _, first in found[1:])


def test_score_equals_transformers(checkpoint: Make) -> None:
    from checkpoints import prompt, reference

    directory, tokens, context = checkpoint("llama"), prompt(3, 70), 32
    config = EngineConfig(model=str(directory), dtype="float32", threads=1, num_kv_blocks=8, max_model_len=64)
    found = score(LocalExecutor(config).runner, tokens, context=context, chunk=13, start=[1])
    nats = 0.0
    for begin, end, first in windows(70, context - 1):
        window = torch.tensor([[1, *tokens[begin:end]]])
        with torch.no_grad():
            logp = reference(directory)(window).logits[0].log_softmax(-1)
        nats -= sum(float(logp[p - begin, tokens[p]]) for p in range(first, end))
    assert found.predicted == 69
    assert math.isclose(found.nats, nats, rel_tol=1e-4)


def test_the_held_out_text_is_what_the_example_writes() -> None:
    assert PATH.read_text(encoding="utf-8") == held_out_text()
