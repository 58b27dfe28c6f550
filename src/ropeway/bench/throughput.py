"""Offline throughput: all requests at once, through the engine in this process."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ropeway.bench.datasets import Sample


@dataclass(frozen=True, kw_only=True)
class Throughput:
    """Totals of a run; `seconds` from the first request in to the last answer out."""

    requests: int
    prompt_tokens: int
    output_tokens: int
    seconds: float

    def __str__(self) -> str:
        """The line of `vllm bench throughput`."""
        total = self.prompt_tokens + self.output_tokens
        return (
            f"Throughput: {self.requests / self.seconds:.2f} requests/s, {total / self.seconds:.2f} total tokens/s, "
            f"{self.output_tokens / self.seconds:.2f} output tokens/s"
        )

    def fields(self) -> dict[str, float]:
        """The keys of its JSON."""
        total = self.prompt_tokens + self.output_tokens
        return {
            "elapsed_time": self.seconds,
            "num_requests": self.requests,
            "total_num_tokens": total,
            "requests_per_second": self.requests / self.seconds,
            "tokens_per_second": total / self.seconds,
        }


def measure(
    generate: Callable[[Sequence[Sample]], Sequence[tuple[int, int]]],
    samples: Sequence[Sample],
    clock: Callable[[], float] = time.perf_counter,
) -> Throughput:
    """Time `generate`, which answers all samples and returns (prompt, output) tokens of each."""
    begun = clock()
    counts = generate(samples)
    seconds = clock() - begun
    return Throughput(
        requests=len(counts),
        prompt_tokens=sum(prompt for prompt, _ in counts),
        output_tokens=sum(output for _, output in counts),
        seconds=seconds,
    )
