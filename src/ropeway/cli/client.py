"""A streaming client for the terminal: one answer at a time, from any OpenAI-compatible server."""

from __future__ import annotations

import time
from collections.abc import Generator
from dataclasses import dataclass, field
from typing import Any, BinaryIO

import httpx2
import msgspec

from ropeway.bench.wire import Chunk, EventSplitter
from ropeway.config.address import http_address
from ropeway.errors import ConfigError, RequestError, RopewayError

_LOOPBACK = {"127.0.0.1", "localhost", "::1"}


@dataclass
class Timing:
    """What an answer took; seconds. `tokens` is the server's count, or the number of chunks if it gave none."""

    begun: float = field(default_factory=time.perf_counter)
    ttft: float = 0.0
    last: float = 0.0
    tokens: int = 0
    prompt_tokens: int = 0

    def note(self, chunk: Chunk, counted: int) -> None:
        now = time.perf_counter() - self.begun
        if chunk.text:
            self.ttft = self.ttft or now
            self.last = now
            self.tokens = counted
        if chunk.usage is not None:
            self.tokens, self.prompt_tokens = chunk.usage.completion_tokens, chunk.usage.prompt_tokens

    @property
    def rate(self) -> float:
        """Tokens per second after the first."""
        return (self.tokens - 1) / (self.last - self.ttft) if self.tokens > 1 and self.last > self.ttft else 0.0

    def __str__(self) -> str:
        return (
            f"{self.prompt_tokens} tokens in, {self.tokens} out, "
            f"first after {self.ttft * 1000:.0f} ms, then {self.rate:.1f} tokens/s"
        )


class Client:
    """Talks to the server at `url`, with or without a trailing /v1."""

    def __init__(self, url: str, *, api_key: str | None = None, model: str | None = None) -> None:
        parts = http_address(url)
        if parts is None:
            raise ConfigError(f"{url!r} is not an http:// or https:// address. Check --url.", param="url")
        if api_key and not (api_key.isascii() and api_key.isprintable()):
            message = "The API key has characters that cannot be sent. Check --api-key and ROPEWAY_API_KEY."
            raise ConfigError(message, param="api_key")
        self.url = url.rstrip("/").removesuffix("/v1")
        headers = {"authorization": f"Bearer {api_key}"} if api_key else {}
        # A proxy from the environment cannot reach this machine's own loopback, so it is not asked to.
        trust = parts.hostname not in _LOOPBACK
        self._http = httpx2.Client(headers=headers, timeout=httpx2.Timeout(None, connect=10.0), trust_env=trust)
        self._model = model

    def close(self) -> None:
        """End the connections. Idempotent."""
        self._http.close()

    @property
    def model(self) -> str:
        """The model that is asked for; the server's first unless one was named. Raises RopewayError."""
        if self._model is None:
            try:
                self._model = str(self.call("GET", "/v1/models")["data"][0]["id"])
            except (LookupError, TypeError):
                raise ConfigError(f"{self.url}/v1/models has no model list: is this an OpenAI server?") from None
        return self._model

    def call(self, method: str, path: str, body: Any = None) -> Any:
        """The JSON at `path`. `body` is sent as JSON unless it is None. Raises RopewayError."""
        sent = {} if body is None else {"json": body}
        try:
            response = self._http.request(method, f"{self.url}{path}", timeout=10.0, **sent)
        except httpx2.TransportError as error:
            raise self._unreachable(error) from None
        return self._json_of(response)

    def upload(self, path: str, name: str, file: BinaryIO, fields: dict[str, str]) -> Any:
        """Send `file` in a form with `fields`, as it is read. The JSON of the answer. Raises RopewayError."""
        try:
            response = self._http.post(self.url + path, files={"file": (name, file, "application/jsonl")}, data=fields)
        except httpx2.TransportError as error:
            raise self._unreachable(error) from None
        return self._json_of(response)

    def download(self, path: str, to: BinaryIO) -> None:
        """Write the bytes at `path` into `to` as they come. Raises RopewayError."""
        try:
            with self._http.stream("GET", self.url + path) as response:
                if response.status_code != 200:
                    raise _refusal(response.status_code, response.read())
                for piece in response.iter_bytes():
                    to.write(piece)
        except httpx2.TransportError as error:
            raise self._unreachable(error) from None

    def follow(self, path: str) -> Generator[Any, None, None]:
        """The JSON of each event at `path` as it comes. Raises RopewayError."""
        splitter = EventSplitter()
        try:
            with self._http.stream("GET", self.url + path) as response:
                if response.status_code != 200:
                    raise _refusal(response.status_code, response.read())
                for piece in response.iter_bytes():
                    for data in splitter.push(piece):
                        yield msgspec.json.decode(data)
        except httpx2.TransportError as error:
            raise self._unreachable(error) from None
        except msgspec.MsgspecError as error:
            raise _invalid(error) from None

    def stream(self, path: str, fields: dict[str, Any], timing: Timing) -> Generator[str, None, None]:
        """The texts of one answer as they arrive; `timing` is filled in on the way. Raises RopewayError."""
        body = {
            "model": self.model,
            "stream": True,
            "stream_options": {"include_usage": True},
            **{name: value for name, value in fields.items() if value is not None},
        }
        splitter, counted = EventSplitter(), 0
        try:
            with self._http.stream("POST", self.url + path, json=body) as response:
                if response.status_code != 200:
                    raise _refusal(response.status_code, response.read())
                for piece in response.iter_bytes():
                    for data in splitter.push(piece):
                        if data == b"[DONE]":
                            return
                        chunk = msgspec.json.decode(data, type=Chunk)
                        if chunk.error is not None:
                            raise RequestError(_message(chunk.error))
                        counted += bool(chunk.text)
                        timing.note(chunk, counted)
                        if chunk.text:
                            yield chunk.text
        except httpx2.TransportError as error:
            raise self._unreachable(error) from None
        except msgspec.MsgspecError as error:
            raise _invalid(error) from None

    def _json_of(self, response: httpx2.Response) -> Any:
        if response.status_code != 200:
            raise _refusal(response.status_code, response.content)
        try:
            return response.json()
        except ValueError:
            message = f"{response.url} does not answer with JSON: is this an OpenAI server? Check --url."
            raise ConfigError(message, param="url") from None

    def _unreachable(self, error: Exception) -> ConfigError:
        return ConfigError(
            f"No server answers at {self.url} ({error}). Start one in another terminal with `ropeway serve`, "
            "or give the address of yours with --url."
        )


def _message(error: Any) -> str:
    return str(error.get("message", error)) if isinstance(error, dict) else str(error)


def _invalid(error: Exception) -> RequestError:
    return RequestError(f"The server sent a chunk that is not valid: {error}.")


def _refusal(status: int, body: bytes) -> RopewayError:
    try:
        message = _message(msgspec.json.decode(body)["error"])
    except (msgspec.MsgspecError, LookupError, TypeError):
        message = body[:300].decode("utf-8", "replace")
    if status == 401:
        return ConfigError(f"{message} Give the key with --api-key or ROPEWAY_API_KEY.")
    return RequestError(f"HTTP {status}: {message}")
