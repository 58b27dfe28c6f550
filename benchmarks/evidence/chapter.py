"""What an experiment writes: a chapter of a page, its pictures, and figures that claims are held against."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

COLORS = ("#2a6f97", "#e07a5f", "#81b29a", "#f2cc8f", "#6d597a", "#b56576")


@dataclass
class Chapter:
    """`figures` by names that `claims.py` knows; `lines` are Markdown."""

    title: str
    command: str
    lines: list[str] = field(default_factory=list)
    figures: dict[str, float] = field(default_factory=dict)
    folder: Path = Path()
    stem: str = ""

    def say(self, *lines: str) -> None:
        self.lines += [*lines, ""]

    def keep(self, name: str, values: Sequence[float]) -> str:
        """Make the median of several rounds a figure, beside it the least and the greatest. Returns their `spread`."""
        self.figures |= {name: median(values), f"{name}_least": min(values), f"{name}_most": max(values)}
        return spread(values)

    def table(self, head: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
        self.lines.append("| " + " | ".join(head) + " |")
        self.lines.append("|" + "---|" * len(head))
        self.lines += ["| " + " | ".join(_cell(cell) for cell in row) + " |" for row in rows]
        self.lines.append("")

    def draw(self, name: str, alt: str, paint: Callable[[Any], None], *, columns: int = 1) -> None:
        """Let `paint` draw on axes, a list of them if there are several `columns`."""
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        figure = Figure(figsize=(9, 3.4), layout="constrained")
        FigureCanvasAgg(figure)
        axes = [figure.add_subplot(1, columns, number + 1) for number in range(columns)]
        paint(axes if columns > 1 else axes[0])
        for one in axes:
            one.spines[["top", "right"]].set_visible(False)
        path = self.folder / f"{self.stem}-{name}.png"
        figure.savefig(path, dpi=130)
        self.say(f"![{alt}]({path.name})")


def spread(values: Sequence[float], form: Callable[[float], str] = "{:.2f}".format) -> str:
    """What several rounds found, in words: the median, and in brackets the least and the greatest."""
    return f"{form(median(values))} ({form(min(values))} to {form(max(values))})"


def _cell(value: object) -> str:
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def ms(seconds: float) -> str:
    return f"{seconds * 1000:,.0f} ms" if seconds >= 0.01 else f"{seconds * 1000:.2g} ms"
