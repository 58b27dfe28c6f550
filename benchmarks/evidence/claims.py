"""What articles about continuous batching say, beside what was measured here."""

from __future__ import annotations

from collections.abc import Callable, Mapping

Figures = Mapping[str, float]


def _times(name: str) -> Callable[[Figures], str]:
    return lambda figures: f"{figures[name]:.1f} x"


def _share(name: str) -> Callable[[Figures], str]:
    return lambda figures: f"{100 * figures[name]:.0f} %"


MEASURED: list[tuple[str, Callable[[Figures], str], str]] = [
    (
        "Continuous batching is 5 to 10 times as fast as static, in practice 5 to 15, by the vLLM paper 10 to 20",
        lambda f: (
            f"{f['speedup_equal']:.2f} (equal) to {f['speedup_most']:.1f} x; like chats {f['speedup_chat']:.1f} x"
        ),
        "It depends on the lengths alone: nothing where all are equal, more the more they differ. The larger figures "
        "compare with engines that also waste memory, or with no batching at all.",
    ),
    (
        "Four times the throughput (15,000 instead of 3,000 tokens/s on an A100)",
        _times("speedup_textbook"),
        "For answers of 50, 100, 200 and 500 tokens the bound from the lengths is 2.35.",
    ),
    (
        "In the example of 50, 100, 200 and 500 tokens, 90 % of the batch is idle",
        lambda f: f"{100 * (1 - f['occupancy_static']):.0f} % idle",
        "It is 57.5 % by arithmetic.",
    ),
    (
        "GPU utilisation of 80 to 95 % instead of 20 to 40 %",
        lambda f: f"{100 * f['occupancy_continuous']:.0f} % of seats instead of {100 * f['occupancy_static']:.0f} %",
        "Seats, not the device's own counter; under a full queue.",
    ),
    (
        "The median latency is like static batching's, the 99th percentile much better",
        lambda f: f"static over continuous: p50 {f['latency_p50']:.1f} x, p99 {f['latency_p99']:.1f} x",
        "With a full queue both are better, since the whole queue moves faster.",
    ),
    (
        "Below 10 requests a second static batching is enough",
        lambda f: f"one request at a time: {f['low_load_ratio']:.2f} x",
        "True in kind: without a second request there is nothing to batch. The rate depends on the machine.",
    ),
    (
        "Streaming makes the perceived latency 60 to 80 % lower and the whole 5 to 15 % longer",
        lambda f: (
            f"first text {100 * (1 - f['stream_first_share']):.0f} % earlier, whole {100 * f['stream_cost']:+.0f} %"
        ),
        "The gain grows with the answer's length.",
    ),
    (
        "Batches have 3 to 10 times the throughput; 25 to 50 requests a minute become 200 to 500",
        lambda f: f"{f['async_gain']:.1f} x many at a time, {f['batch_api_gain']:.1f} x as a batch",
        "The gain is that of the batch's size over one row: it is bound by memory traffic at one row.",
    ),
    (
        "Streaming costs 10 to 15 % of throughput",
        lambda f: f"{100 * (1 - f['stream_throughput']):+.0f} %",
        "Many streams at a time against as many whole answers.",
    ),
    (
        "Paging halves KV memory",
        _share("paging_saves"),
        "Against reserving the longest answer for each request; it depends on how much longer that is than most.",
    ),
    (
        "Hybrid: background work makes 80 to 95 % of an idle machine useful",
        lambda f: f"at 30 % load {100 * f['alone_0.3']:.0f} % alone, {100 * f['backfill_0.3']:.0f} % with it",
        "Of an offline run's tokens.",
    ),
    (
        "Batching of 8 requests costs each little",
        _times("batch_gain_8"),
        "Tokens/s of 8 streams over one; 8 would be free.",
    ),
    (
        "A shared system prompt is computed once",
        _times("prefix_gain"),
        "Sixteen requests in a burst.",
    ),
]
"""Claim, what was measured, and what is to be said of it."""

NOT_HERE = [
    (
        "$4,200 to $680 a month, 84 % cheaper; prices per token of several providers",
        "`ropeway cost` computes it of your prices",
    ),
    ("150 to 1,200 requests a minute after moving to another provider", "says nothing of batching"),
    ("48 ms and 32 ms to the first token of hosted models", "other people's machines"),
    ("4 to 32 pods in 60 s, 60 % cheaper off-peak", "needs a cluster"),
    (
        "10,000 requests a second of a 70B model, p95 below 200 ms",
        "needs a cluster; `ropeway sim` estimates such a fleet",
    ),
    (
        "vLLM 8,000 to 15,000, TGI 4,000 to 6,000, SGLang 12,000 tokens/s",
        "needs their GPUs; [cpu](../cpu.md) compares engines on one CPU",
    ),
]


def table(figures: Figures) -> list[str]:
    """The page's table, in Markdown. A claim whose experiment did not run says so."""
    lines = ["| claim | measured here | |", "|---|---|---|"]
    for claim, measured, note in MEASURED:
        try:
            found = measured(figures)
        except KeyError:
            found = "not run"
        lines.append(f"| {claim} | **{found}** | {note} |")
    lines += ["", "Not measured:", "", "| claim | why |", "|---|---|"]
    lines += [f"| {claim} | {why} |" for claim, why in NOT_HERE]
    return [*lines, ""]
