"""Kernels compiled for a GPU that is not there, in a process of its own: in this one Triton may interpret them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import defaultdict
from collections.abc import Set
from pathlib import Path

HERE = Path(__file__).parent


def compiled(script: str, *arguments: str, folder: Path, products: Set[str]) -> dict[str, set[str]]:
    """The kernels of each case that `script` has compiled, into `folder`. Each fits the memory of its GPU, and just the
    `products` use tensor cores."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(folder)
    done = subprocess.run(
        [sys.executable, str(HERE / script), *arguments], capture_output=True, text=True, env=environment, check=False
    )
    assert done.returncode == 0, done.stderr[-4000:]
    found: defaultdict[str, set[str]] = defaultdict(set)
    for kernel in map(json.loads, done.stdout.splitlines()):
        assert kernel["shared"] <= kernel["limit"], kernel
        assert kernel["tensor_cores"] == (kernel["kernel"] in products), kernel
        found[kernel["case"]].add(kernel["kernel"])
    return dict(found)
