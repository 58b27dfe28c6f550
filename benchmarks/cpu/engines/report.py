"""From runs to the table and the picture: medians, spreads, ratios to the best peer and shares of the limit."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from conductor import DISTURBED
from contenders import COLUMNS, WEIGHT_BYTES
from workloads import Shape, bound, make

OWN = "ropeway"
Key = tuple[str, str]
"""(model, workload)"""


def figure(run: Mapping[str, Any]) -> float:
    """What counts of a run: tokens/s after the first token of a single stream, else of all output."""
    return float(run["decode"] or run["output"])


def limit(run: Mapping[str, Any], column: str, shape: Shape) -> float:
    """The bound of what counts, by the rates that the machine had right before this run.

    Arithmetic may be done in any type that is at least as wide as the weights, so the fastest of those counts.
    """
    rates = run["machine"]
    types = ("float32", "bfloat16", *(("int8",) if column != "bf16" else ()))
    peak = max(rates[name] for name in types if name in rates)
    job = make(run["workload"], shape.vocab, run["round"])
    found = bound(shape, job, WEIGHT_BYTES[column], rates["read"], peak)
    return found.decode if run["decode"] else found.output


@dataclass(frozen=True)
class Cell:
    """One contender in one workload: `spread` is half the range over the median, `share` the median share of each
    run's own limit."""

    median: float
    spread: float
    share: float
    runs: int

    @classmethod
    def of(cls, values: Sequence[float], shares: Sequence[float]) -> Cell:
        middle = median(values)
        return cls(middle, (max(values) - min(values)) / 2 / middle, median(shares), len(values))


@dataclass(frozen=True)
class Table:
    """All contenders of one column of precision."""

    column: str
    keys: list[Key]
    rows: dict[str, dict[Key, Cell]]
    limits: dict[Key, float]

    def best_peer(self, key: Key) -> float | None:
        found = [c[key].median for name, c in self.rows.items() if not name.startswith(OWN) and key in c]
        return max(found, default=None)

    def ratio(self, key: Key) -> float | None:
        own = [c[key].median for name, c in self.rows.items() if name.startswith(OWN) and key in c]
        peer = self.best_peer(key)
        return max(own) / peer if own and peer else None


def calm(results: Mapping[str, Any]) -> tuple[dict[str, Any], int]:
    """The results without the runs during which others kept the machine busy, and how many those are."""
    kept = {kind: [run for run in results[kind] if run["others"] < DISTURBED] for kind in ("runs", "online")}
    return {**results, **kept}, sum(len(results[kind]) - len(kept[kind]) for kind in kept)


def tables(results: Mapping[str, Any], shapes: Mapping[str, Shape]) -> list[Table]:
    columns = {c["name"]: c["column"] for c in results["contenders"]}
    found = []
    for column in COLUMNS:
        values: dict[tuple[str, Key], list[float]] = defaultdict(list)
        limits: dict[tuple[str, Key], list[float]] = defaultdict(list)
        for run in results["runs"]:
            if columns.get(run["contender"]) == column:
                cell = (run["contender"], (run["model"], run["workload"]))
                values[cell].append(figure(run))
                limits[cell].append(limit(run, column, shapes[run["model"]]))
        if not values:
            continue
        rows: dict[str, dict[Key, Cell]] = defaultdict(dict)
        at_best: dict[Key, list[float]] = defaultdict(list)
        for (name, key), figures in values.items():
            shares = [f / most for f, most in zip(figures, limits[name, key], strict=True)]
            rows[name][key] = Cell.of(figures, shares)
            at_best[key] += limits[name, key]
        keys = sorted(at_best, key=lambda key: (list(shapes).index(key[0]), key[1]))
        found.append(Table(column, keys, dict(rows), {key: median(most) for key, most in at_best.items()}))
    return found


def _line(cells: Iterable[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def markdown(table: Table) -> str:
    """Output tokens/s (W3: after the first token), the spread in percent, and the share of the limit in brackets."""

    def show(cell: Cell | None) -> str:
        if cell is None:
            return ""
        return f"{cell.median:.3g} ±{100 * cell.spread:.0f} % ({100 * cell.share:.0f} %)"

    heads = [f"{model} {workload}{' decode' if workload == 'W3' else ''}" for model, workload in table.keys]
    lines = [_line([table.column, *heads]), _line(["---"] * (1 + len(heads)))]
    for name, cells in table.rows.items():
        lines.append(_line([name, *(show(cells.get(key)) for key in table.keys)]))
    lines.append(_line(["limit", *(f"{table.limits[key]:.3g}" for key in table.keys)]))
    ratios = [table.ratio(key) for key in table.keys]
    lines.append(_line(["**Ropeway / best peer**", *(f"**{r:.2f} x**" if r else "" for r in ratios)]))
    return "\n".join(lines)


def start_markdown(results: Mapping[str, Any]) -> str:
    """Start-up and memory of every contender, over all its runs."""
    lines = [_line(["", "version", "start-up to first token, s", "private MiB", "resident MiB"]), _line(["---"] * 5)]
    groups: dict[tuple[str, str], list[Any]] = defaultdict(list)
    for run in results["runs"]:
        groups[run["model"], run["contender"]].append(run)
    for (model, name), runs in groups.items():
        start = median(run["startup"] for run in runs)
        peaks = [str(max(run[field] for run in runs)) for field in ("private_mib", "resident_mib")]
        lines.append(_line([f"{model} {name}", str(runs[-1]["version"]), f"{start:.1f}", *peaks]))
    return "\n".join(lines)


def online_markdown(results: Mapping[str, Any]) -> str:
    """Servers under the Poisson load; medians over the rounds, latencies in ms."""
    fields = ("output", "ttft_p50", "ttft_p99", "itl_p50", "itl_p99", "tpot_p50", "tpot_p99")
    heads = ["W4", "requests/s", "completed", "tokens/s", *(f.replace("_", " ") + ", ms" for f in fields[1:])]
    lines = [_line(heads), _line(["---"] * len(heads))]
    groups: dict[tuple[str, str, float], list[Any]] = defaultdict(list)
    for run in results["online"]:
        groups[run["model"], run["contender"], run["rate"]].append(run)
    for (model, name, rate), runs in sorted(groups.items()):
        done = f"{sum(r['completed'] for r in runs)} of {sum(r['offered'] for r in runs)}"
        middle = [f"{median(run[field] for run in runs):.0f}" for field in fields]
        lines.append(_line([f"{model} {name}", f"{rate:g}", done, *middle]))
    return "\n".join(lines)


def draw(found: Sequence[Table], path: Path) -> None:
    """Bars of tokens/s for each workload, one panel a model and column; a line marks the limit. Needs matplotlib."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise SystemExit("The picture needs matplotlib: pip install 'ropeway[plots]'.") from None
    models = list(dict.fromkeys(model for table in found for model, _ in table.keys))
    drawing = Figure(figsize=(4.2 * len(found), 2.9 * len(models)), layout="constrained")
    FigureCanvasAgg(drawing)
    for down, model in enumerate(models):
        for across, table in enumerate(found):
            keys = [key for key in table.keys if key[0] == model]
            if not keys:
                continue
            axes = drawing.add_subplot(len(models), len(found), down * len(found) + across + 1)
            names = [name for name, cells in table.rows.items() if any(key in cells for key in keys)]
            width = 0.84 / max(1, len(names))
            for number, name in enumerate(names):
                places = [(i, table.rows[name][key]) for i, key in enumerate(keys) if key in table.rows[name]]
                axes.bar(
                    [i - 0.42 + width * (number + 0.5) for i, _ in places],
                    [cell.median / table.limits[keys[i]] for i, cell in places],
                    width * 0.92,
                    yerr=[cell.spread * cell.median / table.limits[keys[i]] for i, cell in places],
                    label=name,
                    color="#2a6f97"
                    if name.startswith(OWN)
                    else ("#c9ccd1", "#a9adb5", "#878d98", "#656b77", "#474c57")[number % 5],
                )
            axes.axhline(1.0, color="#e07a5f", linewidth=1)
            axes.set_xticks(range(len(keys)), [f"{w} ({table.limits[model, w]:.0f}/s)" for _, w in keys], fontsize=8)
            axes.set_title(f"{model}, {table.column}", loc="left", fontsize=10)
            axes.set_ylim(0, 1.1)
            axes.tick_params(axis="y", labelsize=8)
            axes.legend(fontsize=6, frameon=False)
            for side in ("top", "right"):
                axes.spines[side].set_visible(False)
    drawing.suptitle("Share of what this machine's memory and arithmetic allow (in brackets, tokens/s)", fontsize=10)
    path.parent.mkdir(parents=True, exist_ok=True)
    drawing.savefig(path, dpi=130)
