"""Can a tenant tell by the time to its first token whether another tenant has sent a prompt before?

    python benchmarks/cache_probe.py [--model bundled] [--rounds 600]

Prefix caches leak if they are shared: who asks for somebody else's guess and gets an answer at once has learned that it
was right (Song et al. 2024, Gu et al. 2025). For each round a victim sends a prompt of its own or does not, and an
attacker, who knows the prompt, then sends it too and times the first token. Printed is the area under the ROC curve of
that time as evidence: 0.5 is a guess, 1.0 is certainty. Another tenant should learn nothing; the last line, an attacker
within the victim's own tenant, shows that the probe would see a leak if there were one.
"""

from __future__ import annotations

import argparse
import random
import time
from collections.abc import Iterable, Sequence

from ropeway.config import EngineConfig
from ropeway.contract import GenerateRequest, SamplingParams, Submit
from ropeway.contract.executor import Executor
from ropeway.engine.engine import Engine

VICTIM, OTHER = "victim", "attacker"
PROMPT = 192


def auc(hits: Sequence[float], misses: Sequence[float]) -> float:
    """The chance that a hit was faster than a miss, with half a point for a draw (Mann and Whitney 1947)."""
    wins = sum((hit < miss) + 0.5 * (hit == miss) for hit in hits for miss in misses)
    return wins / (len(hits) * len(misses))


class Probe:
    """One engine, asked by several tenants. `seconds` is how time is told."""

    def __init__(self, executor: Executor, config: EngineConfig) -> None:
        self._engine = Engine(executor, config)
        self._vocab = executor.info.vocab_size
        self._numbers = iter(range(1, 1 << 62))

    def ask(self, tenant: str, prompt: list[int]) -> float:
        """Seconds until the first token."""
        sampling = SamplingParams(max_tokens=1, temperature=0.0)
        request = GenerateRequest(
            rid=next(self._numbers), tokens=prompt, sampling=sampling, tenant=tenant, salt=tenant
        )  # fmt: skip
        begun = time.perf_counter()
        self._engine.submit([Submit(request)])
        while self._engine.busy:
            self._engine.step()
        return time.perf_counter() - begun

    def rounds(self, count: int, attacker: str, seed: int) -> tuple[list[float], list[float]]:
        """The attacker's times for prompts that the victim had sent, and for others, in an order drawn from `seed`."""
        draw = random.Random(seed)
        times: dict[bool, list[float]] = {True: [], False: []}
        sent = [True, False] * (count // 2)
        draw.shuffle(sent)
        for before in sent:
            prompt = [draw.randrange(self._vocab) for _ in range(PROMPT)]
            decoy = [draw.randrange(self._vocab) for _ in range(PROMPT)]
            # Something is always sent, so that the machine is as warm in either case.
            self.ask(VICTIM, prompt if before else decoy)
            times[before].append(self.ask(attacker, prompt))
        return times[True], times[False]


def report(probe: Probe, count: int, seed: int) -> Iterable[str]:
    probe.rounds(20, OTHER, seed + 1)  # to warm up
    for attacker, name in ((OTHER, "another tenant"), (VICTIM, "the same tenant")):
        hits, misses = probe.rounds(count if attacker is OTHER else count // 10, attacker, seed)
        middle = [sorted(times)[len(times) // 2] * 1e3 for times in (hits, misses)]
        yield (
            f"{name:>16}: AUC {auc(hits, misses):.3f}, median {middle[0]:.2f} ms where the victim had sent the prompt, "
            f"{middle[1]:.2f} ms where not"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="bundled")
    parser.add_argument("--rounds", type=int, default=600)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    from ropeway.runtime.local import LocalExecutor

    config = EngineConfig(model=options.model, num_kv_blocks=2048, max_model_len=256, device="cpu")
    for line in report(Probe(LocalExecutor(config), config), options.rounds, options.seed):
        print(line, flush=True)


if __name__ == "__main__":
    main()
