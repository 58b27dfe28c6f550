"""What became of one request at one deployment, and the seam for whoever splits traffic by it."""

from __future__ import annotations

from typing import Final, Protocol

from msgspec import Struct

CLIENT_GONE: Final = 499
"""Status of a request whose client left: nobody's failure."""


class Outcome(Struct, frozen=True, kw_only=True):
    """One attempt, blamed on exactly one deployment. Times are in seconds from the moment it was sent there.

    `status` is the HTTP status that the deployment answered; 502 if it could not be reached or broke off, 504 if it was
    too slow, 499 if the client left. `began`: bytes of its answer went to the client, so `broken` means that a client
    has seen half an answer. `ttft_s` is when the first text of a stream came, `itl_s` the mean time between its texts;
    both are None for an answer in one piece. `tokens` is what the answer says it has generated, and where it does not
    say, the number of texts.
    """

    status: int
    latency_s: float
    ttft_s: float | None = None
    itl_s: float | None = None
    tokens: int = 0
    streamed: bool = False
    began: bool = False
    broken: bool = False

    @property
    def failed(self) -> bool:
        """Whether the deployment is to blame: it answered 5xx, broke off or was too slow. A refusal because it is full
        (429, 503) is no failure, and neither is a wrong request or a client that left."""
        return self.broken or (self.status >= 500 and self.status != 503)

    @property
    def busy(self) -> bool:
        """Whether it refused because it has too much to do."""
        return not self.broken and self.status in (429, 503)


class Splitter(Protocol):
    """Divides the traffic of one route between deployments, such as a canary does."""

    def choose(self, key: str) -> str:
        """The deployment that requests with this key (a user, a session, an API key) go to. Cheap and without I/O."""

    def observe(self, deployment: str, outcome: Outcome, key: str) -> None:
        """Hear of every attempt at a request that it has chosen for, also of one elsewhere after the first has failed.
        `key` is the request's: answers to the same one resemble each other, which whoever counts them has to know."""
