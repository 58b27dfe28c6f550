"""The figures in the documentation are those of the code."""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from ropeway.api.errors import _TABLE

ROOT = Path(__file__).parents[2]
DOCS, SOURCE = ROOT / "docs", ROOT / "src" / "ropeway"
_WORDS = {2: "two", 3: "three", 4: "four", 5: "five", 10: "ten", 30: "thirty"}
_OPERATORS: dict[type, Any] = {
    ast.Mult: lambda a, b: a * b,
    ast.Add: lambda a, b: a + b,
    ast.Sub: lambda a, b: a - b,
    ast.Pow: lambda a, b: a**b,
    ast.LShift: lambda a, b: a << b,
}


def _value(node: ast.expr | None) -> Any:
    """What an expression of numbers says, without running the module that it stands in."""
    if isinstance(node, ast.BinOp):
        return _OPERATORS[type(node.op)](_value(node.left), _value(node.right))
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        return -_value(node.operand)
    if isinstance(node, ast.Tuple):
        return tuple(_value(one) for one in node.elts)
    assert isinstance(node, ast.Constant), ast.dump(node) if node else "nothing"
    return node.value


@cache
def value(file: str, name: str) -> Any:
    """The constant `name`, or `Class.name`, of a file."""
    body: list[ast.stmt] = ast.parse((SOURCE / file).read_text()).body
    *owners, last = name.split(".")
    for owner in owners:
        body = next(one.body for one in body if isinstance(one, ast.ClassDef) and one.name == owner)
    for one in body:
        targets = one.targets if isinstance(one, ast.Assign) else [one.target] if isinstance(one, ast.AnnAssign) else []
        if any(isinstance(target, ast.Name) and target.id == last for target in targets):
            assert isinstance(one, ast.Assign | ast.AnnAssign)
            return _value(one.value)
    raise AssertionError(f"{file} has no {name}")


def number(file: str, name: str, scale: float = 1) -> str:
    """It as a page writes it."""
    found = value(file, name) * scale
    return f"{found:,}" if isinstance(found, int) else f"{found:,.6g}"


def word(file: str, name: str, scale: float = 1) -> str:
    return _WORDS[round(value(file, name) * scale)]


MIB = 2.0**-20
FORECAST, BUDGET, ORDER = "scheduler/forecast.py", "scheduler/budget.py", "scheduler/order.py"
BREAKER, SUPERVISOR, PARAMS = "gateway/breaker.py", "gateway/supervisor.py", "service/params.py"
GRAMMAR, LIMITS, REDIS = "text/grammar.py", "service/grammars.py", "jobs/redis_queue.py"
FIGURES = [
    ("memory.md", f"a credit of {number('kv/pool.py', 'CREDIT')} releases for each time"),
    ("memory.md", f"asked for again, {_WORDS[value('kv/pool.py', 'LEVELS') - 1]} at most"),
    ("memory.md", f"At most {({4: 'a quarter'})[value('kv/pins.py', 'MOST')]} of the KV cache can be pinned"),
    ("memory.md", f"with at most {number('runtime/blockfile.py', 'QUEUE_BYTES', MIB)} MiB waiting"),
    ("memory.md", f"{number('runtime/memory.py', 'GPU_LEFT', 100)} % of the GPU's memory stay free"),
    ("memory.md", f"`--gpu-memory-utilization` ({number('runtime/memory.py', 'GPU_DEFAULT_UTILIZATION')} unless told)"),
    ("memory.md", f"or {number('runtime/memory.py', '_ASIDE', MIB)} MiB for each direction"),
    ("memory.md", f"{word('runtime/weights/upload.py', 'READERS').capitalize()} threads read the files into"),
    (
        "gpu.md",
        f"`--gpu-memory-utilization` ({number('runtime/memory.py', 'GPU_DEFAULT_UTILIZATION')}) of the device's",
    ),
    ("gpu.md", f"a graph that {number('runtime/graphs.py', 'PATIENCE')} steps have wanted"),
    ("gpu.md", f"fp8 products of more than {number('runtime/layers/gpu.py', '_FEW')} rows go to cuBLAS"),
    ("models.md", f"may differ by more than {number('runtime/models/transformers_check.py', 'EXACT', 100)} % of their"),
    ("architecture.md", f"Models below {number('runtime/local.py', '_SMALL', MIB)} MiB get one thread"),
    ("scheduling.md", f"passed by at most {number('scheduler/limits.py', 'BlockLimit.passes')} others"),
    ("scheduling.md", f"cached beginning, of the first {number(ORDER, 'PrefixFirst.window')} |"),
    ("scheduling.md", f"is expected after more than {number(ORDER, 'Deadline.SURE')} of its time"),
    ("scheduling.md", f"can still be in time, by {word(ORDER, 'Deadline.LATE')} ranks"),
    ("scheduling.md", f"{number(ORDER, 'Deadline.LATE')} x `--promote-after` after its deadline"),
    ("scheduling.md", f"those of the last {number(FORECAST, 'Forecast.WINDOW')} answers"),
    ("scheduling.md", f"is taken to become {number(FORECAST, 'Forecast.GUESS')} tokens or twice"),
    ("scheduling.md", f"every preemption raises it by {number(FORECAST, 'Forecast.STEP', 100)} %"),
    (
        "scheduling.md",
        f"lowers it by {number(FORECAST, 'Forecast.STEP', 100 * value(FORECAST, 'Forecast.PREEMPTIONS'))} %",
    ),
    ("scheduling.md", f"one request in {1 / value(FORECAST, 'Forecast.PREEMPTIONS'):g} is put back"),
    ("scheduling.md", f"never exceeds {number(FORECAST, 'Forecast.MOST', 100)} %"),
    ("scheduling.md", f"more than {number('scheduler/victim.py', 'MostToGo.SPARED', 100)} % of their expected answer"),
    ("scheduling.md", f"and at least {number(BUDGET, 'TargetLatency.SHORTEST', 1000)} ms; 0 leaves it"),
    ("scheduling.md", f"but for a forecast every {number('scheduler/outlook.py', 'Outlook.EVERY')} steps"),
    ("backfill.md", f"below {number(BUDGET, 'Backfill.SHORTEST', 1000)} ms nobody notices"),
    ("requests.md", f"is known for {word('api/registry.py', 'KEEP_SECONDS', 1 / 60)} minutes"),
    ("requests.md", f"no more than {number('api/registry.py', 'KEEP')} of them are"),
    ("timelines.md", f"remembers the last {number('scene/lives.py', 'KEEP')} that have ended"),
    ("timelines.md", f"the server their ids for {word('api/registry.py', 'KEEP_SECONDS', 1 / 60)} minutes"),
    ("timelines.md", f"that each step read, at most {number('contract/scene.py', 'MOST_CHUNKS')}; the last then"),
    ("timelines.md", f"at most for the first {number('contract/scene.py', 'MOST_WAITING')} in line"),
    ("timelines.md", f"at most {number('contract/scene.py', 'MOST_CELLS')}, each then stands for a stretch"),
    (
        "timelines.md",
        f"({number('api/feed.py', 'LEAST')} to {number('api/feed.py', 'MOST')}, "
        f"{number('api/feed.py', 'EVERY')} unless given)",
    ),
    ("timelines.md", f"Spans are sent every {word('api/tracing.py', 'EVERY')} seconds"),
    ("ui.md", f"at most {number('contract/compare.py', 'MAX_TOKENS')} tokens of answers each"),
    ("webhooks.md", f"no more than {number('jobs/egress.py', '_MAX_ANSWER', 1 / 1024)} KB of it are read"),
    ("webhooks.md", f"Events are listed for {word('jobs/webhooks.py', 'KEPT', 1 / 86400)} days"),
    ("durability.md", f"It is leased for {number('jobs/items.py', 'LEASE_SECONDS')} s at a time"),
    ("durability.md", f"After {number('jobs/items.py', 'LEASE_SECONDS')} s others take over"),
    ("durability.md", f"After {word('jobs/items.py', 'SILENT_LEASES')} times it ends with the error `gave_up`"),
    ("batch.md", f"where the server died {word('jobs/items.py', 'SILENT_LEASES')} times over the same request"),
    ("batch.md", f"is tried again {word('jobs/worker.py', '_RETRIES')} times"),
    (
        "redis.md",
        f"after {number(REDIS, '_SILENT_BEATS', value('jobs/worker.py', 'BEAT_SECONDS'))} seconds without a heartbeat "
        f"(one every {number('jobs/worker.py', 'BEAT_SECONDS')} seconds)",
    ),
    ("redis.md", f"A call is taken {word(REDIS, '_DELIVERIES')} times"),
    ("redis.md", f"Redis has {word('jobs/redis_link.py', 'ANSWER_SECONDS')} seconds to answer"),
    ("redis.md", f"dead letters, about the last {number('jobs/redis_broker.py', '_DEAD_LETTERS')}"),
    ("keys.md", f"({number('accounts/standing.py', 'FIRST_GUESS')} before the first)"),
    (
        "keys.md",
        f"rows, {number('api/usage.py', '_DEFAULT_ROWS')} unless given, at most {number('api/usage.py', 'MAX_ROWS')}",
    ),
    ("metrics.md", f"({number('accounts/families.py', 'MOST_KEYS')} at most; others are counted"),
    (
        "routes.md",
        f"{word(BREAKER, 'STREAK')} failures in a row, or half of at least {number(BREAKER, 'ENOUGH')} within "
        f"{number(BREAKER, 'WINDOW')} s",
    ),
    ("routes.md", f"no requests for {number(BREAKER, 'REST')} s; then one that tries"),
    ("routes.md", f"doubles the time, up to {number(BREAKER, 'MOST_REST', 1 / 60)} minutes"),
    ("routes.md", f"already has {number('gateway/balance.py', 'SLACK')} times its share"),
    ("routes.md", f"loaded again {number(SUPERVISOR, 'REST')} s later, then {number(SUPERVISOR, 'REST', 2)} s"),
    (
        "routes.md",
        f"({number('gateway/deployment.py', '_REST')} to {number('gateway/deployment.py', '_MOST_REST')} s) while",
    ),
    ("canary.md", f"of at least {number('experiment/compare.py', '_LEAST_KEYS')} equally busy keys"),
    ("canary.md", f"forgets at most {word('gateway/canaries.py', '_SAVE_SECONDS')} seconds"),
    ("structured-output.md", f"a grammar, or all choices | {number(GRAMMAR, 'MAX_CHARS')} |"),
    ("structured-output.md", f"keys not counted | {number(GRAMMAR, 'MAX_NODES')} |"),
    ("structured-output.md", f"levels of nesting | {number(GRAMMAR, 'MAX_DEPTH')} |"),
    ("structured-output.md", f"| choices | {number(GRAMMAR, 'MAX_CHOICES')} |"),
    ("structured-output.md", f"of an EBNF grammar | {number(GRAMMAR, 'MAX_EBNF')} |"),
    ("structured-output.md", f"processor time to compile it | {number(LIMITS, 'GrammarLimits.seconds')} s |"),
    ("structured-output.md", f"by the clock to compile it | {number(LIMITS, 'GrammarLimits.deadline')} s |"),
    ("structured-output.md", f"memory to compile it | {number(LIMITS, 'GrammarLimits.max_memory', MIB)} MiB |"),
    ("embeddings.md", f"at most {number('api/embedding_schema.py', 'MAX_INPUTS')} inputs and"),
    ("embeddings.md", f"inputs and {number('api/embedding_schema.py', 'MAX_INPUT_TOKENS')} tokens"),
    ("sampling.md", f"Up to {number(PARAMS, 'MAX_STOPS')} texts, matched"),
    ("sampling.md", f"Up to {number(PARAMS, 'MAX_BAD_WORDS')} texts that must not appear"),
    ("sampling.md", f"added to the logit. At most {number(PARAMS, 'MAX_BIASES')}."),
    ("sampling.md", f"theirs, 0 to {number(PARAMS, 'MAX_LOGPROBS')} (`--max-logprobs`"),
    ("sampling.md", f"Below {value('runtime/draw.py', 'GREEDY_BELOW'):.5f} it is 0"),
    ("openai-api.md", f"`{value('api/logprobs.py', 'LOWEST')}` stands for an impossible token"),
    ("client.md", f"`max_concurrency` ({number('client/aclient.py', 'CONCURRENCY')})"),
]


@pytest.mark.parametrize("page", sorted({page for page, _ in FIGURES}))
def test_a_page_has_the_figures_of_the_code(page: str) -> None:
    text = " ".join((DOCS / page).read_text().split())
    missing = [said for name, said in FIGURES if name == page and said not in text]
    assert not missing


def test_the_delays_of_webhooks_are_those_of_the_code() -> None:
    delays = value("jobs/webhooks.py", "SCHEDULE")
    units = [(3600, "h"), (60, "min"), (1, "s")]
    said = [next(f"{delay / size:g} {unit}" for size, unit in units if delay >= size) for delay in delays[1:]]
    assert f"| after the one before | at once | {' | '.join(said)} |" in (DOCS / "webhooks.md").read_text()


def test_the_errors_that_a_client_may_get_are_listed() -> None:
    section = (DOCS / "openai-api.md").read_text().split("\n## Errors\n")[1].split("\n## ")[0]
    rows = [line.strip("| ").split(" | ") for line in section.splitlines() if re.match(r"\| \d+ ", line)]
    listed = {
        (int(status), kind.strip("` "), None if code.strip("` ") == "null" else code.strip("` "))
        for status, kinds, codes, _ in rows
        for kind in kinds.split(",")
        for code in codes.split(",")
    }
    assert not {(status, kind, code) for _, status, kind, code in _TABLE} - listed


def test_the_readme_compares_with_figures_that_were_measured() -> None:
    """Its table is taken from the page that says how they were measured."""
    table = (ROOT / "README.md").read_text().split("\n## How it compares\n")[1].split("\n\n")[1]
    measured = (DOCS / "cpu.md").read_text().split("\n## Measured\n")[1].split("\n\n")[1]

    def cells(text: str) -> list[list[str]]:
        lines = [line for line in text.splitlines() if "---" not in line]
        return [[cell.strip("* ") for cell in line.strip("|").split("|")] for line in lines]

    names, *shown = cells(table)
    assert len(names) > 4
    for at, name in enumerate(names[1:], 1):
        rows = [row for row in cells(measured) if row[0].startswith(name.split()[0])]
        told = [row[column].split()[0] for column in (1, 3) for row in rows if row[column]]  # W1, then W3
        assert told
        assert [row[at] for row in shown if row[at]] == told
