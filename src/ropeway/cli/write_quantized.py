"""What `quantize` does: check, quantize layer by layer, and say what was written."""

from __future__ import annotations

import time
from pathlib import Path

from ropeway.cli.progress import counting
from ropeway.errors import ConfigError
from ropeway.hub import locate
from ropeway.modelspec import load_spec
from ropeway.runtime.memory import gib
from ropeway.runtime.weights import export
from ropeway.runtime.weights.quant import rounding


def run(model: str, out: Path, format: str, group: int, *, revision: str | None, download_dir: str | None) -> None:
    if group not in (32, 64, 128):
        raise ConfigError(f"group is {group}; it must be 32, 64 or 128.", param="group")
    begun = time.perf_counter()
    spec = load_spec(locate(model, revision=revision, download_dir=download_dir), model, "native")

    with counting("layers", len(spec.modules)) as done:
        files = export.write_quantized(spec, out, format, group, rounding(format, group), done)
    size = sum(file.stat().st_size for file in files)
    before = sum(file.stat().st_size for file in spec.directory.glob("*.safetensors"))
    seconds = time.perf_counter() - begun
    print(
        f"{out}: {format}, {gib(size)} in {len(files)} file{'s'[: len(files) != 1]}, was {gib(before)}, {seconds:.1f} s"
    )
    print(f"Try it: ropeway perplexity {out} --against {model}; ropeway serve {out}")
