"""From the tokens of an answer to what its reader sees: characters, stop strings, tokens in step with text."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from ropeway.text.detokenizer import IncrementalDecoder
from ropeway.text.stopper import StopAutomaton, Stopper


@dataclass(slots=True)
class Piece:
    """Text and the tokens that end in it. `stop` is the stop string that was found; nothing follows then."""

    text: str = ""
    tokens: list[int] = field(default_factory=list)
    stop: str | None = None


class OutputText:
    """One answer. A token is delivered when all of its text is, so text and tokens never get out of step.

    `count` is the number of tokens taken so far, up to and including the one that completed a stop string. Stop strings
    that are complete within the first `min_tokens` tokens do not count.
    """

    def __init__(
        self,
        decoder: IncrementalDecoder,
        stops: StopAutomaton | None = None,
        *,
        include_stop: bool = False,
        min_tokens: int = 0,
    ) -> None:
        self._decoder = decoder
        self._stopper = Stopper(stops, include=include_stop) if stops is not None else None
        self._min_tokens = min_tokens
        self._waiting: deque[tuple[int, int]] = deque()
        self._decoded = 0
        self._shown = 0
        self.count = 0

    def push(self, tokens: Sequence[int]) -> Piece:
        """Take the next tokens. Those after a stop string are dropped."""
        shown: list[str] = []
        stopper = self._stopper
        if stopper is None and len(tokens) == 1 and not self._waiting:
            # The usual case. Nothing is held, so what is decoded is shown, and neither needs to be counted.
            text = self._decoder.push(tokens)
            self.count += 1
            if not self._decoder.pending:
                return Piece(text, [tokens[0]])
            self._waiting.append((self._decoded + 1, tokens[0]))
            return Piece(text)
        for token in tokens:
            text = self._decoder.push((token,))
            self.count += 1
            self._decoded += len(text)
            # Held bytes will become one character at least: the token ends within that one.
            self._waiting.append((self._decoded + self._decoder.pending, token))
            if stopper is not None:
                text = stopper.push(text, armed=self.count > self._min_tokens)
                if stopper.matched is not None:
                    shown.append(text)
                    return self._all("".join(shown), stopper.matched)
            shown.append(text)
            self._shown += len(text)
        ready = []
        while self._waiting and self._waiting[0][0] <= self._shown:
            ready.append(self._waiting.popleft()[1])
        return Piece("".join(shown), ready)

    def finish(self, silent: Sequence[int] = ()) -> Piece:
        """The rest of the answer. `silent` are last tokens that have no text, such as the end token."""
        text = self._decoder.flush()
        self.count += len(silent)
        self._waiting.extend((0, token) for token in silent)
        if self._stopper is not None:
            text = self._stopper.push(text, armed=self.count > self._min_tokens)
            if self._stopper.matched is None:
                text += self._stopper.flush()
            return self._all(text, self._stopper.matched)
        return self._all(text, None)

    def _all(self, text: str, stop: str | None) -> Piece:
        tokens = [token for _, token in self._waiting]
        self._waiting.clear()
        return Piece(text, tokens, stop)
