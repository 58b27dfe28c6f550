"""Which blocks a full pool should give up: a trace of prompts, replayed through the real `BlockPool`.

    python benchmarks/eviction.py TRACE [--blocks 1000,3000,10000,30000]

TRACE has one JSON object a line whose `hash_ids` name the blocks of a prompt from its beginning (the format of the
Mooncake traces, Qin et al. 2025, whose blocks have 512 tokens). One request after the other takes what is cached of its
prompt, computes the rest and leaves. Printed is the share of blocks that was cached: where the memory in which a
request computes comes on top of the cache, as studies of caches count; where it is part of the same blocks (`inside`),
which costs a small pool a long prompt's worth of content each time; and for a cache that knows the future (Belady
1966).
"""

from __future__ import annotations

import argparse
import heapq
import json
import time
from collections.abc import Sequence
from hashlib import blake2b
from pathlib import Path

from ropeway.kv import BlockPool

Prompt = list[bytes]


def read(path: Path) -> list[Prompt]:
    """The prompts of a trace as keys of their blocks."""
    with path.open(encoding="utf-8") as lines:
        ids = [json.loads(line)["hash_ids"] for line in lines if line.strip()]
    return [[blake2b(number.to_bytes(8, "big"), digest_size=16).digest() for number in prompt] for prompt in ids]


def replay(prompts: Sequence[Prompt], capacity: int, spare: int = 0) -> float:
    """The share of blocks found in a pool of `capacity` blocks, with `spare` more for whoever runs, which between
    requests hold nothing. Prompts longer than the pool find nothing."""
    pool, hits, total = BlockPool(capacity + spare), 0, 0
    ballast = pool.alloc(spare) or []
    for keys in prompts:
        total += len(keys)
        cached = pool.match(keys)
        pool.share(cached)
        lent = min(len(keys) - len(cached), spare)
        pool.release([ballast.pop() for _ in range(lent)])
        fresh = pool.alloc(len(keys) - len(cached))
        if fresh is None:
            pool.release(cached)
        else:
            hits += len(cached)
            for block, key in zip(fresh, keys[len(cached) :], strict=True):
                pool.publish(block, key)
            pool.release(cached + fresh)
        ballast += pool.alloc(lent) or []
    return hits / total


def foresee(prompts: Sequence[Prompt], capacity: int) -> float:
    """The same for a cache that gives up what will be asked for last."""
    never = len(prompts)
    last: dict[bytes, int] = {}
    following: list[list[int]] = []
    for turn in range(len(prompts) - 1, -1, -1):
        following.append([last.get(key, never) for key in prompts[turn]])
        last.update(dict.fromkeys(prompts[turn], turn))
    following.reverse()
    due: dict[bytes, int] = {}
    heap: list[tuple[int, int, bytes]] = []
    hits = total = 0
    for keys, nexts in zip(prompts, following, strict=True):
        total += len(keys)
        hits += next((number for number, key in enumerate(keys) if key not in due), len(keys))
        for place, (key, turn) in enumerate(zip(keys, nexts, strict=True)):
            due[key] = turn
            heapq.heappush(heap, (-turn, -place, key))
        while len(due) > capacity:
            turn, _, key = heapq.heappop(heap)
            if due.get(key) == -turn:
                del due[key]
    return hits / total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("trace", type=Path)
    parser.add_argument("--blocks", default="1000,3000,10000,30000", help="sizes of the pool, by commas")
    options = parser.parse_args()
    prompts = read(options.trace)
    asked = sum(map(len, prompts))
    print(f"{options.trace.name}: {len(prompts):,} prompts, {asked:,} blocks, {len(set().union(*prompts)):,} different")
    spare = max(map(len, prompts))
    print(f"{'blocks':>8} {'hit rate':>9} {'inside':>7} {'best':>7} {'us/block':>9}")
    for capacity in map(int, options.blocks.split(",")):
        begun = time.perf_counter()
        rate = replay(prompts, capacity, spare)
        cost = (time.perf_counter() - begun) / asked * 1e6
        inside, best = replay(prompts, capacity), foresee(prompts, capacity)
        print(f"{capacity:>8,} {rate:>9.4f} {inside:>7.4f} {best:>7.3f} {cost:>9.2f}", flush=True)


if __name__ == "__main__":
    main()
