"""Grouped experts in Triton: every division of the tokens gives the weighted sum, in one layer and in whole models."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from gpu_kernels.machine_code import compiled
from ropeway.modelspec.experts import ExpertSpec
from ropeway.runtime.kernels.triton import moe, route
from ropeway.runtime.layers.moe import choose_experts
from ropeway.runtime.layers.quantized import QuantizedWeight
from ropeway.runtime.weights.quant import quantize_int4, quantize_int8

Make = Callable[[str], Path]
HALF = torch.bfloat16 if torch.cuda.is_available() else torch.float16
"""Triton's interpreter multiplies the bits of bfloat16 as if they were integers."""


def weighted_sum(x: Tensor, weights: Tensor, chosen: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """By definition, in float64 on the CPU."""
    x, weights, gate_up, down = (t.double().cpu() for t in (x, weights, gate_up, down))
    found = torch.zeros_like(x)
    for token in range(x.shape[0]):
        for weight, e in zip(weights[token], chosen[token].tolist(), strict=True):
            gate, up = (gate_up[e] @ x[token]).chunk(2)
            found[token] += weight * (down[e] @ (torch.nn.functional.silu(gate) * up))
    return found


def drawn(tokens: int, each: int, count: int, kind: str) -> Tensor:
    """Experts of each token: at random, in turns the first and the last few, or the same for all."""
    if kind == "random":
        return torch.rand(tokens, count).argsort(dim=1)[:, :each].contiguous()
    turn = torch.arange(tokens)[:, None] % 2 if kind == "ends" else torch.zeros(tokens, 1, dtype=torch.long)
    return torch.arange(each) + turn * (count - each)


ROUTERS = {
    "softmax": ExpertSpec(count=8, chosen=2, inner=1, sparse=(True,)),
    "odd": ExpertSpec(count=5, chosen=3, inner=1, sparse=(True,), normalize=False, scale=1.5),
    "one": ExpertSpec(count=1, chosen=1, inner=1, sparse=(True,)),
    "groups": ExpertSpec(
        count=12, chosen=3, inner=1, sparse=(True,), groups=4, kept_groups=2, normalize=False, scale=16.0
    ),
    "sigmoid": ExpertSpec(
        count=18, chosen=4, inner=1, sparse=(True,), scoring="sigmoid", biased=True, groups=3, kept_groups=2,
        group_best=2, scale=2.5,
    ),
    "without groups": ExpertSpec(count=6, chosen=4, inner=1, sparse=(True,), scoring="sigmoid", biased=True),
}  # fmt: skip


@pytest.mark.parametrize("name", ROUTERS)
def test_route(name: str) -> None:
    spec = ROUTERS[name]
    logits, bias = torch.randn(12, spec.count) * 2, torch.randn(spec.count) if spec.biased else None
    weights, chosen = route.choose_experts(logits, bias, spec)
    expected_weights, expected = choose_experts(logits, bias, spec)
    assert torch.equal(chosen, expected)
    torch.testing.assert_close(weights, expected_weights, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("name", ["softmax", "sigmoid"])
def test_a_token_with_nan_still_names_experts(name: str) -> None:
    """Whatever it names is computed, and its NaN is found in its logits."""
    spec = ROUTERS[name]
    logits = torch.randn(3, spec.count)
    logits[1] = torch.nan
    weights, chosen = route.choose_experts(logits, torch.zeros(spec.count) if spec.biased else None, spec)
    assert weights[1].isnan().all()
    assert bool(((chosen >= 0) & (chosen < spec.count)).all())
    assert weights[[0, 2]].isfinite().all()


@pytest.mark.parametrize("kind", ["random", "ends", "same"])
@pytest.mark.parametrize(("tokens", "each", "count"), [(1, 1, 1), (1, 2, 5), (20, 2, 3), (9, 3, 6)])
def test_order(tokens: int, each: int, count: int, kind: str) -> None:
    chosen = drawn(tokens, each, count, kind)
    pairs = tokens * each
    order = torch.full((pairs,), -1, dtype=torch.int32)
    counts = torch.full((count,), -1, dtype=torch.int32)
    for block in (16, 512):
        moe._order_kernel[(count,)](chosen, order, counts, pairs, BLOCK=block)
        assert torch.equal(order.long(), chosen.flatten().argsort(stable=True))
        assert torch.equal(counts.long(), torch.bincount(chosen.flatten(), minlength=count))


@pytest.mark.parametrize("pairs", [1, 2, 7, 40, 300])
@pytest.mark.parametrize("count", [1, 3, 40])
@pytest.mark.parametrize("size", [16, 32])
def test_most_blocks(pairs: int, count: int, size: int) -> None:
    """As many as the worst division fills: one token for each of some experts, and the rest for one more of them."""
    worst = max(used - 1 - (-(pairs - used + 1) // size) for used in range(1, min(pairs, count) + 1))
    assert moe.most_blocks(pairs, count, size) == worst


@pytest.mark.parametrize(
    ("tokens", "each", "count", "hidden", "inner", "kind"),
    [
        (1, 2, 4, 64, 48, "random"),
        (5, 3, 8, 40, 24, "random"),
        (33, 2, 4, 96, 32, "ends"),
        (70, 2, 3, 48, 80, "same"),
        (150, 1, 2, 32, 72, "random"),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, HALF])
def test_mixture(tokens: int, each: int, count: int, hidden: int, inner: int, kind: str, dtype: torch.dtype) -> None:
    x = torch.randn(tokens, hidden).to(dtype)
    weights, chosen = torch.rand(tokens, each), drawn(tokens, each, count, kind)
    gate_up = (torch.randn(count * 2 * inner, hidden) / hidden**0.5).to(dtype)
    down = (torch.randn(count * hidden, inner) / inner**0.5).to(dtype)
    stacks = moe.stack(gate_up, count), moe.stack(down, count)
    found = moe.mixture(x, weights, chosen, *stacks)
    expected = weighted_sum(x, weights, chosen, stacks[0].values, stacks[1].values)
    error = (found.double().cpu() - expected).abs().max() / expected.abs().max()
    assert found.dtype == dtype
    assert error < (1e-5 if dtype == torch.float32 else 2e-2)


@pytest.mark.parametrize("group", [0, 32, 64, 128])
def test_quantized(device: torch.device, group: int) -> None:
    """int8 experts (no groups) and int4 ones are what their values and scales say, with activations as they are."""
    tokens, each, count, hidden, inner = 20, 2, 4, 128, 128 if group else 48

    def quantized(rows: int, depth: int) -> QuantizedWeight:
        weight = torch.randn(rows, depth).cpu()
        return (quantize_int4(weight, group) if group else quantize_int8(weight)).to(device)

    gate_up, down = quantized(count * 2 * inner, hidden), quantized(count * hidden, inner)
    if group == 64:
        down = replace(down, zeros=None)
    x, weights, chosen = torch.randn(tokens, hidden), torch.rand(tokens, each), drawn(tokens, each, count, "random")
    found = moe.mixture(x, weights, chosen, moe.stack(gate_up, count), moe.stack(down, count))
    plain = [w.dequantize().view(count, -1, w.values.shape[1]) for w in (gate_up, down)]
    expected = weighted_sum(x, weights, chosen, *plain)
    assert (found.double().cpu() - expected).abs().max() / expected.abs().max() < 1e-5


def test_fp8_in_blocks(device: torch.device) -> None:
    """With a scale for each row and every 64 inputs, of which the last have fewer. A GPU that does not read fp8 is told
    so by `grouped_reason`."""
    if device.type == "cuda" and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("needs a GPU that reads fp8")
    tokens, each, count, hidden, inner = 20, 2, 4, 96, 64

    def quantized(rows: int, depth: int) -> QuantizedWeight:
        values = torch.randn(rows, depth).to(torch.float8_e4m3fn)
        return QuantizedWeight("fp8", values, torch.rand(rows, -(-depth // 64)) + 0.5, group=64)

    gate_up, down = quantized(count * 2 * inner, hidden), quantized(count * hidden, inner)
    x, weights, chosen = torch.randn(tokens, hidden), torch.rand(tokens, each), drawn(tokens, each, count, "random")
    found = moe.mixture(x, weights, chosen, moe.stack(gate_up, count), moe.stack(down, count))
    plain = [w.dequantize().view(count, -1, w.values.shape[1]) for w in (gate_up, down)]
    expected = weighted_sum(x, weights, chosen, *plain)
    assert (found.double().cpu() - expected).abs().max() / expected.abs().max() < 1e-5


def test_a_row_with_nan_harms_no_other() -> None:
    count, hidden, inner = 3, 32, 16
    gate_up, down = torch.randn(count * 2 * inner, hidden), torch.randn(count * hidden, inner)
    stacks = moe.stack(gate_up, count), moe.stack(down, count)
    x, weights, chosen = torch.randn(9, hidden), torch.rand(9, 2), drawn(9, 2, count, "random")
    sound = moe.mixture(x, weights, chosen, *stacks)
    x[4] = torch.nan
    found = moe.mixture(x, weights, chosen, *stacks)
    others = [n for n in range(9) if n != 4]
    assert torch.equal(found[others], sound[others])
    assert found[4].isnan().all()


def test_in_a_whole_model(experts: Make, monkeypatch: pytest.MonkeyPatch, device: torch.device) -> None:
    """Where the looped experts stand in the same model, the grouped ones give the same text."""
    from checkpoints import greedy, prompt
    from driver import Driver
    from ropeway.config import EngineConfig
    from ropeway.runtime.local import LocalExecutor
    from ropeway.runtime.models import mixture

    monkeypatch.setattr(mixture, "grouped_reason", lambda device, weights=(): None)
    with torch.device("cpu"):
        directory, asked = experts("deepseek-v3"), prompt(9, 6)
        expected = greedy(directory, asked, 2)
        config = EngineConfig(
            model=str(directory), dtype="float32", device=device.type, threads=1, num_kv_blocks=8, block_size=8,
            max_num_seqs=2, max_model_len=32,
        )  # fmt: skip
        d = Driver(LocalExecutor(config))
        assert "grouped by Triton" in " ".join(d.executor.info.notes)
        line = d.add(asked)
        d.run([line], 2)
    assert line.output == expected


def test_compiles(tmp_path: Path) -> None:
    """To machine code for a GPU that is not there: the interpreter accepts more than the compiler."""
    beside = {"_route_kernel", "_order_kernel", "_combine_kernel"}
    kernels = {
        "qwen3-30b-int4": {*beside, "_int4_kernel"},
        "deepseek-v3": {*beside, "_expert_kernel"},
        "latents": {"_fill_kernel"},
    }
    products = {"_expert_kernel", "_int4_kernel"}
    assert compiled("compile_moe.py", *kernels, "90", folder=tmp_path, products=products) == kernels
