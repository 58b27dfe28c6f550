"""Choosing tokens: the native sampler against plain torch, for each setting, number of rows and vocabulary.

    python benchmarks/cpu/sampler.py [--threads N] [--logits flat|peaked]

Microseconds a step, for all rows, with all that Python adds. "flat" logits are normal, so that top_p keeps tens of
thousands of tokens: the worst case. "peaked" ones are as a trained model's, rounded as bfloat16 rounds them.
"""

from __future__ import annotations

import argparse
import time

import numpy as np
import torch

from ropeway.contract import SamplingParams
from ropeway.runtime.kernels.library import load
from ropeway.runtime.kernels.ops import TorchOps
from ropeway.runtime.sampler import Sampler, Want
from ropeway.runtime.slots import Slot

SETTINGS = {
    "greedy": SamplingParams(temperature=0.0),
    "temperature": SamplingParams(temperature=0.8),
    "top_k 50": SamplingParams(top_k=50),
    "top_k 5000": SamplingParams(top_k=5000),
    "top_p 0.9": SamplingParams(top_p=0.9),
    "min_p 0.05": SamplingParams(min_p=0.05),
    "top_k 50, top_p 0.9": SamplingParams(top_k=50, top_p=0.9),
    "greedy, three penalties": SamplingParams(
        temperature=0.0, repetition_penalty=1.1, presence_penalty=0.2, frequency_penalty=0.1
    ),
    "100 biases": SamplingParams(logit_bias=dict.fromkeys(range(0, 10000, 100), -1.0)),
}


def wants(sampling: SamplingParams, rows: int) -> list[Want]:
    """Rows with 300 known tokens, of which 200 are output."""
    tokens = np.arange(3, 303, dtype=np.int32)
    return [Want(Slot(0, 0, 100, 300, 1, sampling, (2,), seed), tokens) for seed in range(rows)]


def microseconds(sampler: Sampler, logits: torch.Tensor, rows: list[Want], budget: float = 0.2) -> float:
    """The median of runs on fresh logits, the first left out."""
    work = torch.empty_like(logits)
    taken: list[float] = []
    end = time.perf_counter() + budget
    while len(taken) < 4 or time.perf_counter() < end:
        work.copy_(logits)
        start = time.perf_counter()
        sampler.sample(work, rows)
        taken.append(time.perf_counter() - start)
    return sorted(taken[1:])[(len(taken) - 1) // 2] * 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--logits", choices=["flat", "peaked"], default="peaked")
    parser.add_argument("--no-torch", action="store_true", help="measure the native sampler alone")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.set_grad_enabled(False)
    torch.manual_seed(0)
    library = load()
    if isinstance(library, str):
        raise SystemExit(f"There are no native kernels here: {library}")
    library.refresh()
    native, plain = Sampler(TorchOps(), library), Sampler(TorchOps())
    print(f"{library.variant}, {options.threads} threads, {options.logits} logits")
    print(f"{'setting':<25} {'vocab':>7} {'rows':>4} {'native us':>10} {'torch us':>10}")
    for vocab in (49152, 151936):
        for rows in (1, 16, 64):
            logits = torch.randn(rows, vocab)
            if options.logits == "peaked":
                logits = (3 * logits).bfloat16().float()
            for name, sampling in SETTINGS.items():
                ours = microseconds(native, logits, wants(sampling, rows))
                theirs = "" if options.no_torch else f"{microseconds(plain, logits, wants(sampling, rows)):10.0f}"
                print(f"{name:<25} {vocab:7} {rows:4} {ours:10.0f} {theirs}", flush=True)


if __name__ == "__main__":
    main()
