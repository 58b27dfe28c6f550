"""The evidence: what continuous batching and its parts gain on this machine, beside what articles claim.

    python benchmarks/evidence                              # bundled model and a random one of 360M parameters
    python benchmarks/evidence --models bundled --only batching,chunks --out build/evidence
    python benchmarks/evidence --quick --out build/evidence # small: to see that all of it works

Writes a page with pictures for each model to --out (docs/evidence, unless only a part is run), and a page with the
claims. Nothing else should run meanwhile.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from chapter import Chapter
from claims import table
from environment import ROOT, machine
from experiments import ALL, Scale
from loop import ROUNDS, Bench
from streaming import streaming

from ropeway.hub import locate
from ropeway.modelspec import load_spec

BUNDLED = Scale(seats=64, prompt=64, unit=24, long=400, count=64, vocab=4000)
LARGE = Scale(seats=16, prompt=64, unit=8, long=512, count=32, vocab=30000)
QUICK = Scale(seats=16, prompt=16, unit=8, long=64, count=16, vocab=4000)
STREAMING = "streaming"


def random_model(folder: Path) -> Path:
    """A Llama of 360 million parameters with random weights: as costly as a trained one, and nothing to download."""
    path = folder / "random-360m"
    if not (path / "config.json").exists():
        command = [sys.executable, str(ROOT / "benchmarks/cpu/peers/make_models.py"), str(folder), "S"]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        (folder / "S").rename(path)
    return path


def main() -> None:
    names = [*ALL, STREAMING]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default="bundled,random", help="bundled, random, or directories, by commas")
    parser.add_argument("--only", default=",".join(names), help=f"experiments, by commas: {', '.join(names)}")
    parser.add_argument("--out", type=Path, help="directory to write to; the default is for whole pages alone")
    parser.add_argument("--quick", action="store_true", help="small runs, whose figures mean little")
    options = parser.parse_args()
    wanted = options.only.split(",")
    if unknown := [name for name in wanted if name not in names]:
        parser.error(f"there is no experiment {', '.join(unknown)}")
    if options.out is None and (options.quick or set(wanted) != set(names)):
        parser.error("--only and --quick need an --out: docs/evidence has whole pages alone")
    out: Path = options.out or ROOT / "docs" / "evidence"
    out.mkdir(parents=True, exist_ok=True)
    found: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as scratch:
        for name in options.models.split(","):
            model = str(random_model(Path(scratch))) if name == "random" else name
            scale = QUICK if options.quick else BUNDLED if name == "bundled" else LARGE
            label = Path(name).name
            found[label] = page(label, model, name, scale, wanted, out, scratch)
    summary({**earlier(out, quick=options.quick), **found}, out, quick=options.quick)


def earlier(out: Path, *, quick: bool) -> dict[str, dict[str, float]]:
    """The figures of models that were measured before, on this machine, with the same versions, and as well as now."""
    path = out / "figures.json"
    written = json.loads(path.read_text()) if path.exists() else {}
    same = written.get("machine") == machine() and written.get("quick") == quick
    models: dict[str, dict[str, float]] = written["models"] if same else {}
    return models


def heading(label: str, figures: dict[str, float]) -> str:
    """What a model is called on the pages."""
    size = f"{figures['parameters'] / 1e6:.1f}M"
    names = {"bundled": f"the bundled model ({size})", "random": f"{size}, random weights"}
    return names.get(label, f"{label} ({size})")


def page(
    label: str, model: str, asked: str, scale: Scale, wanted: list[str], out: Path, scratch: str
) -> dict[str, float]:
    """Run the experiments on one model, which was `asked` for by that name, and write its page. Returns all figures."""
    spec = load_spec(locate(model), model)
    bench = Bench(model, kv_cache_gib=1.0)
    figures: dict[str, float] = {"parameters": spec.parameters}
    lines = [
        f"# Evidence: {heading(label, figures)}",
        "",
        f"{spec.parameters:,} parameters. {machine()}. {time.strftime('%Y-%m-%d')}.",
        "",
    ]
    for name, (title, experiment) in ALL.items():
        if name in wanted:
            chapter = Chapter(
                title,
                f"python benchmarks/evidence --models {asked} --only {name} --out build/evidence",
                folder=out,
                stem=f"{label}-{name}",
            )
            begun = time.perf_counter()
            experiment(bench, scale, chapter)
            lines += written(chapter)
            figures |= chapter.figures
            print(f"{label}: {name}, {time.perf_counter() - begun:.0f} s", file=sys.stderr)
    if STREAMING in wanted:
        chapter = Chapter(
            "Streams, whole answers, batches",
            f"python benchmarks/evidence --models {asked} --only {STREAMING} --out build/evidence",
            folder=out,
        )
        streaming(model, scale, chapter, f"{scratch}/data-{label}")
        lines += written(chapter)
        figures |= chapter.figures
    (out / f"{label}.md").write_text("\n".join(lines).rstrip() + "\n")
    return figures


def written(chapter: Chapter) -> list[str]:
    return [
        f"## {chapter.title}",
        "",
        *chapter.lines,
        f"<!-- not run: takes minutes -->\n```sh\n{chapter.command}\n```",
        "",
    ]


def summary(found: dict[str, dict[str, float]], out: Path, *, quick: bool) -> None:
    lines = ["# Evidence", "", f"{machine()}. {time.strftime('%Y-%m-%d')}.", ""]
    lines += ["`make evidence` writes these pages, on a machine that does nothing else meanwhile.", ""]
    if quick:
        lines += ["**Made with `--quick`: these figures show that the experiments run, and nothing else.**", ""]
    headings = {label: heading(label, figures) for label, figures in found.items()}
    pages = [f"[{name}]({label}.md)" for label, name in headings.items()]
    if (out / "soak.md").exists():
        pages.append("[half an hour of everything at once](soak.md)")
    lines += ["Pages: " + ", ".join(pages) + ".", ""]
    lines += [
        "## What articles claim",
        "",
        "Claims are the round figures that introductions to continuous batching quote. A figure with brackets is the "
        f"median of {ROUNDS} rounds in turn, beside the least and the greatest.",
        "",
        *table({headings[label]: figures for label, figures in found.items()}),
    ]
    (out / "index.md").write_text("\n".join(lines).rstrip() + "\n")
    (out / "figures.json").write_text(
        json.dumps({"machine": machine(), "quick": quick, "models": found}, indent=1) + "\n"
    )


if __name__ == "__main__":
    main()
