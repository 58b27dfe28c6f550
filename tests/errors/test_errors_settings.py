"""Flags, variables and files that are wrong: what `ropeway` says before anything is loaded."""

from __future__ import annotations

import re
import socket
import sqlite3
from collections.abc import Mapping
from pathlib import Path

import pytest
from aloud import Book, Typed, check_laws, errors_of, make
from besides import IdleHost
from typer.main import get_command

from ropeway.accounts.accounts import FILE, open_accounts
from ropeway.cli.main import app
from ropeway.cli.misuse import ELSEWHERE

_TAKEN: list[socket.socket] = []


def take_a_port(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Mapping[str, str]:
    taken = socket.create_server(("127.0.0.1", 0))
    _TAKEN.append(taken)
    return {"8000": str(taken.getsockname()[1])}


def make_a_key(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from ropeway.accounts import Limits, keys

    store = open_accounts(folder / "data")
    store.write_now(lambda connection: keys.create(connection, "alice", Limits()))
    store.close()


def upgrade_the_data(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    open_accounts(folder / "data").close()
    with sqlite3.connect(folder / "data" / FILE) as connection:
        connection.execute("UPDATE schema_version SET version = 99")
    connection.close()


SETTINGS = {
    "an option that does not exist": Typed("ropeway serve --max-num-seqz 2"),
    "an option that looks like none": Typed("ropeway serve --flux-capacitor on"),
    "an option of vLLM that has another name here": Typed("ropeway serve --swap-space 4"),
    "an option of vLLM for what is not there": Typed("ropeway serve --enable-lora"),
    "letters that vLLM writes together": Typed("ropeway serve -tp 2"),
    "a sign for a letter": Typed("ropeway serve -? bundled"),
    "a bracket for a letter": Typed("ropeway serve -[x"),
    "an option of llama.cpp": Typed("ropeway serve --ctx-size 4096"),
    "a verb that does not exist": Typed("ropeway server"),
    "a verb of another program": Typed("ropeway pull llama3"),
    "an argument that is missing": Typed("ropeway keys create"),
    "an option without its value": Typed("ropeway serve --port"),
    "a setting that no help knows": Typed("ropeway --help=zeppelin"),
    "a word for the help of another verb": Typed("ropeway sim --help=trace"),
    "a size with its unit": Typed("ropeway serve --kv-cache-gib 4GB"),
    "a time with its unit": Typed("ropeway serve --request-timeout 10s"),
    "a word for a number": Typed("ropeway serve --max-num-seqs many"),
    "a number that is too small": Typed("ropeway serve --max-num-seqs 0"),
    "a number that is too large": Typed("ropeway serve --port 70000"),
    "a dtype by another name": Typed("ropeway serve --dtype fp16"),
    "a variable that is wrong": Typed("ROPEWAY_PORT=http ropeway serve"),
    "a switch both ways": Typed("ropeway serve --enable-prefix-caching --no-enable-prefix-caching"),
    "fewer tokens in a step than seats": Typed("ropeway serve --max-num-batched-tokens 8"),
    "a block size that is no power of two": Typed("ropeway serve --block-size 24"),
    "a tier on disk without a directory": Typed("ropeway serve --kv-disk-gib 1"),
    "tiers without the prefix cache": Typed("ropeway serve --kv-host-gib 1 --no-enable-prefix-caching"),
    "no seat left for background work": Typed("ropeway serve --reserved-seats 64"),
    "weights that are none": Typed("ropeway serve --tenant-weights alice=heavy"),
    "no such configuration file": Typed("ropeway serve --config missing.yaml"),
    "a configuration file that is not YAML": Typed(
        "ropeway serve --config ropeway.yaml", {"ropeway.yaml": "max-num-seqs: [4\nport: 8000\n"}
    ),
    "an unknown setting in the file": Typed(
        "ropeway serve --config ropeway.yaml", {"ropeway.yaml": "max-num-seqz: 4\n"}
    ),
    "a day that there is not in the file": Typed(
        "ropeway serve --config ropeway.yaml", {"ropeway.yaml": "served-model-name: 2026-02-30\n"}
    ),
    "a wrong value in the file": Typed("ropeway serve --config ropeway.yaml", {"ropeway.yaml": "port: eighty\n"}),
    "a list for a file of settings": Typed("ropeway serve --config ropeway.yaml", {"ropeway.yaml": "- port\n"}),
    "routes and a model": Typed(
        "ropeway serve bundled --routes routes.yaml", {"routes.yaml": "deployments: {a: {}}\n"}
    ),
    "no such table of routes": Typed("ropeway serve --routes routes.yaml"),
    "routes that are not YAML": Typed("ropeway serve --routes routes.yaml", {"routes.yaml": "deployments: {a: {}\n"}),
    "a name twice in the routes": Typed(
        "ropeway serve --routes routes.yaml", {"routes.yaml": "deployments:\n  a: {}\n  a: {}\n"}
    ),
    "an unknown field in the routes": Typed(
        "ropeway serve --routes routes.yaml", {"routes.yaml": "deployments:\n  quick: {max_seqs: 4}\n"}
    ),
    "a route that leads nowhere": Typed(
        "ropeway serve --routes routes.yaml", {"routes.yaml": "deployments: {quick: {}}\nroutes: {chat: quack}\n"}
    ),
    "models that do not fit together": Typed(
        "ropeway serve --routes routes.yaml",
        {"routes.yaml": "memory_gib: 4\ndeployments: {a: {memory_gib: 3}, b: {memory_gib: 3}}\n"},
    ),
    "a remote server's key that is not set": Typed(
        "ropeway serve --routes routes.yaml",
        {"routes.yaml": "deployments: {gpu: {url: 'https://gpu.example', model: m, api_key_env: GPU_KEY}}\n"},
    ),
    "no file of prices": Typed("ropeway serve --prices prices.yaml"),
    "prices with a misspelt name": Typed(
        "ropeway serve --prices prices.yaml", {"prices.yaml": "models: {bundled: {inputs: 1}}\n"}
    ),
    "a price below nothing": Typed(
        "ropeway serve --prices prices.yaml", {"prices.yaml": "models: {bundled: {input: -1}}\n"}
    ),
    "other machines, and no key": Typed("ropeway serve --host 0.0.0.0"),
    "an address of another machine": Typed("ropeway serve --host 192.0.2.1 --api-key k"),
    "a port in use": Typed("ropeway serve --port 8000", prepare=take_a_port),
    "a webhook that is no URL": Typed("ropeway serve --webhook-url nonsense"),
    "a webhook's secret that is none": Typed("ropeway serve --webhook-secret hush"),
    "a network that is none": Typed("ropeway serve --webhook-allow 10.0.0.0/99"),
    "a port of webhooks that is none": Typed("ropeway serve --webhook-ports https"),
    "a Redis that is no URL": Typed("ropeway serve --redis-url localhost"),
    "a prefix for Redis that it cannot have": Typed("ropeway serve --redis-url redis://localhost --redis-prefix 'a b'"),
    "a collector that is no URL": Typed("ropeway serve --otlp-endpoint localhost:4318"),
    "a key that is there": Typed("ropeway keys create alice --data-dir data", prepare=make_a_key),
    "a key that is not there": Typed("ropeway keys revoke bob --data-dir data", prepare=make_a_key),
    "no keys at all": Typed("ropeway keys list --data-dir data"),
    "a key with an end that is none": Typed("ropeway keys create alice --data-dir data --expires soon"),
    "a key with a limit that is none": Typed("ropeway keys create alice --data-dir data --requests-per-minute lots"),
    "data of a newer version": Typed("ropeway keys list --data-dir data", prepare=upgrade_the_data),
    "data that is damaged": Typed("ropeway keys list --data-dir data", {f"data/{FILE}": "no database " * 400}),
    "a data directory that is a file": Typed("ropeway keys create alice --data-dir data", {"data": ""}),
    "usage by what there is not": Typed("ropeway usage --by model,planet"),
    "usage where nothing was counted": Typed("ropeway usage --data-dir data"),
    "no server to talk to": Typed("ropeway chat --url http://127.0.0.1:9 --quick hi"),
    "an address without http": Typed("ropeway chat --url 127.0.0.1:8000"),
    "a batch without a file": Typed("ropeway batches create missing.jsonl"),
    "no requests to run": Typed("ropeway run-batch -i in.jsonl -o out.jsonl", {"in.jsonl": "\n"}),
    "a file of requests that is not there": Typed("ropeway run-batch -i in.jsonl -o out.jsonl"),
    "a benchmark without its data": Typed("ropeway bench serve --dataset-name sharegpt"),
    "a benchmark without a server": Typed("ropeway bench serve --base-url http://127.0.0.1:9"),
    "lengths that are none": Typed("ropeway bench batching --lengths short,long"),
    "a device that nobody knows": Typed("ropeway plan --device abacus"),
    "no journal": Typed("ropeway replay journal"),
    "a journal that is none": Typed("ropeway replay old.journal", {"old.journal": "ropeway journal 0\n"}),
    "a journal that breaks off": Typed("ropeway replay cut.journal", {"cut.journal": "ropeway journal 1\n"}),
    "a trace of nothing": Typed("ropeway trace"),
    "no such profile": Typed("ropeway sim --profile abacus"),
    "a damaged profile": Typed("ropeway sim --profile profile.json", {"profile.json": '{"name": "x"'}),
    "a sweep over what is no setting": Typed("ropeway sim --sweep speed=1,2"),
    "a sweep over values that are none": Typed("ropeway sim --sweep max_num_seqs=few,many"),
    "a trace that cannot be read": Typed("ropeway sim --trace trace.csv", {"trace.csv": "a,b\n1,2\n"}),
    "how fast, twice": Typed("ropeway sim --rate 3 --load 0.5"),
}


@pytest.mark.parametrize("title", SETTINGS)
def test_what_is_typed_wrongly(
    title: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    update: bool,
) -> None:
    monkeypatch.setattr("ropeway.gateway.local.EngineHost", IdleHost)
    try:
        entry, told = make(SETTINGS[title], tmp_path, monkeypatch, capsys)
    finally:
        while _TAKEN:
            _TAKEN.pop().close()
    Book("settings").check(title, entry, list(SETTINGS), update=update)
    check_laws(told)


def test_the_book_has_nothing_else() -> None:
    assert list(Book("settings").entries) == list(SETTINGS)


def test_no_two_mistakes_are_told_apart_by_nothing() -> None:
    said = list(errors_of(Book("settings").entries).values())
    assert len(set(said)) == len(said)


def test_hints_are_for_options_that_are_not_there_and_name_some_that_are() -> None:
    serve = get_command(app).commands["serve"]  # type: ignore[attr-defined]
    known = {option for parameter in serve.params for option in parameter.opts}
    assert not known & ELSEWHERE.keys()
    for option, hint in ELSEWHERE.items():
        assert set(re.findall(r"--[a-z-]+", hint)) <= known, option
        assert not hint.endswith("."), option
