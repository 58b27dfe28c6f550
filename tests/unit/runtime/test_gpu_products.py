"""Which products a GPU gets, and that one which does not work there is passed over with the reason."""

from __future__ import annotations

import pytest
import torch

from ropeway.config import EngineConfig
from ropeway.errors import ConfigError
from ropeway.runtime.layers import gpu, linear
from ropeway.runtime.local import LocalExecutor

CUDA = torch.device("cuda")


@pytest.fixture
def triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "find_spec", lambda _: object())


@pytest.mark.parametrize(
    ("scheme", "dtype", "names"),
    [
        ("plain", torch.bfloat16, []),
        ("other", torch.bfloat16, []),
        ("int8", torch.bfloat16, ["triton"]),
        ("int4", torch.float16, ["triton"]),
        ("fp8", torch.bfloat16, ["triton and cuBLAS", "triton"]),
        ("fp8", torch.float16, ["triton"]),
    ],
)
@pytest.mark.usefixtures("triton")
def test_ways(scheme: str, dtype: torch.dtype, names: list[str]) -> None:
    reasons: list[str] = []
    assert list(gpu.preferences(dtype, scheme, reasons)) == names
    assert not reasons


def test_without_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "find_spec", lambda _: None)
    reasons: list[str] = []
    assert not gpu.preferences(torch.bfloat16, "int8", reasons)
    assert reasons == ["triton: it is not installed"]


@pytest.mark.parametrize(
    ("capability", "installed", "expected"),
    [((9, 0), True, ""), ((8, 9), True, ""), ((8, 0), True, "no fp8"), ((9, 0), False, "needs Triton")],
)
def test_fp8_needs(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], installed: bool, expected: str
) -> None:
    monkeypatch.setattr(gpu, "find_spec", lambda _: object() if installed else None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "Card")
    found = gpu.lacks_fp8(CUDA)
    assert expected in found
    assert bool(found) == bool(expected)


@pytest.mark.usefixtures("triton")
def test_what_does_not_work_is_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    class Wrong(linear.TorchIntProduct):
        def __call__(self, x: torch.Tensor) -> torch.Tensor:
            return super().__call__(x) * 1.5

    def broken(*_: object) -> linear.Product:
        raise TypeError("no such instruction\nand more")

    plain = linear.TorchIntProduct
    ways = {"broken": broken, "wrong": lambda w, b: Wrong(w, b, torch.bfloat16)}
    monkeypatch.setattr(gpu, "preferences", lambda *_: ways)
    choice = linear._choose_beyond(torch.device("cpu"), torch.bfloat16, "int8", 3, plain)
    assert (choice.name, choice.make) == ("torch", plain)
    assert choice.reasons[0] == "broken: it does not work here (no such instruction)"
    assert choice.reasons[1].startswith("wrong: its result is wrong by ")
    ways["right"] = lambda w, b: plain(w, b, torch.bfloat16)
    assert linear._choose_beyond(torch.device("cpu"), torch.bfloat16, "int8", 3, plain).name == "right"
    assert linear._choose_beyond(torch.device("cpu"), torch.bfloat16, "int8", 0, plain).name == "torch"


def test_fp8_is_refused_on_a_cpu() -> None:
    with pytest.raises(ConfigError, match=r"quantization is fp8, but it needs a GPU. Use --quantization int8"):
        LocalExecutor(EngineConfig(model="bundled", quantization="fp8", device="cpu"))
