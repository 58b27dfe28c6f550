"""The experiments that need no server. Each is a function of a `Bench` and its scale."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from chapter import COLORS, Chapter, ms, spread
from loop import ROUNDS, Ask, Bench, Life, Run, percentile

from ropeway.contract import Urgency


@dataclass(frozen=True)
class Scale:
    """How much work a model gets: `seats` at most, `prompt` tokens of a usual prompt, `unit` tokens of a short answer,
    `long` of a prompt that disturbs others, `count` requests of a usual run."""

    seats: int
    prompt: int
    unit: int
    long: int
    count: int
    vocab: int


def prompts(scale: Scale, count: int, length: int, seed: int) -> list[list[int]]:
    rng = np.random.default_rng(seed)
    return rng.integers(3, scale.vocab, size=(count, length)).tolist()  # type: ignore[no-any-return]


def textbook(scale: Scale) -> list[int]:
    """The articles' example of 50, 100, 200 and 500 tokens, in the model's own units."""
    return [length * scale.unit // 50 for length in (50, 100, 200, 500)]


def mixes(scale: Scale) -> dict[str, list[int]]:
    """Answer lengths by the name of their distribution, `scale.count` each."""
    rng, n, unit = np.random.default_rng(1), scale.count, scale.unit
    example = textbook(scale)
    chat = np.clip(rng.lognormal(0.0, 1.0, n) * 2 * unit, unit / 8, 12 * unit).astype(int)
    return {
        "all equal": [2 * unit] * n,
        ", ".join(map(str, example)): [int(length) for _ in range(n // 4) for length in rng.permutation(example)],
        "uniform": rng.integers(unit // 4, 8 * unit, n).tolist(),
        "like chats": chat.tolist(),
        "one long in sixteen": [10 * unit if i % 16 == 0 else unit // 2 for i in range(n)],
    }


def batching(bench: Bench, scale: Scale, chapter: Chapter) -> None:
    """Static against continuous batching, for several distributions of lengths."""
    rows, seats = [], scale.seats // 4
    example = ", ".join(map(str, textbook(scale)))
    chapter.say(
        f"The same requests, all there at the start, through the same engine on {seats} seats; static batching admits "
        "newcomers when the running batch is empty, and is neither padded nor slowed in any other way. *Bound* is what "
        "follows from the lengths alone: all seat-steps of the static run over those that are needed. Answers alone "
        "are counted: long prompts would bring it nearer to 1. Where a step costs more the more rows it has, as on a "
        "CPU, half-empty steps are cheaper and the ratio stays below the bound. Ratios are static's times over "
        f"continuous batching's: the median of {ROUNDS} rounds in turn, with the least and the greatest. Where all "
        f"lengths are equal they show how well this can be measured here. {example} are the articles' 50, 100, 200 "
        "and 500 at this model's scale, one of each in every four."
    )
    speedups: dict[str, list[float]] = {}
    with bench.both(seats) as serve:
        for name, lengths in mixes(scale).items():
            asks = [Ask(prompt=p, output=n) for p, n in zip(prompts(scale, scale.count, 8, 2), lengths, strict=True)]
            runs = serve(asks)
            used = {how: run.occupancy for how, run in runs[0].items()}
            groups = [lengths[i : i + seats] for i in range(0, len(lengths), seats)]
            bound = sum(max(group) for group in groups) * seats / sum(lengths)
            speedups[name] = [one["static"].seconds / one["continuous"].seconds for one in runs]
            median, tail = (
                [one["static"].latency(share) / one["continuous"].latency(share) for one in runs] for share in (50, 99)
            )
            rows.append(
                (
                    name, f"{100 * used['static']:.0f} %", f"{100 * used['continuous']:.0f} %", f"{bound:.2f}",
                    f"**{spread(speedups[name])}**", spread(median), spread(tail),
                )
            )  # fmt: skip
            if name == example:
                chapter.figures |= {f"occupancy_{how}": share for how, share in used.items()} | {"bound": bound}
                chapter.keep("speedup_textbook", speedups[name])
                chapter.keep("latency_p50", median)
                chapter.keep("latency_p99", tail)
    head = (
        "answer lengths",
        "seats used, static",
        "continuous",
        "bound",
        "speed-up",
        "p50 latency, ratio",
        "p99, ratio",
    )
    chapter.table(head, rows)
    medians = {name: percentile(found, 50) for name, found in speedups.items()}
    chapter.keep("speedup_equal", speedups["all equal"])
    chapter.figures |= {"speedup_most": max(medians.values()), "speedup_chat": medians["like chats"]}

    def paint(axes: Any) -> None:
        axes.barh(list(medians)[::-1], list(medians.values())[::-1], color=COLORS[0])
        axes.axvline(1, color="#888", linewidth=1)
        axes.set_xlabel("continuous over static, output tokens/s")

    chapter.draw("lengths", "Speed-up of continuous over static batching, by distribution of lengths", paint)


def batch_size(bench: Bench, scale: Scale, chapter: Chapter) -> None:
    """What more seats give, and what they cost each stream."""
    sizes = [size for size in (1, 2, 4, 8, 16, 32, 64, 128) if size <= scale.seats]
    output = 2 * scale.unit
    found: list[tuple[int, float, float]] = []
    for size in sizes:
        asks = [Ask(prompt=p, output=output) for p in prompts(scale, size, scale.prompt, 3)]
        run = bench.run(asks, max_num_seqs=size, step_budget_ms=0, enable_prefix_caching=False)
        gaps = [gap for life in run.done for gap in life.gaps[1:]]
        steps = [step for step in run.steps if step.tokens == len(step.riders) == size]
        rate = size * len(steps) / sum(step.end - step.start for step in steps)
        found.append((size, rate, percentile(gaps, 50)))
    chapter.say(
        f"As many streams as seats, {scale.prompt} tokens in and {output} out; rates of steps in which all decode."
    )
    base = found[0][1]
    chapter.table(
        ("seats", "tokens/s", "of one stream's", "between tokens, p50"),
        [(size, f"{rate:,.0f}", f"{rate / base:.1f} x", ms(gap)) for size, rate, gap in found],
    )
    chapter.figures["batch_gain_8"] = {s: r for s, r, _ in found}[8] / base

    def paint(axes: Any) -> None:
        for one, place, label in ((axes[0], 1, "tokens/s, all streams"), (axes[1], 2, "ms between tokens of a stream")):
            values = [row[place] * (1000 if place == 2 else 1) for row in found]
            one.plot(sizes, values, marker="o", color=COLORS[place - 1])
            one.set_xscale("log", base=2)
            one.set_ylim(bottom=0)
            one.set_xlabel("streams")
            one.set_title(label, fontsize=10)

    chapter.draw("seats", "Throughput and gaps by number of streams", paint, columns=2)


def chunks(bench: Bench, scale: Scale, chapter: Chapter) -> None:
    """What long prompts do to streams beside them, by the size of their chunks."""
    sizes = [64, 128, 256, 512, 1024, 2048]
    output = 6 * scale.unit
    streams = [Ask(prompt=p, output=output, kind="stream") for p in prompts(scale, 4, 16, 4)]
    rows, longest, first = [], [], []

    def disturbed(label: str, **settings: Any) -> tuple[float, float]:
        calm = bench.run(streams, max_num_seqs=8, enable_prefix_caching=False)
        every = calm.seconds / 5
        long = [
            Ask(prompt=p, output=4, at=every * (n + 0.7), kind="long")
            for n, p in enumerate(prompts(scale, 4, scale.long, 5))
        ]
        run = bench.run([*streams, *long], max_num_seqs=8, enable_prefix_caching=False, **settings)
        gaps = [gap for life in run.of("stream") for gap in life.gaps]
        waits = [life.ttft for life in run.of("long")]
        rows.append(
            (label, ms(percentile(gaps, 50)), ms(percentile(gaps, 99)), ms(max(gaps)), ms(percentile(waits, 50)))
        )
        return max(gaps), percentile(waits, 50)

    for size in sizes:
        worst, wait = disturbed(f"{size} tokens", max_num_batched_tokens=size, step_budget_ms=0)
        longest.append(worst)
        first.append(wait)
    disturbed("by time (the default)", max_num_batched_tokens=2048)
    chapter.say(
        f"Four streams decode while four prompts of {scale.long} tokens come one after another. A step carries at most "
        "so many tokens; the last row sizes chunks by measured step times instead."
    )
    chapter.table(("most tokens in a step", "gap p50", "gap p99", "longest gap", "long prompt's first token"), rows)

    def paint(axes: Any) -> None:
        axes.plot(sizes, [g * 1000 for g in longest], marker="o", color=COLORS[1], label="longest gap of the streams")
        axes.plot(sizes, [f * 1000 for f in first], marker="o", color=COLORS[0], label="first token of a long prompt")
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xlabel("most tokens in a step")
        axes.set_ylabel("ms")
        axes.legend(frameon=False)

    chapter.draw("chunks", "Gaps and first tokens by the size of chunks", paint)


def prefix(bench: Bench, scale: Scale, chapter: Chapter) -> None:
    """What a common beginning of prompts is worth."""
    shared, own = prompts(scale, 1, scale.long, 6)[0], prompts(scale, 16, 16, 7)
    asks = [Ask(prompt=shared + tail, output=8) for tail in own]
    rows = []
    runs: dict[str, Run] = {}
    for name, on in (("without cache", False), ("with cache", True)):
        runs[name] = run = bench.run(asks, max_num_seqs=16, enable_prefix_caching=on)
        waits = [life.ttft for life in run.done]
        rows.append(
            (name, ms(percentile(waits, 50)), ms(percentile(waits, 99)), f"{run.seconds:.2f} s", f"{run.cached:,}")
        )
    chapter.say(
        f"Sixteen requests at once, whose prompts begin with the same {scale.long} tokens and end with 16 of their own."
    )
    chapter.table(("", "first token, p50", "p99", "all done after", "tokens found"), rows)
    gain = runs["without cache"].seconds / runs["with cache"].seconds
    chapter.figures["prefix_gain"] = gain
    chapter.say(f"The whole is **{gain:.1f} times** as fast.")


def memory(bench: Bench, scale: Scale, chapter: Chapter) -> None:
    """What paging saves over reserving each request's longest length."""
    lengths = mixes(scale)["like chats"]
    longest, size = 16 * scale.unit, 16
    needed = sum(lengths) + scale.prompt * len(lengths)
    paged = sum(-(-(n + scale.prompt) // size) * size for n in lengths)
    reserved = (longest + scale.prompt) * len(lengths)
    chapter.say(
        f"By arithmetic, from drawn lengths, not from a run: KV memory for {len(lengths)} chats of {scale.prompt} "
        f"tokens in, which may have {longest} out and have {np.mean(lengths):.0f} on average, at their ends:"
    )
    chapter.table(
        ("way", "tokens of KV", "of what is needed"),
        [
            ("needed", needed, "1.00"),
            ("blocks of 16 tokens", paged, f"{paged / needed:.2f}"),
            ("the longest length reserved for each", reserved, f"{reserved / needed:.2f}"),
        ],
    )
    chapter.figures["paging_saves"] = 1 - paged / reserved


def preemption(bench: Bench, scale: Scale, chapter: Chapter) -> None:
    """What it costs to have too little memory, by the way in which requests are put back."""
    output = 5 * scale.unit
    asks = [Ask(prompt=p, output=output) for p in prompts(scale, 24, scale.prompt, 8)]
    each = -(-(scale.prompt + output) // 16)
    rows = []
    for name, settings in {
        "enough memory": {"num_kv_blocks": 16 * each + 16},
        "a third of it, recompute": {"num_kv_blocks": 5 * each, "preemption_mode": "recompute"},
        "a third of it, swap": {"num_kv_blocks": 5 * each, "preemption_mode": "swap", "kv_host_gib": 0.5},
        "a third of it, auto": {"num_kv_blocks": 5 * each, "preemption_mode": "auto", "kv_host_gib": 0.5},
    }.items():
        run = bench.run(asks, max_num_seqs=16, **settings)  # type: ignore[arg-type]
        rows.append(
            (name, f"{run.output_rate:,.0f}", run.preemptions, ms(percentile([w.latency for w in run.done], 99)))
        )
    chapter.say(f"Twenty-four requests of {scale.prompt} tokens in and {output} out on 16 seats.")
    chapter.table(("KV memory", "output tokens/s", "put back", "latency p99"), rows)


def orders(bench: Bench, scale: Scale, chapter: Chapter) -> None:
    """Who boards first, when more arrive than can be served at once."""
    rng = np.random.default_rng(9)
    short, long = prompts(scale, 36, 16, 10), prompts(scale, 12, scale.long, 11)
    asks = [Ask(prompt=p, output=scale.unit, kind="short") for p in short]
    asks += [Ask(prompt=p, output=scale.unit, kind="long") for p in long]
    asks = [asks[i] for i in rng.permutation(len(asks))]
    rows = []
    for policy in ("fcfs", "sjf", "hrrn"):
        run = bench.run(asks, max_num_seqs=8, scheduling_policy=policy, enable_prefix_caching=False)
        waits = {kind: [life.ttft for life in run.of(kind)] for kind in ("short", "long")}
        every = waits["short"] + waits["long"]
        rows.append((policy, *(ms(percentile(values, p)) for values, p in (
            (every, 50), (every, 99), (waits["short"], 50), (waits["long"], 50),
        ))))  # fmt: skip
    chapter.say(
        f"Thirty-six short prompts and twelve of {scale.long} tokens, all at once, on eight seats. "
        "[The policy study](../policies.md) has real traces and every policy."
    )
    chapter.table(("policy", "first token, p50", "p99", "short prompts, p50", "long prompts, p50"), rows)


def background(bench: Bench, scale: Scale, chapter: Chapter) -> None:
    """What idle seats are worth: the same chats alone, and beside an endless backlog."""
    rng = np.random.default_rng(12)
    seats, output = scale.seats // 4, 2 * scale.unit
    full = bench.run(
        [Ask(prompt=p, output=output) for p in prompts(scale, 2 * seats, scale.prompt, 13)], max_num_seqs=seats
    )
    capacity = len(full.done) / full.seconds
    rows = []
    for load in (0.3, 0.6):
        count = max(24, scale.count // 2)
        times = np.cumsum(rng.exponential(1 / (load * capacity), count))
        chats = [
            Ask(prompt=p, output=output, at=float(t), kind="chat")
            for p, t in zip(prompts(scale, count, scale.prompt, 14), times, strict=True)
        ]
        backlog = [
            Ask(prompt=p, output=output, urgency=Urgency.LOW, kind="backlog")
            for p in prompts(scale, int(3 * capacity * times[-1]) + 2 * seats, scale.prompt, 15)
        ]

        def enough(run: Run, count: int = count) -> bool:
            return sum(life.finish is not None for life in run.lives[:count]) == count

        alone = bench.run(chats, max_num_seqs=seats)
        beside = bench.run([*chats, *backlog], max_num_seqs=seats, until=enough)
        seen = [_seen(run.of("chat")) for run in (alone, beside)]
        rows.append(
            (
                f"{load:.0%}", *(f"{ms(a)} / {ms(b)}" for a, b in zip(*seen, strict=True)),
                f"{alone.output_rate / full.output_rate:.0%}", f"{beside.output_rate / full.output_rate:.0%}",
            )
        )  # fmt: skip
        chapter.figures[f"backfill_{load:.1f}"] = beside.output_rate / full.output_rate
        chapter.figures[f"alone_{load:.1f}"] = alone.output_rate / full.output_rate
    chapter.say(
        f"Chats of {scale.prompt} tokens in and {output} out come at random, at a share of what {seats} seats can do; "
        "then the same beside an endless backlog of urgency LOW. Tokens are a share of those of an offline run. "
        "[Back-fill](../backfill.md) has more of it."
    )
    chapter.table(
        ("load", "first token p99, alone / beside", "gap p99, alone / beside", "tokens alone", "tokens beside"), rows
    )


def _seen(lives: Sequence[Life]) -> tuple[float, float]:
    return percentile([life.ttft for life in lives], 99), percentile([gap for life in lives for gap in life.gaps], 99)


def low_load(bench: Bench, scale: Scale, chapter: Chapter) -> None:
    """One request at a time: static and continuous batching are the same."""
    output = 2 * scale.unit
    alone = [Ask(prompt=prompts(scale, 1, scale.prompt, 16)[0], output=output)]
    with bench.both(8) as serve:
        pause = 1.3 * serve(alone)[-1]["continuous"].seconds
        runs = serve(
            [Ask(prompt=p, output=output, at=n * pause) for n, p in enumerate(prompts(scale, 16, scale.prompt, 17))]
        )
    rows = []
    for how in ("static", "continuous"):
        lives = [life for one in runs for life in one[how].done]
        waits = ([life.ttft for life in lives], [life.latency for life in lives])
        rows.append((how, *(ms(percentile(seconds, 50)) for seconds in waits)))
    ratio = chapter.keep("low_load", [one["static"].latency(50) / one["continuous"].latency(50) for one in runs])
    chapter.say(
        f"Sixteen requests that come one after the other, one every {ms(pause)}, each done before the next comes, in "
        f"{ROUNDS} rounds in turn."
    )
    chapter.table(("batching", "first token, p50", "latency, p50"), rows)
    chapter.say(f"Latency of static over that of continuous batching: {ratio}.")


ALL = {
    "batching": ("Static against continuous batching", batching),
    "low-load": ("Where batching does not matter", low_load),
    "batch-size": ("The size of the batch", batch_size),
    "chunks": ("Chunks of long prompts, and gaps", chunks),
    "prefix": ("The prefix cache", prefix),
    "memory": ("Memory in blocks", memory),
    "preemption": ("Too little memory", preemption),
    "orders": ("Who boards first", orders),
    "background": ("Idle seats", background),
}
"""Title and function of each, by name, in the order of the page."""
