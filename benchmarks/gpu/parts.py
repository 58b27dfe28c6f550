"""What is measured, in which order, and what is left out when there is not the time for all of it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

import layouts
import torch
from ceilings import Ceilings, bandwidth, gemm
from layouts import Ask, Sizes
from measure import Deadline, Stopwatch
from peers import Peer, decode_all
from serving import Served, decode, offline, online, prefill
from tracing import trace

from ropeway.contract import BlockCopy, StepPlan
from ropeway.modelspec import load_spec

Row = dict[str, Any]


@dataclass
class Bench:
    """What parts share: the device, the sizes, what has been measured so far, and the one model that is loaded."""

    device: torch.device
    sizes: Sizes
    place: Path
    ceilings: Ceilings = field(default_factory=Ceilings)
    requests_s: float = 0.0
    _open: Served | Peer | None = None
    _key: tuple[Any, ...] = ()

    def served(self, layout: str, **settings: Any) -> Served:
        """The engine over `layout`, loaded unless the last part has left it open."""
        found: Served = self._only(("served", layout, *sorted(settings.items())), lambda: self._serve(layout, settings))
        return found

    def peer(self, layout: str) -> Peer:
        found: Peer = self._only(("peer", layout), lambda: Peer(layout, self.device))
        return found

    def close(self) -> None:
        if self._open is not None:
            self._open.close()
        self._open, self._key = None, ()

    def _serve(self, layout: str, settings: dict[str, Any]) -> Served:
        values: dict[str, Any] = {
            "max_num_seqs": self.sizes.seats, "max_num_batched_tokens": self.sizes.step_tokens, "dtype": "bfloat16",
            "num_kv_blocks": self.sizes.blocks, "enable_prefix_caching": False,
        }  # fmt: skip
        return Served(layout, self.device, self.place, **(values | settings))

    def _only(self, key: tuple[Any, ...], make: Callable[[], Any]) -> Any:
        if key != self._key:
            self.close()
            self._open, self._key = make(), key
        return self._open


def ceilings_part(bench: Bench, deadline: Deadline) -> Iterator[Row]:
    watch, sizes = Stopwatch(bench.device), bench.sizes
    spec = load_spec(layouts.write(sizes.main, bench.place))
    for row in chain(bandwidth(watch, sizes.buffer), gemm(watch, spec, sizes.gemm_rows)):
        bench.ceilings.learn(row)
        yield row
        deadline.check()


def start_part(bench: Bench, deadline: Deadline) -> Iterator[Row]:
    served = bench.served(bench.sizes.main)
    graphs, seconds = served.capture()
    info = served.executor.info
    yield {"start_s": served.start_seconds, "graphs": graphs, "capture_s": seconds, "blocks": info.num_blocks,
           "depth": info.depth, "attention": info.attention, "notes": info.notes}  # fmt: skip


def decode_part(bench: Bench, deadline: Deadline, **settings: Any) -> Iterator[Row]:
    """Shares are of the read bandwidth, counting weights and K and V once. The floor takes each product at the speed
    of the library's and K and V at that of reading."""
    served, sizes, limits = bench.served(bench.sizes.main, **settings), bench.sizes, bench.ceilings
    served.capture()
    for rows in sizes.batches:
        row = decode(served, rows, sizes.context, sizes.steps, deadline)
        if limits.read:
            row["of_read"] = row["bytes"] / (row["ms"] / 1000) / limits.read
        products = limits.linear_seconds(served.spec, rows)
        if products and not settings:
            kv = served.spec.kv_bytes_per_token("bfloat16") * rows * row["context"]
            row["floor_ms"] = (products + kv / limits.read) * 1000
        yield row


def prefill_part(bench: Bench, deadline: Deadline) -> Iterator[Row]:
    served = bench.served(bench.sizes.main)
    for length in bench.sizes.prefills:
        row = prefill(served, length, bench.sizes.prefill_tokens, deadline)
        if best := bench.ceilings.flops.get("bfloat16"):
            row["of_gemm"] = row["flop_s"] / best
        yield row


def offline_part(bench: Bench, deadline: Deadline) -> Iterator[Row]:
    served, sizes = bench.served(bench.sizes.main), bench.sizes
    served.capture()
    for count in dict.fromkeys((sizes.compared, sizes.offline)):
        row = offline(served, layouts.mix(sizes, count, served.spec.vocab, count), deadline)
        bench.requests_s = row["requests_s"]
        yield {"who": "ropeway"} | row


def online_part(bench: Bench, deadline: Deadline) -> Iterator[Row]:
    """At half and at four fifths of the rate at which requests were answered offline."""
    if not bench.requests_s:
        yield {"lacks": "there is no offline rate to take shares of"}
        return
    served, sizes = bench.served(bench.sizes.main), bench.sizes
    served.capture()
    for share in (0.5, 0.8):
        rate = share * bench.requests_s
        count = max(4, round(rate * sizes.online_seconds))
        asks = layouts.mix(sizes, count, served.spec.vocab, round(100 * share))
        yield {"share": share} | online(served, asks, rate, deadline)


def yardstick_part(bench: Bench, deadline: Deadline) -> Iterator[Row]:
    """As the benchmark does it: temperature 0.6, and steps as large as its users set them."""
    served = bench.served(bench.sizes.small)
    served.capture()
    asks = layouts.yardstick(bench.sizes, served.spec.vocab)
    offline(served, [Ask(asks[0].prompt, 4)], deadline, 0.6)
    yield {"who": "ropeway"} | offline(served, asks, deadline, 0.6)


def continuous_part(bench: Bench, deadline: Deadline) -> Iterator[Row]:
    peer, sizes = bench.peer(bench.sizes.main), bench.sizes
    asks = layouts.mix(sizes, sizes.compared, layouts.LAYOUTS[sizes.main]["vocab_size"], sizes.compared)
    yield {"who": f"transformers {peer.version} continuous"} | peer.continuous(asks, deadline)


def static_part(bench: Bench, deadline: Deadline) -> Iterator[Row]:
    peer, sizes = bench.peer(bench.sizes.main), bench.sizes
    asks = layouts.mix(sizes, sizes.compared, layouts.LAYOUTS[sizes.main]["vocab_size"], sizes.compared)
    who = f"transformers {peer.version} static, batches of {sizes.static_batch}"
    yield {"who": who} | peer.static(asks, sizes.static_batch, deadline)


def peers_decode_part(bench: Bench, deadline: Deadline) -> Iterator[Row]:
    peer, sizes = bench.peer(bench.sizes.main), bench.sizes
    asks = layouts.mix(sizes, max(sizes.batches), layouts.LAYOUTS[sizes.main]["vocab_size"], 5)
    prompts = [(ask.prompt * sizes.context)[: sizes.context] for ask in asks]
    batches = [rows for rows in sizes.batches if rows <= sizes.static_batch]
    yield from decode_all(peer, batches, prompts, max(4, sizes.steps // 4), deadline)


def trace_part(bench: Bench, deadline: Deadline) -> Iterator[Row]:
    served, sizes = bench.served(bench.sizes.main), bench.sizes
    served.capture()
    for rows in sizes.batches:
        yield from trace(served, rows, sizes.context, max(2, sizes.steps // 8), deadline)


def tiers_part(bench: Bench, deadline: Deadline) -> Iterator[Row]:
    """Blocks to RAM and back, beside no computing. Against the prefill rate this says what swapping is worth."""
    blocks = bench.sizes.tier_blocks
    served = bench.served(
        bench.sizes.main, enable_prefix_caching=True, kv_host_gib=_host_gib(bench, blocks), num_kv_blocks=blocks,
        max_model_len=bench.sizes.context,
    )  # fmt: skip
    executor, info = served.executor.inner, served.executor.info
    there = min(blocks, info.tiers[0].blocks)
    size = info.kv_bytes / info.num_blocks
    for number, (source, target) in enumerate((("device", "host"), ("host", "device")) * 2):
        copies = [BlockCopy(block, block, source, target) for block in range(there)]
        begun = time.perf_counter()
        executor.collect(executor.submit(StepPlan(number, [], [], [], copies)))
        seconds = time.perf_counter() - begun
        if number >= 2:  # the first round takes memory that was never touched
            yield {
                "from": source, "to": target, "blocks": there, "block_mb": size / 1e6,
                "gb_s": there * size / seconds / 1e9, "us_per_token": seconds / there / info.block_size * 1e6,
            }  # fmt: skip
        deadline.check()


def _host_gib(bench: Bench, blocks: int) -> float:
    spec = load_spec(layouts.write(bench.sizes.main, bench.place))
    return max(0.001, blocks * 16 * spec.kv_bytes_per_token("bfloat16") / 2**30)


def quantized(scheme: str) -> Callable[[Bench, Deadline], Iterator[Row]]:
    def part(bench: Bench, deadline: Deadline) -> Iterator[Row]:
        for row in decode_part(bench, deadline, quantization=scheme):
            yield {"weights": scheme} | row

    return part


def fp8_cache_part(bench: Bench, deadline: Deadline) -> Iterator[Row]:
    for row in decode_part(bench, deadline, kv_cache_dtype="fp8"):
        yield {"cache": "fp8"} | row


@dataclass(frozen=True)
class Part:
    """`weight` orders parts by importance, 0 first; `seconds` is what it takes in full on an H200, about: where there
    is less time left than the parts before it need, it is dropped."""

    name: str
    weight: int
    seconds: float
    run: Callable[[Bench, Deadline], Iterator[Row]]


PARTS = (
    Part("ceilings", 0, 25, ceilings_part),
    Part("start", 0, 25, start_part),
    Part("decode", 0, 30, decode_part),
    Part("prefill", 1, 12, prefill_part),
    Part("offline", 1, 45, offline_part),
    Part("online", 4, 45, online_part),
    Part("trace", 3, 20, trace_part),
    Part("continuous", 2, 75, continuous_part),
    Part("static", 5, 60, static_part),
    Part("peers-decode", 6, 40, peers_decode_part),
    Part("yardstick", 2, 40, yardstick_part),
    Part("fp8", 7, 45, quantized("fp8")),
    Part("tiers", 8, 25, tiers_part),
    Part("fp8-cache", 9, 40, fp8_cache_part),
    Part("int4", 10, 50, quantized("int4")),
    Part("int8", 11, 50, quantized("int8")),
)
"""In the order in which they run, so that each model is loaded once."""


def affordable(parts: Sequence[Part], left: float) -> set[str]:
    """Names of the parts for which `left` seconds are enough, the most important first."""
    kept: set[str] = set()
    for part in sorted(parts, key=lambda part: part.weight):
        if part.seconds <= left:
            left -= part.seconds
            kept.add(part.name)
    return kept
