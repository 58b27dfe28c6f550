"""Reading the table of routes from YAML. Whatever is wrong is refused with the place of it."""

from __future__ import annotations

import dataclasses
import difflib
import math
import os
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, Final, NoReturn
from urllib.parse import urlsplit

import yaml

from ropeway.config import EngineConfig, ServerConfig, check, preset_values, settings
from ropeway.config.address import http_address
from ropeway.config.yaml_file import read_yaml
from ropeway.errors import ConfigError
from ropeway.gateway.table import Local, Remote, Route, Rule, Spec, Table, Weights

_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:@/+-]{0,127}")
_OF_MODEL: Final = ("chat_template", "tool_call_parser", "reasoning_parser", "max_restarts", "engine_timeout")
"""Settings of the server that a local deployment may have of its own."""

_TOP: Final = ("deployments", "routes", "memory_gib", "start_timeout")
_LOCAL: Final = ("start", "warm_up")
_REMOTE: Final = (
    "url", "model", "api_key_env", "max_concurrency", "requests_per_minute", "timeout", "connect_timeout",
    "first_byte_timeout", "idle_timeout",
)  # fmt: skip
_ROUTE: Final = ("targets", "rules", "fallbacks", "balance")
_RULE: Final = ("tenants", "min_prompt_tokens", "max_prompt_tokens", "targets")
_POLICIES: Final = ("least_load", "weighted", "affinity")


def read_table(
    path: Path, server: ServerConfig, engine: Mapping[str, Any] = {}, environ: Mapping[str, str] | None = None
) -> Table:
    """The table in the YAML file at `path`. `server`, and `engine` by the names of settings, have what holds where a
    deployment says nothing of its own.

    Keys of remote servers come from variables of `environ` (default: the process's). Raises ConfigError.
    """
    environ = os.environ if environ is None else environ
    top = _mapping(read_yaml(path, "The table of routes", "--routes", _Loader), str(path), _TOP)
    deployments = {
        name: _deployment(spec, f"deployments.{name}", name, server, engine, environ)
        for name, spec in _named(top.get("deployments"), "deployments").items()
    }
    memory = _number(top, "memory_gib", "", 0.001, 1e6)
    _check_memory(memory, deployments)
    written = top.get("routes")
    routes = {name: name for name in deployments} if written is None else _named(written, "routes")
    return Table(
        deployments=deployments,
        routes={name: _route(spec, f"routes.{name}", name, deployments) for name, spec in routes.items()},
        memory_gib=memory,
        start_timeout=_number(top, "start_timeout", "", 0.001, 86400) or 120.0,
    )


class _Loader(yaml.SafeLoader):
    """Refuses a key that stands twice in a mapping, of which YAML's own loader silently takes the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if isinstance(key, str) and key in seen:
                raise yaml.YAMLError(
                    f"{key!r} stands there twice, the second time in line {key_node.start_mark.line + 1}"
                )
            seen.add(key if isinstance(key, str) else str(key))
        return super().construct_mapping(node, deep)


def _deployment(
    value: Any, where: str, name: str, server: ServerConfig, defaults: Mapping[str, Any], environ: Mapping[str, str]
) -> Spec:
    value = {} if value is None else value
    if isinstance(value, dict) and "url" in value:
        return _remote(_mapping(value, where, _REMOTE), where, environ)
    engine = {setting.name: setting for setting in settings(EngineConfig)}
    own = {setting.name: setting for setting in settings(ServerConfig) if setting.name in _OF_MODEL}
    given = _mapping(value, where, (*engine, *own, *_LOCAL, "url"))
    said = {n: engine[n].parse(v, f"{where}.{n}") for n, v in given.items() if n in engine and v is not None}
    values = {**defaults, **said}
    start = given.get("start", "eager")
    if start not in ("eager", "lazy"):
        _wrong(f"{where}.start", start, "eager or lazy")
    warm_up = given.get("warm_up") or []
    if not isinstance(warm_up, list) or not all(isinstance(text, str) and text for text in warm_up):
        _wrong(f"{where}.warm_up", warm_up, "a list of texts")
    try:
        config = check(EngineConfig(**{**preset_values(values.get("preset"), values), **values}))
    except ConfigError as error:
        raise ConfigError(f"{where}: {error.message}", param=error.param) from None
    return Local(
        engine=config,
        server=dataclasses.replace(
            server,
            served_model_name=name,
            **{n: own[n].parse(v, f"{where}.{n}") for n, v in given.items() if n in own and v is not None},
        ),
        start=start,
        warm_up=tuple(warm_up),
    )


def _remote(given: dict[str, Any], where: str, environ: Mapping[str, str]) -> Remote:
    url, model, variable = given["url"], given.get("model"), given.get("api_key_env")
    if not isinstance(url, str) or not _is_address(url):
        _wrong(f"{where}.url", url, "an address such as http://host:8000/v1, without a user or a question mark")
    if not isinstance(model, str) or not model:
        _wrong(f"{where}.model", model, "the model's name on that server")
    key = ""
    if variable is not None:
        if not isinstance(variable, str):
            _wrong(f"{where}.api_key_env", variable, "the name of a variable")
        key = environ.get(variable, "").strip()
        if not key or not key.isascii() or not key.isprintable():
            state = "holds no usable key" if key else "is not set"
            message = f"{where}.api_key_env names the variable {variable}, which {state}. Put the key into it."
            raise ConfigError(message, param="api_key_env")
    numbers = {
        name: _number(given, name, where, 0.001, 86400)
        for name in ("timeout", "connect_timeout", "first_byte_timeout", "idle_timeout")
    }
    counts = {name: _count(given, name, where) for name in ("max_concurrency", "requests_per_minute")}
    path = urlsplit(url).path.strip("/")
    return Remote(
        url=url.rstrip("/") if path else url.rstrip("/") + "/v1",
        model=model,
        api_key=key,
        **{name: value for name, value in {**numbers, **counts}.items() if value is not None},  # type: ignore[arg-type]
    )


def _route(value: Any, where: str, name: str, deployments: Collection[str]) -> Route:
    if not isinstance(value, dict):
        return Route(name=name, targets=_targets(value, where, deployments))
    given = _mapping(value, where, _ROUTE)
    balance = given.get("balance", "least_load")
    if balance not in _POLICIES:
        _wrong(f"{where}.balance", balance, f"one of {', '.join(_POLICIES)}")
    rules = given.get("rules") or []
    if not isinstance(rules, list):
        _wrong(f"{where}.rules", rules, "a list of rules")
    fallbacks = given.get("fallbacks") or []
    fallbacks = [fallbacks] if isinstance(fallbacks, str) else fallbacks
    if not isinstance(fallbacks, list):
        _wrong(f"{where}.fallbacks", fallbacks, "a list of deployments")
    return Route(
        name=name,
        targets=_targets(given.get("targets"), f"{where}.targets", deployments),
        rules=[_rule(rule, f"{where}.rules[{number}]", deployments) for number, rule in enumerate(rules)],
        fallbacks=[_known(one, f"{where}.fallbacks", deployments) for one in fallbacks],
        balance=balance,
    )


def _rule(value: Any, where: str, deployments: Collection[str]) -> Rule:
    given = _mapping(value, where, _RULE)
    tenants = given.get("tenants") or []
    tenants = [tenants] if isinstance(tenants, str) else tenants
    if not isinstance(tenants, list) or not all(isinstance(tenant, str) and tenant for tenant in tenants):
        _wrong(f"{where}.tenants", tenants, "a list of tenants")
    least, most = (_count(given, f"{end}_prompt_tokens", where) for end in ("min", "max"))
    if not tenants and least is None and most is None:
        raise ConfigError(
            f"{where} fits every request. Say for which it is: tenants, min_prompt_tokens, ...", param=where
        )
    if least is not None and most is not None and least > most:
        raise ConfigError(f"{where} fits no request: min_prompt_tokens {least} is above {most}.", param=where)
    return Rule(
        tenants=frozenset(tenants),
        least=least,
        most=most,
        targets=_targets(given.get("targets"), f"{where}.targets", deployments),
    )


def _targets(value: Any, where: str, deployments: Collection[str]) -> Weights:
    """A deployment, a list of them, or a mapping to their weights."""
    if isinstance(value, str):
        value = [value]
    if isinstance(value, list):
        return {_known(name, where, deployments): 1.0 for name in value} if value else _wrong(where, value, "not empty")
    if not isinstance(value, dict) or not value:
        _wrong(where, value, "a deployment, a list of them, or a mapping to their weights")
    for name, weight in value.items():
        _known(name, where, deployments)
        if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0.001 <= weight <= 1000:
            _wrong(f"{where}.{name}", weight, "a weight from 0.001 to 1000")
    return {str(name): float(weight) for name, weight in value.items()}


def _check_memory(memory: float | None, deployments: Mapping[str, Spec]) -> None:
    """Local engines must fit, each by itself, and those that start with the server together."""
    needs = {name: spec for name, spec in deployments.items() if isinstance(spec, Local)}
    if memory is None:
        return
    together = 0.0
    for name, spec in needs.items():
        need = spec.engine.memory_gib
        if need is None:
            message = f"deployments.{name}.memory_gib is missing. Say what each may take, because memory_gib is given."
            raise ConfigError(message, param="memory_gib")
        if need > memory:
            message = f"deployments.{name}.memory_gib is {need:g}, more than the {memory:g} GiB for all of them."
            raise ConfigError(message, param="memory_gib")
        together += need if spec.start == "eager" else 0.0
    if together > memory:
        raise ConfigError(
            f"The deployments that start with the server need {together:g} GiB, but memory_gib is {memory:g}. "
            "Give some of them start: lazy.",
            param="memory_gib",
        )


def _named(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, dict) or not value:
        _wrong(where, value, "a mapping of names, and not empty")
    for name in value:
        if not isinstance(name, str) or not _NAME.fullmatch(name):
            _wrong(f"{where}.{name}", name, "a name of at most 128 letters, digits or . _ : @ / + - characters")
    return dict(value)


def _mapping(value: Any, where: str, allowed: Collection[str]) -> dict[str, Any]:
    """`value` with dashes in its keys as underscores. Raises ConfigError for keys that are not `allowed`."""
    if not isinstance(value, dict):
        _wrong(where, value, "a mapping")
    given = {str(key).replace("-", "_"): one for key, one in value.items()}
    for key in given:
        if key not in allowed:
            close = difflib.get_close_matches(key, allowed, n=1)
            hint = f"Did you mean {close[0]}?" if close else f"Known are {', '.join(list(allowed)[:12])}."
            raise ConfigError(f"{where} has an unknown field {key!r}. {hint}", param=key)
    return given


def _known(name: Any, where: str, deployments: Collection[str]) -> str:
    if not isinstance(name, str) or name not in deployments:
        close = difflib.get_close_matches(str(name), deployments, n=1)
        hint = f"Did you mean {close[0]}?" if close else f"There are {', '.join(deployments)}."
        raise ConfigError(f"{where} leads to {name!r}, which is no deployment. {hint}", param=where)
    return name


def _number(given: Mapping[str, Any], name: str, where: str, low: float, high: float) -> float | None:
    value = given.get(name)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high or math.isnan(value):
        _wrong(f"{where}.{name}" if where else name, value, f"a number from {low:g} to {high:g}")
    return float(value)


def _count(given: Mapping[str, Any], name: str, where: str) -> int | None:
    value = given.get(name)
    if value is not None and (isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= 10**9):
        _wrong(f"{where}.{name}", value, "a whole number of at least 1")
    return value


def _is_address(url: str) -> bool:
    parts = http_address(url)
    if parts is None or not url.isascii():
        return False
    return not (parts.query or parts.fragment or parts.username or parts.password)


def _wrong(where: str, value: Any, expected: str) -> NoReturn:
    shown = repr(value)
    raise ConfigError(f"{where} is {shown[:80]}; it must be {expected}.", param=where)
