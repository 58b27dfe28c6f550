"""What introductions to continuous batching say, beside what was measured here."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from chapter import spread

Figures = Mapping[str, float]


def _times(name: str) -> Callable[[Figures], str]:
    return lambda figures: f"{figures[name]:.1f} x"


def _rounds(figures: Figures, name: str, form: Callable[[float], str] = "{:.2f}".format) -> str:
    """A figure that was kept of several rounds."""
    return spread([figures[name], figures[f"{name}_least"], figures[f"{name}_most"]], form)


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %"


def _more(ratio: float) -> str:
    """By how much, in per cent."""
    return f"{100 * (ratio - 1):+.0f}"


MEASURED: list[tuple[str, Callable[[Figures], str], str]] = [
    (
        "Continuous batching is 5 to 10 times as fast as static, in practice 5 to 15, vLLM 10 to 20",
        lambda f: (
            f"{_rounds(f, 'speedup_equal')} x where all are equal, like chats {f['speedup_chat']:.2f} x, "
            f"at best {f['speedup_most']:.2f} x"
        ),
        "The bound depends on the lengths alone: nothing where all are equal, more the more they differ. The larger "
        "figures compare with engines that also waste memory, or with no batching at all; vLLM's own paper (Kwon et "
        "al. 2023) says 2 to 4 times.",
    ),
    (
        "Four times the throughput (15,000 instead of 3,000 tokens/s on an A100)",
        lambda f: f"{_rounds(f, 'speedup_textbook')} x, with a bound of {f['bound']:.2f} from the lengths",
        "For answers in the ratio of 50, 100, 200 and 500 tokens.",
    ),
    (
        "In the example of 50, 100, 200 and 500 tokens, 90 % of the batch is idle",
        lambda f: f"{_percent(1 - f['occupancy_static'])} idle, by arithmetic {100 * (1 - 1 / f['bound']):.1f} %",
        "Of the seat-steps of the static run.",
    ),
    (
        "GPU utilisation of 80 to 95 % instead of 20 to 40 %",
        lambda f: f"{_percent(f['occupancy_continuous'])} of seats instead of {_percent(f['occupancy_static'])}",
        "Seats, not the device's own counter; under a full queue.",
    ),
    (
        "The median latency is like static batching's, the 99th percentile much better",
        lambda f: f"static over continuous: p50 {_rounds(f, 'latency_p50')} x, p99 {_rounds(f, 'latency_p99')} x",
        "With a full queue both are better, since the whole queue moves faster.",
    ),
    (
        "Below 10 requests a second static batching is enough",
        lambda f: f"one request at a time: {_rounds(f, 'low_load')} x",
        "True in kind: without a second request there is nothing to batch. The rate depends on the machine.",
    ),
    (
        "Streaming makes the perceived latency 60 to 80 % lower and the whole 5 to 15 % longer",
        lambda f: f"first text {_percent(1 - f['first_of_whole'])} earlier, whole {_rounds(f, 'stream_time', _more)} %",
        "The gain grows with the answer's length.",
    ),
    (
        "Batches have 3 to 10 times the throughput; 25 to 50 requests a minute become 200 to 500",
        lambda f: f"{f['async_gain']:.1f} x many at a time, {f['batch_api_gain']:.1f} x as a batch",
        "The gain is that of the batch's size over one row: it is bound by memory traffic at one row.",
    ),
    (
        "Streaming costs 10 to 15 % of throughput",
        lambda f: f"throughput {_rounds(f, 'stream_rate', _more)} %",
        "Many streams at a time against as many whole answers.",
    ),
    (
        "Paging halves KV memory",
        lambda f: f"{_percent(f['paging_saves'])} less",
        "By arithmetic, from drawn lengths, not from a run. Against reserving the longest answer for each request; it "
        "depends on how much longer that is than most.",
    ),
    (
        "Hybrid: background work makes 80 to 95 % of an idle machine useful",
        lambda f: "; ".join(
            f"at {_percent(load)} load {_percent(f[f'alone_{load}'])} alone, {_percent(f[f'backfill_{load}'])} with it"
            for load in (0.3, 0.6)
        ),
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


def table(found: Mapping[str, Figures]) -> list[str]:
    """The page's table, in Markdown, with a column for the figures of each model, by its heading."""
    lines = [f"| claim | {' | '.join(found)} | |", "|---" * (len(found) + 2) + "|"]
    for claim, measured, note in MEASURED:
        cells = [f"**{_said(measured, figures)}**" for figures in found.values()]
        lines.append(f"| {claim} | {' | '.join(cells)} | {note} |")
    lines += ["", "Not measured:", "", "| claim | why |", "|---|---|"]
    lines += [f"| {claim} | {why} |" for claim, why in NOT_HERE]
    return [*lines, ""]


def _said(measured: Callable[[Figures], str], figures: Figures) -> str:
    try:
        return measured(figures)
    except KeyError:  # its experiment was not asked for
        return "not run"
