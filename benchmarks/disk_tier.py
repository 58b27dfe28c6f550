"""What the disk tier saves after a restart: milliseconds to the first token of a prompt that was asked before.

    python benchmarks/disk_tier.py [MODEL] [--tokens 400] [--rounds 5] [--threads N]

Each round computes a random prompt on an engine with an empty file, ends it, and asks the same of a new engine on the
same file: once with the file still in the system's cache, as after a crash of the process, and once with it dropped
from there (which needs no privileges, but a file system that listens), as after a restart of the machine. Each engine
answers another prompt first. Printed are medians of the rounds.
"""

from __future__ import annotations

import argparse
import os
import random
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from ropeway import LLM, SamplingParams

_ONE = SamplingParams(max_tokens=1, temperature=0.0)


class Ways:
    """One prompt after the other, each computed and then fetched."""

    def __init__(self, model: str, tokens: int, threads: int | None) -> None:
        self._model, self._tokens, self._threads = model, tokens, threads
        self._draw = random.Random(0)

    def round(self) -> list[float]:
        """Seconds to the first token: computed, fetched, fetched from a cold file."""
        prompt = self._prompt()
        with tempfile.TemporaryDirectory() as folder:
            took = [self._first(folder, prompt, found=False), self._first(folder, prompt, found=True)]
            for file in Path(folder).rglob("*"):
                if file.is_file():
                    _drop(file)
            return [*took, self._first(folder, prompt, found=True)]

    def _first(self, folder: str, prompt: list[int], *, found: bool) -> float:
        threads: dict[str, Any] = {} if self._threads is None else {"threads": self._threads}
        with LLM(self._model, kv_disk_gib=1.0, kv_disk_path=folder, **threads) as llm:
            llm.generate({"prompt_token_ids": self._prompt()}, _ONE, use_tqdm=False)
            begun = time.perf_counter()
            (answer,) = llm.generate({"prompt_token_ids": prompt}, _ONE, use_tqdm=False)
            seconds = time.perf_counter() - begun
            most = (len(prompt) - 1) // llm.config.block_size * llm.config.block_size
            assert answer.num_cached_tokens == (most if found else 0), answer.num_cached_tokens
            return seconds

    def _prompt(self) -> list[int]:
        return [self._draw.randrange(256) for _ in range(self._tokens)]


def _drop(file: Path) -> None:
    with file.open("rb") as opened:
        os.fsync(opened.fileno())
        os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="bundled")
    parser.add_argument("--tokens", type=int, default=400)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int)
    options = parser.parse_args()
    ways = Ways(options.model, options.tokens, options.threads)
    took = [
        statistics.median(times) * 1e3 for times in zip(*(ways.round() for _ in range(options.rounds)), strict=True)
    ]
    print("| model, prompt | computed (ms) | from disk after a restart | the system's file cache emptied too |")
    print("|---|---|---|---|")
    print(f"| {Path(options.model).name}, {options.tokens} tokens | {took[0]:,.0f} | {took[1]:,.0f} | {took[2]:,.0f} |")


if __name__ == "__main__":
    main()
