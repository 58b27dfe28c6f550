"""What `quantize` does: check, quantize layer by layer, and say what was written."""

from __future__ import annotations

import time
from pathlib import Path

from ropeway.cli.progress import counting
from ropeway.config import EngineConfig
from ropeway.hub import locate
from ropeway.modelspec import load_spec
from ropeway.runtime.memory import gib
from ropeway.runtime.weights import export
from ropeway.runtime.weights.quant import rounding


def run(config: EngineConfig, out: Path, format: str) -> None:
    """Write the model of `config` to `out` in `format`: int8, int4 or fp8. Raises RopewayError."""
    model, group, begun = config.model, config.quantization_group, time.perf_counter()
    spec = load_spec(locate(model, revision=config.revision, download_dir=config.download_dir), model, "native")

    with counting("layers", len(spec.modules)) as done:
        files = export.write_quantized(spec, out, format, group, rounding(format, group), done)
    size = sum(file.stat().st_size for file in files)
    before = sum(file.stat().st_size for file in spec.directory.glob("*.safetensors"))
    seconds = time.perf_counter() - begun
    print(
        f"{out}: {format}, {gib(size)} in {len(files)} file{'s'[: len(files) != 1]}, was {gib(before)}, {seconds:.1f} s"
    )
    print(f"Try it: ropeway perplexity {out} --against {model}; ropeway serve {out}")
