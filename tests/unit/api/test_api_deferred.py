"""What is deferred, what cannot be, and how a guess is put into words."""

from __future__ import annotations

import pytest

from ropeway.api.deferred import deferral, in_words
from ropeway.api.inside import URLS, Asked, asked
from ropeway.errors import RequestError

CHAT = "/v1/chat/completions"


def test_a_body_says_so_or_says_nothing() -> None:
    for body in (b"", b"[]", b"{", b'{"deferred": tru', b"\xff", b"1" * 10000, b"[" * 100_000):
        assert asked(body) == Asked()
    assert asked(b'{"d\\u0065ferred": true, "messages": [1, {"deferred": false}]}').deferred is True


@pytest.mark.parametrize("path", sorted(URLS))
def test_every_endpoint_that_computes_can_be_deferred(path: str) -> None:
    assert deferral(path, Asked(deferred=True))
    for value in (None, False, 1, "true"):  # what is no boolean is the endpoint's to refuse
        assert not deferral(path, Asked(deferred=value))
    assert deferral(path, Asked(background=True)) is (path not in ("/v1/responses", "/v1/messages"))


@pytest.mark.parametrize(
    ("path", "said", "param"),
    [
        (CHAT, Asked(deferred=True, stream=True), "stream"),
        (CHAT, Asked(callback_url="https://example.com/"), "callback_url"),
        ("/v1/messages", Asked(background=True, callback_url="https://example.com/"), "callback_url"),
        ("/v1/responses", Asked(deferred=True, background=True), "background"),
    ],
)
def test_what_cannot_be_deferred_is_refused(path: str, said: Asked, param: str) -> None:
    with pytest.raises(RequestError) as refused:
        deferral(path, said)
    assert refused.value.param == param


def test_a_guess_in_words_holds_the_guess() -> None:
    assert in_words(None) is None
    assert in_words(360) == "4-8 minutes"
    for seconds in (0.0, 0.4, 5.0, 59.0, 61.0, 300.0, 3599.0, 7200.0, 100_000.0, 1e7):
        words = in_words(seconds)
        assert words is not None
        span, unit = words.split()
        size = {"seconds": 1, "minutes": 60, "hours": 3600, "days": 86400}[unit]
        low, high = (int(part) * size for part in span.split("-"))
        assert low <= seconds <= high
