"""Where a server is, who asks it, and for which model."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final
from urllib.parse import urlsplit

from ropeway.config.address import http_address
from ropeway.errors import ConfigError

if TYPE_CHECKING:
    import openai

_LOOPBACK: Final = {"127.0.0.1", "localhost", "::1"}
_HERE: Final = "http://127.0.0.1:8000/v1"
_NO_KEY: Final = {"empty", "none", "unused"}
"""What people write for a server that asks for no key."""

_PLACEHOLDER: Final = re.compile(
    r"<.*>|\[.*\]|\{.*\}|(\w{2}-)?[x*.…-]+|.*your[-_ ].*|.*(api|secret|access)[-_ ]?(key|token).*|.*change[-_ ]?me.*|"
    r".*(placeholder|insert|replace)[-_ ].*|.*\.\.\.",
    re.IGNORECASE,
)


@dataclass(frozen=True, kw_only=True)
class Endpoint:
    """An OpenAI-compatible server and a model on it.

    `base_url`: OPENAI_BASE_URL if empty, or else a Ropeway on this machine. `api_key`: ROPEWAY_API_KEY or
    OPENAI_API_KEY if None; "EMPTY" is for a server that wants none, and one on this machine needs none. `model`: the
    server's first if None. `timeout`: seconds for one answer with all its retries, and the longest silence of a
    stream. `max_retries`: how often a request is sent again after 408, 409, 429, 5xx or a lost connection, when the
    server's Retry-After says, or else after 0.5 s and doubling. Raises ConfigError for an address that is none, and for
    a key that is missing or still a placeholder.
    """

    base_url: str = ""
    api_key: str | None = field(default=None, repr=False)
    model: str | None = None
    timeout: float = 60.0
    max_retries: int = 3

    def __post_init__(self) -> None:
        if not self.base_url:
            object.__setattr__(self, "base_url", os.environ.get("OPENAI_BASE_URL") or _HERE)
        if http_address(self.base_url) is None:
            raise ConfigError(f"{self.base_url!r} is not an http:// or https:// address.", param="base_url")
        if not self.timeout > 0 or self.max_retries < 0:
            raise ConfigError("timeout must be above 0 seconds, and max_retries at least 0.", param="timeout")
        object.__setattr__(self, "api_key", _checked(self.api_key, self.local))

    @property
    def local(self) -> bool:
        """Whether the server is on this machine."""
        return urlsplit(self.base_url).hostname in _LOOPBACK

    def open(self, connections: int) -> openai.AsyncOpenAI:
        """The openai package's client with a pool of so many connections. Raises ConfigError if it is missing."""
        try:
            import openai
        except ImportError:
            raise ConfigError("The client needs the openai package: pip install 'ropeway[client]'.") from None
        import httpx2

        # A proxy from the environment cannot reach this machine's own loopback, so it is not asked to.
        pool = openai.DefaultAsyncHttpxClient(
            limits=httpx2.Limits(max_connections=connections, max_keepalive_connections=connections),
            timeout=httpx2.Timeout(self.timeout, connect=min(10.0, self.timeout)),
            trust_env=not self.local,
        )
        url = self.base_url.rstrip("/")
        return openai.AsyncOpenAI(
            base_url=url if urlsplit(url).path else url + "/v1",
            api_key=self.api_key,
            timeout=self.timeout,
            max_retries=self.max_retries,
            http_client=pool,
        )


def _checked(key: str | None, local: bool) -> str:
    """The key to send. Never shows it in an error."""
    if key is None:
        key = os.environ.get("ROPEWAY_API_KEY") or os.environ.get("OPENAI_API_KEY") or ("unused" if local else None)
        if key is None:
            raise ConfigError(
                "No API key: give api_key, or set ROPEWAY_API_KEY or OPENAI_API_KEY. "
                'A server that asks for none is told so by api_key="EMPTY".',
                param="api_key",
            )
    key = key.strip()
    if not key:
        raise ConfigError(
            'The API key is empty. Give a key, or "EMPTY" for a server that asks for none.', param="api_key"
        )
    if not (key.isascii() and key.isprintable()):
        raise ConfigError("The API key has characters that cannot be sent. Copy it again.", param="api_key")
    if key.lower() not in _NO_KEY and _PLACEHOLDER.fullmatch(key):
        message = "The API key is the placeholder of an example. Put a real one in its place."
        raise ConfigError(message, param="api_key")
    return key
