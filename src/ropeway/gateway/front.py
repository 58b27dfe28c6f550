"""What a server with several models says where none is named: whether it is ready, how busy it is, and its end."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NoReturn

from ropeway.contract import EngineStats, ExecutorInfo, Ordered, Pinned, SamplingParams, Why
from ropeway.contract.channel import LinkState
from ropeway.contract.scene import Life, Scene
from ropeway.errors import RequestError
from ropeway.gateway.deployment import Deployment
from ropeway.service.request import TextRequest, TextService, TextStream
from ropeway.text.dialect import Dialect
from ropeway.text.tokenizer import PairLimits


class FrontService:
    """The `TextService` of the application that answers for no model. Whatever needs one is refused.

    `model_name` is the first of the models' names, for examples. `opened` is set when the deployments that start with
    the server have done so.
    """

    info: ExecutorInfo | None = None
    default_priority = 0
    eos_ids: tuple[int, ...] = ()
    max_model_len = 0
    sampling_defaults = SamplingParams()

    def __init__(self, model_name: str, deployments: Mapping[str, Deployment]) -> None:
        self.model_name = model_name
        self.opened = False
        self._deployments = deployments
        self._draining = False

    @property
    def state(self) -> LinkState:
        if self._draining:
            return LinkState.DRAINING
        if not self.opened:
            return LinkState.STARTING
        # One without anybody who takes requests is not dead: it comes back when one of them does.
        return LinkState.READY if any(not one.blocked for one in self._deployments.values()) else LinkState.STARTING

    @property
    def stats(self) -> EngineStats | None:
        """The sums over all local engines."""
        found = [service.stats for service in self.services() if service.stats is not None]
        if not found:
            return None
        names = [name for name in EngineStats.__struct_fields__ if isinstance(getattr(found[0], name), int | float)]
        return EngineStats(**{name: sum(getattr(stats, name) for stats in found) for name in names})

    @property
    def dialect(self) -> Dialect:
        _refuse()

    def reads(self, variable: str) -> bool:
        return False

    async def submit(self, request: TextRequest) -> TextStream:
        _refuse()

    async def tokenize(self, request: TextRequest) -> list[int]:
        _refuse()

    async def join(
        self, first: str, second: str, most: int | None = None, limits: PairLimits = (None, None)
    ) -> tuple[list[int], int]:
        _refuse()

    async def detokenize(
        self,
        tokens: Sequence[int],
        *,
        skip_special_tokens: bool = False,
        starts: bool = True,
        shown: frozenset[int] = frozenset(),
    ) -> str:
        _refuse()

    def token_strings(self, tokens: Sequence[int]) -> list[str]:
        _refuse()

    async def why(self, *rids: int) -> list[Why]:
        return []

    async def look(self, since: int = 0) -> Scene | None:
        return None

    async def recall(self, *rids: int) -> list[Life]:
        return []

    async def reorder(self, policy: str = "") -> Ordered:
        _refuse()

    async def pin(self, name: str = "", request: TextRequest | None = None) -> list[Pinned]:
        _refuse()

    def drain(self) -> None:
        self._draining = True
        for service in self.services():
            service.drain()

    def services(self) -> list[TextService]:
        """Those of the local models that are in memory."""
        backends = (one.backend for one in self._deployments.values())
        return [backend.service for backend in backends if backend.service is not None]


def _refuse() -> NoReturn:
    raise RequestError("This server has several models; name one of them.", param="model")
