"""The table of routes: what is read, and how mistakes in it are told."""

from __future__ import annotations

from pathlib import Path
from textwrap import dedent

import pytest

from ropeway.config import ServerConfig
from ropeway.errors import ConfigError
from ropeway.gateway.proxy import address
from ropeway.gateway.routes import read_table
from ropeway.gateway.table import Local, Remote, Table

KEYS = {"GPU_KEY": "sk-secret"}
TABLE = """
    memory_gib: 4
    start_timeout: 30
    deployments:
      small:
        model: bundled
        max-num-seqs: 8
        memory_gib: 1
        reasoning_parser: none
        warm_up: ["You are a helpful assistant."]
      large:
        model: bundled
        preset: throughput
        max_queue: 7
        memory_gib: 4
        start: lazy
      gpu:
        url: https://gpu.example:8000/v1/
        model: Qwen/Qwen3-32B
        api_key_env: GPU_KEY
        max_concurrency: 64
        first_byte_timeout: 20
    routes:
      chat:
        targets: {small: 3, gpu: 1}
        balance: affinity
        fallbacks: large
        rules:
          - {tenants: acme, targets: gpu}
          - {min_prompt_tokens: 2000, targets: [large, gpu]}
      qwen/large: large
"""


def read(tmp_path: Path, text: str, **engine: object) -> Table:
    file = tmp_path / "routes.yaml"
    file.write_text(dedent(text))
    return read_table(file, ServerConfig(request_timeout=9.0), engine, KEYS)


def test_a_table_with_everything(tmp_path: Path) -> None:
    table = read(tmp_path, TABLE, threads=3, max_num_seqs=99)
    small, large, gpu = (table.deployments[name] for name in ("small", "large", "gpu"))
    assert isinstance(small, Local)
    assert isinstance(large, Local)
    assert isinstance(gpu, Remote)
    assert (small.engine.max_num_seqs, small.engine.threads, small.engine.memory_gib) == (8, 3, 1.0)
    assert (small.server.served_model_name, small.server.reasoning_parser) == ("small", "none")
    assert small.server.request_timeout == 9.0
    assert small.warm_up == ("You are a helpful assistant.",)
    assert (large.start, large.engine.max_num_seqs, large.engine.max_queue) == ("lazy", 99, 7)
    assert large.engine.max_num_batched_tokens == 2048  # by its preset
    assert (gpu.url, gpu.model, gpu.api_key) == ("https://gpu.example:8000/v1", "Qwen/Qwen3-32B", "sk-secret")
    assert (gpu.max_concurrency, gpu.first_byte_timeout, gpu.timeout) == (64, 20.0, 600.0)
    assert "sk-secret" not in repr(table)
    assert (table.memory_gib, table.start_timeout) == (4.0, 30.0)
    chat = table.route("chat")
    assert (chat.targets, chat.balance, chat.main) == ({"small": 3.0, "gpu": 1.0}, "affinity", "small")
    assert chat.lead("acme", 5) == ({"gpu": 1.0}, True)
    assert chat.lead("other", 2000) == ({"large": 1.0, "gpu": 1.0}, True)
    assert chat.lead("other", 1999) == (chat.targets, False)
    assert list(chat.fallbacks) == ["large"]
    assert table.route("qwen/large").targets == {"large": 1.0}


def test_without_routes_every_deployment_has_its_own_name(tmp_path: Path) -> None:
    table = read(tmp_path, "deployments: {a: , b: {url: 'http://[::1]:9', model: m}}")
    assert {name: dict(route.targets) for name, route in table.routes.items()} == {"a": {"a": 1.0}, "b": {"b": 1.0}}
    b = table.deployments["b"]
    assert isinstance(b, Remote)
    assert b.url == "http://[::1]:9/v1"


A = "deployments: {a: {model: bundled}}\n"
REMOTE = "deployments: {a: {url: 'http://h/v1', model: m"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "must be a mapping"),
        ("deployments: {}", "deployments is {}; it must be a mapping of names"),
        ("deployments: {a: {}}\ndeployments: {b: {}}", "'deployments' stands there twice, the second time in line 2"),
        ("deployments: [", "is not valid YAML"),
        ("deploments: {}", "unknown field 'deploments'. Did you mean deployments?"),
        ("deployments: {a: {modle: x}}", "deployments.a has an unknown field 'modle'. Did you mean model?"),
        ("deployments: {a: {max_num_seqs: many}}", "deployments.a.max_num_seqs is 'many'; it must be a whole number"),
        ("deployments: {a: {max_num_seqs: 0}}", "deployments.a.max_num_seqs is 0; it must be at least 1"),
        ("deployments: {a: {block_size: 24}}", "deployments.a.block_size is 24; it must be one of 8, 16"),
        ("deployments: {a: {start: later}}", "deployments.a.start is 'later'; it must be eager or lazy"),
        ("deployments: {a: {warm_up: hello}}", "deployments.a.warm_up is 'hello'; it must be a list of texts"),
        ("deployments: {a: 5}", "deployments.a is 5; it must be a mapping"),
        ("deployments: {'a b': {}}", "deployments.a b is 'a b'; it must be a name"),
        ("deployments: {a: {url: 'http://h/v1'}}", "deployments.a.model is None; it must be the model's name"),
        ("deployments: {a: {url: 'ftp://h', model: m}}", "deployments.a.url is 'ftp://h'"),
        ("deployments: {a: {url: 'http://me:pw@h', model: m}}", "deployments.a.url is"),
        ("deployments: {a: {url: 'http://h:x', model: m}}", "deployments.a.url is"),
        (REMOTE + ", max_num_seqs: 3}}", "deployments.a has an unknown field 'max_num_seqs'"),
        (REMOTE + ", api_key_env: NONE}}", "deployments.a.api_key_env names the variable NONE, which is not set"),
        (REMOTE + ", api_key_env: [A]}}", "deployments.a.api_key_env is ['A']; it must be the name of a variable"),
        (REMOTE + ", timeout: .nan}}", "deployments.a.timeout is nan; it must be a number"),
        (REMOTE + ", timeout: true}}", "deployments.a.timeout is True; it must be a number"),
        (REMOTE + ", max_concurrency: 0}}", "deployments.a.max_concurrency is 0; it must be a whole number"),
        (A + "routes: {}", "routes is {}; it must be a mapping of names"),
        (A + "routes: {x: b}", "routes.x leads to 'b', which is no deployment. There are a"),
        (A + "routes: {x: {target: a}}", "routes.x has an unknown field 'target'. Did you mean targets?"),
        (A + "routes: {x: {}}", "routes.x.targets is None; it must be a deployment"),
        (A + "routes: {x: []}", "routes.x is []; it must be not empty"),
        (A + "routes: {x: {targets: {a: 0}}}", "routes.x.targets.a is 0; it must be a weight"),
        (A + "routes: {x: {targets: {a: heavy}}}", "routes.x.targets.a is 'heavy'; it must be a weight"),
        (
            A + "routes: {x: {targets: a, balance: random}}",
            "routes.x.balance is 'random'; it must be one of least_load",
        ),
        (
            A + "routes: {x: {targets: a, fallbacks: [aa]}}",
            "routes.x.fallbacks leads to 'aa', which is no deployment. Did",
        ),
        (A + "routes: {x: {targets: a, fallbacks: {a: 1}}}", "routes.x.fallbacks is {'a': 1}; it must be a list"),
        (A + "routes: {x: {targets: a, rules: {targets: a}}}", "routes.x.rules is {'targets': 'a'}; it must be a list"),
        (A + "routes: {x: {targets: a, rules: [{targets: a}]}}", "routes.x.rules[0] fits every request"),
        (A + "routes: {x: {targets: a, rules: [{tenants: [1], targets: a}]}}", "routes.x.rules[0].tenants is [1]"),
        (
            A + "routes: {x: {targets: a, rules: [{min_prompt_tokens: 9, max_prompt_tokens: 8, targets: a}]}}",
            "routes.x.rules[0] fits no request: min_prompt_tokens 9 is above 8",
        ),
        ("memory_gib: 2\n" + A, "deployments.a.memory_gib is missing"),
        ("memory_gib: 2\ndeployments: {a: {memory_gib: 3}}", "deployments.a.memory_gib is 3, more than the 2 GiB"),
        ("memory_gib: 3\ndeployments: {a: {memory_gib: 2}, b: {memory_gib: 2}}", "need 4 GiB, but memory_gib is 3"),
        ("memory_gib: -1\n" + A, "memory_gib is -1; it must be a number from 0.001"),
    ],
)
def test_mistakes_are_told_with_their_place(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(ConfigError) as told:
        read(tmp_path, text)
    assert said in told.value.message


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read: No such file"):
        read_table(tmp_path / "none.yaml", ServerConfig())


@pytest.mark.parametrize(
    ("base", "path", "there"),
    [
        ("http://h/v1", "/v1/chat/completions", "http://h/v1/chat/completions"),
        ("http://h/v1", "/tokenize", "http://h/tokenize"),
        ("http://h/v1", "/v2/rerank", "http://h/v2/rerank"),
        ("https://h/compatible/openai", "/v1/embeddings", "https://h/compatible/openai/embeddings"),
        ("https://h/proxy/v1", "/score", "https://h/proxy/score"),
    ],
)
def test_paths_at_another_server(base: str, path: str, there: str) -> None:
    assert address(base, path) == there
