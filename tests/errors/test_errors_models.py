"""Models that are not there, not whole, or not for this machine: what `ropeway serve` says before it ends.

The engine is made in this process, so that torch is loaded once for all of them.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import sys
import tomllib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import httpx
import huggingface_hub
import pytest
import torch
from aloud import Book, Typed, check_laws, check_words, errors_of, make, plain
from besides import BesideHost, IdleHost
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError
from safetensors.torch import load_file, save_file

from ropeway.hub import BUNDLED
from ropeway.runtime.kernels import build
from ropeway.runtime.torch_version import LEAST

SERVE = "ropeway serve ./model --port 0 --num-kv-blocks 64 --threads 1"
_HELD: list[int] = []

Change = Callable[[Path], object]


def weights(change: Callable[[dict[str, torch.Tensor]], object]) -> Change:
    def work(model: Path) -> None:
        tensors = load_file(model / "model.safetensors")
        change(tensors)
        save_file(tensors, model / "model.safetensors", {"format": "pt"})

    return work


def settings(**changes: Any) -> Change:
    def work(model: Path) -> None:
        path = model / "config.json"
        kept = {**json.loads(path.read_text()), **changes}
        path.write_text(json.dumps({name: value for name, value in kept.items() if value is not None}))

    return work


def cut(name: str, count: int) -> Change:
    return lambda model: (model / name).write_bytes((model / name).read_bytes()[:-count])


def remove(*names: str) -> Change:
    return lambda model: [(model / name).unlink() for name in names]


def write(name: str, data: bytes) -> Change:
    return lambda model: (model / name).write_bytes(data)


def rename(name: str, to: str) -> Change:
    return lambda model: (model / name).rename(model / to)


def lose_a_shard(model: Path) -> None:
    (model / "model.safetensors").rename(model / "model-00001-of-00002.safetensors")
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))


def hold_the_tier(model: Path) -> None:
    tier = model.parent / "tier"
    tier.mkdir()
    _HELD.append(os.open(tier / "blocks", os.O_CREAT | os.O_RDWR))
    fcntl.flock(_HELD[-1], fcntl.LOCK_EX)


BY_CHANNEL = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel", "dynamic": False}
BY_TOKEN = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True}
QUANTIZED = {
    "quant_method": "compressed-tensors", "format": "int-quantized", "quantization_status": "compressed",
    "ignore": ["lm_head"], "kv_cache_scheme": None,
    "config_groups": {
        "group_0": {"targets": ["Linear"], "weights": BY_CHANNEL, "input_activations": BY_TOKEN,
                    "output_activations": None}
    },
}  # fmt: skip

ENGINE: dict[str, tuple[str, Change | None]] = {
    "weights that are cut off": (SERVE, cut("model.safetensors", 100)),
    "weights that are no safetensors": (SERVE, write("model.safetensors", b"PK\x03\x04 this is a zip file" * 9)),
    "a pointer in place of the weights": (
        SERVE, write("model.safetensors", b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n")
    ),
    "no weights": (SERVE, remove("model.safetensors")),
    "weights as a pickle": (SERVE, rename("model.safetensors", "pytorch_model.bin")),
    "a shard that is missing": (SERVE, lose_a_shard),
    "a tensor that is missing": (SERVE, weights(lambda t: t.pop("model.layers.1.mlp.up_proj.weight"))),
    "a tensor of another shape": (SERVE, weights(lambda t: t.update({"model.norm.weight": torch.ones(65)}))),
    "tensors of another model": (SERVE, weights(lambda t: t.update({"model.layers.0.extra": torch.ones(1)}))),
    "integers for weights": (
        SERVE, weights(lambda t: t.update({"model.norm.weight": torch.ones(64, dtype=torch.int8)}))
    ),
    "weights that are not numbers": (SERVE, weights(lambda t: t["model.embed_tokens.weight"].fill_(torch.nan))),
    "float16 on a CPU": (SERVE + " --dtype float16 --device cpu", None),
    "a GPU that is not there": (SERVE + " --device cuda", None),
    "fp8 on a CPU": (SERVE + " --quantization fp8 --device cpu", None),
    "a GPU's attention on a CPU": (SERVE + " --attention-backend flashinfer --device cpu", None),
    "another quantization than the checkpoint's": (
        SERVE + " --quantization int4 --dtype float32", settings(quantization_config=QUANTIZED)
    ),
    "fewer blocks than the shortest request needs": (
        "ropeway serve ./model --port 0 --num-kv-blocks 2 --max-model-len 200", None
    ),
    "more KV cache than memory": ("ropeway serve ./model --port 0 --kv-cache-gib 100000", None),
    "more memory than there is": ("ropeway serve ./model --port 0 --memory-gib 100000", None),
    "too little memory for the weights": ("ropeway serve ./model --port 0 --memory-gib 0.001", None),
    "too many blocks": ("ropeway serve ./model --port 0 --num-kv-blocks 1000000000", None),
    "a tier on disk that is in use": (SERVE + " --kv-disk-gib 0.01 --kv-disk-path tier", hold_the_tier),
    "a tier larger than the disk": (SERVE + " --kv-disk-gib 10000000 --kv-disk-path tier", None),
    "a journal where there is a file": (SERVE + " --journal model/config.json", None),
}  # fmt: skip
"""Found by the engine."""

CODE = {"AutoConfig": "configuration_x.XConfig", "AutoModelForCausalLM": "modeling_x.XForCausalLM"}

TEXT: dict[str, tuple[str, Change | None]] = {
    "no such directory": ("ropeway serve ./no-such-model", None),
    "a GGUF file": ("ropeway serve ./model/model.gguf", write("model.gguf", b"GGUF")),
    "a directory without a model": (SERVE, remove("config.json")),
    "a config.json that is cut off": (SERVE, cut("config.json", 10)),
    "a number that is a text": (SERVE, settings(hidden_size="64")),
    "heads that do not divide": (SERVE, settings(num_key_value_heads=3)),
    "a rotation that is not supported": (SERVE, settings(rope_parameters={"rope_type": "longrope"})),
    "a quantization that is not supported": (SERVE, settings(quantization_config={"quant_method": "bitsandbytes"})),
    "a model for pictures": (SERVE, settings(architectures=["ViTForImageClassification"], model_type="vit")),
    "a model without attention": (
        SERVE, settings(architectures=["MambaForCausalLM"], model_type="mamba", state_size=16)
    ),
    "an encoder with a decoder": (
        SERVE,
        settings(architectures=["T5ForConditionalGeneration"], model_type="t5", is_encoder_decoder=True),
    ),
    "native code for a family without": (
        SERVE + " --model-impl native", settings(architectures=["GPT2LMHeadModel"], model_type="gpt2")
    ),
    "no tokenizer": (SERVE, remove("tokenizer.json")),
    "a tokenizer that is damaged": (SERVE, cut("tokenizer.json", 1000)),
    "no such tokenizer": (SERVE + " --tokenizer ./words", None),
    "no such chat template": (SERVE + " --chat-template chat.jinja", None),
    "a chat template that is no text": (SERVE + " --chat-template model/model.safetensors", None),
    "a chat template that is wrong": (
        SERVE + " --chat-template model/chat.jinja", write("chat.jinja", b"{% for m in messages %}{{ m.content }")
    ),
    "a longer context than the model's": (SERVE + " --max-model-len 1000000", None),
    "to quantize what is quantized": (
        "ropeway quantize ./model out", settings(quantization_config=QUANTIZED)
    ),
    "to quantize over something": ("ropeway quantize ./model tier", lambda model: (model.parent / "tier").mkdir()),
    "a plan that does not fit": ("ropeway plan ./model --memory-gib 0.01 --max-num-batched-tokens 64K", None),
}  # fmt: skip
"""Found by the server itself, or by other commands."""


@pytest.fixture
def model(checkpoint: Callable[[str], Path], tmp_path: Path) -> Path:
    """A small checkpoint with the words of the bundled model."""
    made = Path(shutil.copytree(checkpoint("llama"), tmp_path / "model"))
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja"):
        shutil.copy(BUNDLED / name, made / name)
    return made


@pytest.mark.parametrize("title", [*ENGINE, *TEXT])
def test_a_model_that_cannot_be_served(
    title: str,
    model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    update: bool,
) -> None:
    command, change = {**ENGINE, **TEXT}[title]
    if title == "a GPU that is not there" and torch.cuda.is_available():
        pytest.skip("there is one")
    monkeypatch.setattr("ropeway.gateway.local.EngineHost", BesideHost if title in ENGINE else IdleHost)
    if change is not None:
        change(model)
    try:
        entry, told = make(Typed(command), tmp_path, monkeypatch, capsys)
    finally:
        while _HELD:
            os.close(_HELD.pop())
    Book("models").check(title, entry, [*ENGINE, *TEXT, *LATER], update=update)
    check_laws(told)


LATER = ["an old torch"]


def test_an_old_torch(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], update: bool
) -> None:
    found = tmp_path / "site" / "torch-2.3.1.dist-info"
    found.mkdir(parents=True)
    (found / "METADATA").write_text("Metadata-Version: 2.1\nName: torch\nVersion: 2.3.1\n")
    monkeypatch.setattr("sys.path", [str(found.parent), *sys.path])
    monkeypatch.setattr("ropeway.gateway.local.EngineHost", BesideHost)
    entry, told = make(Typed(SERVE), tmp_path, monkeypatch, capsys)
    Book("models").check(LATER[0], entry, [*ENGINE, *TEXT, *LATER], update=update)
    check_laws(told)
    assert "torch 2.3.1 " in told.last


def test_the_least_torch_is_that_of_the_package() -> None:
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())
    assert f"torch>={LEAST[0]}.{LEAST[1]}" in project["project"]["dependencies"]


def answer(status: int) -> httpx.Response:
    return httpx.Response(status, request=httpx.Request("GET", "https://hub.example"))


HUB: dict[str, tuple[str, Exception | None]] = {
    "a model of the hub, without a network": ("ropeway serve owner/model --download-dir cache", None),
    "a model that is gated": ("ropeway serve owner/model", GatedRepoError("gated", response=answer(403))),
    "a name that the hub does not know": (
        "ropeway serve owner/modle", RepositoryNotFoundError("no", response=answer(404))
    ),
    "a revision that the hub does not know": (
        "ropeway serve owner/model --revision v9", RevisionNotFoundError("no", response=answer(404))
    ),
    "a download that the disk has no room for": ("ropeway serve owner/model", OSError(28, "No space left on device")),
}  # fmt: skip


@pytest.mark.parametrize("title", HUB)
def test_a_model_that_the_hub_does_not_give(
    title: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], update: bool
) -> None:
    command, error = HUB[title]
    monkeypatch.setattr("ropeway.gateway.local.EngineHost", IdleHost)
    if error is None:
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    else:
        monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: (_ for _ in ()).throw(error))
    entry, told = make(Typed(command), tmp_path, monkeypatch, capsys)
    Book("hub").check(title, entry, list(HUB), update=update)
    check_laws(told)


def shared_cache(folder: Path) -> Mapping[str, str]:
    """A cache that anybody on this machine could have put code into."""
    before = os.umask(0)
    try:
        (folder / "kernels").mkdir(mode=0o777)
        (folder / "kernels" / build._fingerprint(build.VARIANTS["generic"], os.environ)).mkdir(mode=0o777)
    finally:
        os.umask(before)
    return {"ROPEWAY_CACHE_DIR": str(folder)}


KERNELS: dict[str, Callable[[Path], Mapping[str, str]]] = {
    "no compiler": lambda folder: {"PATH": str(folder), "ROPEWAY_CACHE_DIR": str(folder)},
    "a compiler that is not there": lambda folder: {"CXX": "gcc-99", "ROPEWAY_CACHE_DIR": str(folder)},
    "a compiler that fails": lambda folder: {"CXX": "false", "ROPEWAY_CACHE_DIR": str(folder)},
    "a cache of kernels that others can write": shared_cache,
    "a cache of kernels that cannot be written": lambda folder: {"ROPEWAY_CACHE_DIR": "/dev/null"},
}


@pytest.mark.parametrize("title", KERNELS)
def test_kernels_that_cannot_be_built(
    title: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], update: bool
) -> None:
    """Ropeway runs without them, and says this once in its log; here it is asked for them."""
    monkeypatch.delenv("CXX", raising=False)
    for name, value in KERNELS[title](tmp_path).items():
        monkeypatch.setenv(name, value)
    code = build.main(["generic"])
    said = capsys.readouterr().err.strip()
    check_words(said)
    entry = f"$ python -m ropeway.runtime.kernels.build\n{plain(said, tmp_path)}\nexit code {code}"
    Book("kernels").check(title, entry, list(KERNELS), update=update)


def test_the_books_have_nothing_else() -> None:
    assert list(Book("models").entries) == [*ENGINE, *TEXT, *LATER]
    assert list(Book("hub").entries) == list(HUB)
    assert list(Book("kernels").entries) == list(KERNELS)


def test_no_two_models_are_told_apart_by_nothing() -> None:
    said = list(errors_of({**Book("models").entries, **Book("hub").entries}).values())
    assert len(set(said)) == len(said)
