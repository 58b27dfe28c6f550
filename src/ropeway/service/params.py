"""The bounds of sampling parameters, in one place for every way in."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import msgspec

from ropeway.contract import SamplingParams
from ropeway.errors import RequestError

FIT = -1
"""`max_tokens` of a request that wants as many tokens as the context has room for."""

MAX_STOPS = 64
MAX_STOP_CHARS = 1024
MAX_STOP_IDS = 1024
MAX_BIASES = 1024
MAX_BAD_WORDS = 256
MAX_ALLOWED = 2**18
MAX_LOGPROBS = 20
_INT64 = 2**63


def validate(
    sampling: SamplingParams, *, vocab_size: int | None = None, max_logprobs: int = MAX_LOGPROBS
) -> SamplingParams:
    """The same parameters, checked and in the types that the contract names.

    `max_tokens` may be None or `FIT`; `stop` a string or any sequence of strings; `logit_bias` keys may be decimal
    strings, as in JSON. Token ids are checked against `vocab_size` if it is given. `max_logprobs` bounds `logprobs` and
    `prompt_logprobs`. Raises RequestError with `param`.
    """
    p = sampling
    seed = None if p.seed is None else _integer("seed", p.seed, -_INT64, _INT64 - 1)
    max_tokens = FIT if p.max_tokens is None or p.max_tokens == FIT else _integer("max_tokens", p.max_tokens, 1, 2**31)
    checked = SamplingParams(
        temperature=_number("temperature", p.temperature, 0.0, 100.0),
        top_p=_number("top_p", p.top_p, 0.0, 1.0, open_low=True),
        top_k=_integer("top_k", p.top_k, -1, 2**31),
        min_p=_number("min_p", p.min_p, 0.0, 1.0),
        seed=seed,
        presence_penalty=_number("presence_penalty", p.presence_penalty, -2.0, 2.0),
        frequency_penalty=_number("frequency_penalty", p.frequency_penalty, -2.0, 2.0),
        repetition_penalty=_number("repetition_penalty", p.repetition_penalty, 0.0, 10.0, open_low=True),
        logit_bias=_biases(p.logit_bias, vocab_size),
        max_tokens=max_tokens,
        min_tokens=_integer("min_tokens", p.min_tokens, 0, 2**31),
        stop=_texts("stop", p.stop, MAX_STOPS),
        stop_token_ids=_ids("stop_token_ids", p.stop_token_ids, vocab_size),
        include_stop_str_in_output=_flag("include_stop_str_in_output", p.include_stop_str_in_output),
        ignore_eos=_flag("ignore_eos", p.ignore_eos),
        skip_special_tokens=_flag("skip_special_tokens", p.skip_special_tokens),
        logprobs=_optional("logprobs", p.logprobs, max_logprobs),
        prompt_logprobs=_optional("prompt_logprobs", p.prompt_logprobs, max_logprobs),
        allowed_token_ids=_allowed(p.allowed_token_ids, vocab_size),
        bad_words=_texts("bad_words", p.bad_words, MAX_BAD_WORDS),
        bad_word_ids=_sequences("bad_word_ids", p.bad_word_ids, vocab_size),
        grammar=_grammar(p.grammar),
    )
    if max_tokens != FIT and checked.min_tokens > max_tokens:
        raise RequestError(
            f"min_tokens ({checked.min_tokens}) is above max_tokens ({max_tokens}). Lower it or raise max_tokens.",
            param="min_tokens",
        )
    return checked


def with_max_tokens(sampling: SamplingParams, room: int) -> SamplingParams:
    """`FIT` replaced by `room`, which is at least 1; `min_tokens` is lowered to it if need be."""
    if sampling.max_tokens != FIT:
        return sampling
    return msgspec.structs.replace(sampling, max_tokens=room, min_tokens=min(sampling.min_tokens, room))


def with_bad_words(sampling: SamplingParams, encode: Callable[[str, bool], list[int]]) -> SamplingParams:
    """`bad_words` as tokens, each as it is written at the beginning of a text and after a space. `encode` is that of a
    `Tokenizer`. Raises RequestError for a word that has no tokens."""
    if not sampling.bad_words:
        return sampling
    found = list(sampling.bad_word_ids)
    for word in sampling.bad_words:
        ways = [tuple(encode(text, False)) for text in (word.lstrip(), " " + word.lstrip())]
        if not any(ways):
            raise _wrong("bad_words", word, "made of words that have tokens")
        found += [way for way in ways if way]
    return msgspec.structs.replace(sampling, bad_word_ids=tuple(dict.fromkeys(found)))


def _wrong(param: str, value: Any, what: str) -> RequestError:
    shown = repr(value)
    if len(shown) > 60:
        shown = shown[:57] + "..."
    return RequestError(f"{param} is {shown}; it must be {what}.", param=param)


def _too_many(param: str, count: int, most: int) -> RequestError:
    return RequestError(f"{param} has {count} entries; at most {most} are allowed.", param=param)


def _number(param: str, value: Any, low: float, high: float, *, open_low: bool = False) -> float:
    what = f"a number {'above' if open_low else 'from'} {low:g} {'and at most' if open_low else 'to'} {high:g}"
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise _wrong(param, value, what)
    if isinstance(value, float) and not math.isfinite(value):
        raise _wrong(param, value, what)
    if not low <= value <= high or (open_low and value == low):
        raise _wrong(param, value, what)
    return float(value)


def _integer(param: str, value: Any, low: int, high: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise _wrong(param, value, f"a whole number from {low} to {high}")
    return int(value)


def _flag(param: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise _wrong(param, value, "true or false")
    return value


def _items(param: str, value: Any, most: int) -> Sequence[Any]:
    if not isinstance(value, list | tuple):
        raise _wrong(param, value, "a list")
    if len(value) > most:
        raise _too_many(param, len(value), most)
    return value


def _optional(param: str, value: Any, high: int) -> int | None:
    return None if value is None else _integer(param, value, 0, high)


def _texts(param: str, value: Any, most: int) -> tuple[str, ...]:
    if value is None:
        return ()
    items = _items(param, [value] if isinstance(value, str) else value, most)
    for item in items:
        if not isinstance(item, str) or not 1 <= len(item) <= MAX_STOP_CHARS:
            raise _wrong(param, item, f"a string of 1 to {MAX_STOP_CHARS} characters, or a list of those")
    return tuple(dict.fromkeys(items))


def _grammar(value: Any) -> str:
    if not isinstance(value, str):
        raise _wrong("grammar", value, "a grammar made by ropeway.text.grammar")
    return value


def _token_id(param: str, value: Any, vocab_size: int | None) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < (vocab_size or 2**31):
        most = f"below the vocabulary's {vocab_size}" if vocab_size else "from 0"
        raise _wrong(param, value, f"made of token ids {most}")
    return int(value)


def _ids(
    param: str, value: Any, vocab_size: int | None, most: int = MAX_STOP_IDS, *, unique: bool = True
) -> tuple[int, ...]:
    if value is None:
        return ()
    found = [_token_id(param, item, vocab_size) for item in _items(param, value, most)]
    return tuple(dict.fromkeys(found) if unique else found)


def _sequences(param: str, value: Any, vocab_size: int | None) -> tuple[tuple[int, ...], ...]:
    found = [_ids(param, item, vocab_size, unique=False) for item in _items(param, value, 2 * MAX_BAD_WORDS)]
    if () in found:
        raise _wrong(param, value, "made of lists with at least one token id each")
    return tuple(found)


def _allowed(value: Any, vocab_size: int | None) -> tuple[int, ...]:
    if isinstance(value, list) and not value:
        raise _wrong("allowed_token_ids", value, "left out, or name at least one token")
    return _ids("allowed_token_ids", value, vocab_size, MAX_ALLOWED)


def _biases(value: Any, vocab_size: int | None) -> dict[int, float]:
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise _wrong("logit_bias", value, "a mapping from token ids to numbers from -100 to 100")
    if len(value) > MAX_BIASES:
        raise _too_many("logit_bias", len(value), MAX_BIASES)
    biases: dict[int, float] = {}
    for key, bias in value.items():
        if isinstance(key, str) and key.isascii() and key.isdigit() and len(key) < 12:
            key = int(key)
        biases[_token_id("logit_bias", key, vocab_size)] = _number("logit_bias", bias, -100.0, 100.0)
    return biases


def check_tokens(tokens: Sequence[Any], vocab_size: int, *, param: str = "prompt") -> list[int]:
    """A prompt of token ids as a list. Raises RequestError if one is not an id below `vocab_size`."""
    if set(map(type, tokens)) - {int} or (tokens and not 0 <= min(tokens) <= max(tokens) < vocab_size):
        wrong = next(token for token in tokens if type(token) is not int or not 0 <= token < vocab_size)
        raise _wrong(param, wrong, f"made of token ids from 0 to {vocab_size - 1}")
    return list(tokens)
