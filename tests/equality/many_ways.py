"""Work cut up in every way that a scheduler may, whoever's code computes it."""

from __future__ import annotations

from collections.abc import Callable

from test_whole_engine import NUMBER

from checkpoints import prompt
from driver import Driver
from ropeway.runtime.local import LocalExecutor


def in_many_ways(executor: LocalExecutor, expected: Callable[[tuple[int, ...]], list[int]]) -> None:
    """Sequences of all ages in a step, in chunks; then on shared blocks; then put back and resumed. Each goes on as is
    `expected` of its prompt."""
    d = Driver(executor)
    lines = []
    for length in (5, 33, 58):
        lines.append(d.add(prompt(length, length)))
        d.step([(line, 7) for line in reversed(lines)])
    d.run(lines, NUMBER, chunk=7)
    changed = prompt(58, 58)[:40] + prompt(1, 9)
    shared = d.add(changed, shared=lines[2].blocks[:5])
    d.run([shared], 4, chunk=5)
    kept = d.remove(shared, keep=2)
    d.remove(lines[1])
    other = d.add(prompt(17, 17))
    d.run([other], 3)
    d.readmit(shared, shared=kept)
    d.run([shared, other], NUMBER, chunk=9)
    for line in (*lines, shared, other):
        assert line.output[:NUMBER] == expected(tuple(line.tokens[: line.prompt_len]))
