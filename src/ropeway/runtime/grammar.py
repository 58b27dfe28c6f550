"""Rows that follow a grammar: which tokens may come next, worked out beside the forward pass.

A grammar is compiled once for all sequences that bring it, on a thread of its own, and each of them gets a copy that is
as far as its output. When a step begins, the copies take in the tokens chosen in the last one and make the masks for
this one, all rows in one call without the interpreter's lock. The sampler waits for them only when it has the logits.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from ropeway.config import EngineConfig
from ropeway.errors import EngineError, RequestError, RopewayError
from ropeway.hub import tokenizer_directory
from ropeway.modelspec import ModelSpec
from ropeway.runtime import cpu_info
from ropeway.runtime.sampler import Want
from ropeway.text.grammar import param_of, vocabulary
from ropeway.text.tokenizer import HubTokenizer

if TYPE_CHECKING:
    import llguidance

_REMEMBERED = 64
"""Compiled grammars that are kept for those who come later."""
Words = tuple[list[bytes], list[int], list[int]]
"""What `ropeway.text.grammar.vocabulary` gives."""


@dataclass
class _Follower:
    """How far a sequence has come in its grammar: `matcher` has taken in `consumed` tokens of output, and `mask` says
    what may come next. With `goes_on` it ends only where nothing else is possible."""

    grammar: str
    goes_on: bool
    matcher: llguidance.LLMatcher | None = None
    consumed: int = 0
    mask: NDArray[np.uint32] | None = None
    error: RopewayError | None = None


class Grammars:
    """The `Guide` of a runner. `words` reads the vocabulary, on first need; `threads` make masks at a time."""

    def __init__(self, words: Callable[[], Words], threads: int = 1) -> None:
        self._words = words
        self._threads = threads
        self._reading, self._keeping = threading.Lock(), threading.Lock()
        self._compiled: OrderedDict[str, Future[llguidance.LLMatcher]] = OrderedDict()
        self._compilers = ThreadPoolExecutor(2, thread_name_prefix="grammar-compiler")
        self._masker = ThreadPoolExecutor(1, thread_name_prefix="grammar-masks")
        self._job: Future[None] = Future()

    def prepare(self, grammar: str) -> Future[llguidance.LLMatcher]:
        """Have a grammar compiled, so that it is there when it is needed."""
        with self._keeping:
            future = self._compiled.get(grammar)
            if future is None:
                future = self._compiled[grammar] = self._compilers.submit(self._compile, grammar)
                if len(self._compiled) > _REMEMBERED:
                    self._compiled.popitem(last=False)
            self._compiled.move_to_end(grammar)
        return future

    def begin(self, wants: Sequence[Want]) -> None:
        work = []
        for want in wants:
            seat = want.seat
            if not isinstance(seat.matcher, _Follower):
                seat.matcher = _Follower(seat.sampling.grammar, seat.sampling.ignore_eos)
                self.prepare(seat.sampling.grammar)
            work.append((seat.matcher, want.tokens[seat.prompt_len :]))
        self._job = self._masker.submit(self._advance, work)

    def masks(self, wants: Sequence[Want]) -> Sequence[NDArray[np.uint32] | RopewayError | None]:
        try:
            self._job.result()
        except Exception as error:
            return [EngineError(f"Making masks failed with {type(error).__name__}: {error}.")] * len(wants)
        followers = [want.seat.matcher for want in wants]
        return [follower.error or follower.mask for follower in followers if isinstance(follower, _Follower)]

    # On threads beside the step's

    @cached_property
    def _library(self) -> tuple[llguidance.LLTokenizer, llguidance.LLExecutor | None, NDArray[np.uint32]]:
        """The vocabulary, the threads that help to make masks, and the mask of the tokens that end an answer."""
        import llguidance

        from ropeway.text.grammar_worker import Vocabulary

        words = Vocabulary(*self._words())
        if not words.ends:
            raise RequestError("The model names no end token, so nothing could end an answer that follows a grammar.")
        ends = np.zeros(-(-len(words.tokens) // 32), np.uint32)
        for token in words.ends:
            ends[token // 32] |= np.uint32(1 << token % 32)
        # A single helper would only be one more thread to wait for.
        return words.build(), llguidance.LLExecutor(num_threads=self._threads) if self._threads > 1 else None, ends

    def _compile(self, grammar: str) -> llguidance.LLMatcher:
        from ropeway.text.grammar_worker import compiled

        with self._reading:
            tokenizer, _, _ = self._library
        matcher = compiled(tokenizer, grammar)
        if matcher.is_error():
            raise _refusal(grammar, "cannot be compiled", matcher)
        return matcher

    def _advance(self, work: list[tuple[_Follower, NDArray[np.int32]]]) -> None:
        """Bring each follower up to its output, and make its mask. What goes wrong is its own error."""
        steps: list[tuple[llguidance.LLMatcher, int]] = []
        live: list[tuple[_Follower, llguidance.LLMatcher, NDArray[np.int32]]] = []
        for follower, output in work:
            if follower.matcher is None and follower.error is None:
                self._start(follower)
            matcher = follower.matcher
            if matcher is None or follower.error is not None:
                continue
            live.append((follower, matcher, output))
            new = output[follower.consumed :].tolist()
            follower.consumed = len(output)
            if len(new) == 1 and not matcher.is_stopped():
                steps.append((matcher, new[0]))
            elif new and not matcher.is_stopped():
                matcher.consume_tokens(new)
        if not live:
            return
        _, executor, ends = self._library
        masks = np.empty((len(live), len(ends)), np.uint32)
        rows = [(matcher, row) for row, (_, matcher, _) in enumerate(live)]
        if executor is not None:
            if steps:
                executor.consume_token_par(steps)
            executor.unsafe_compute_mask_ptr(rows, masks.ctypes.data, ends.nbytes, len(rows))
        else:
            for matcher, token in steps:
                matcher.consume_token(token)
            base = masks.ctypes.data
            for matcher, row in rows:
                matcher.unsafe_compute_mask_ptr(base + row * ends.nbytes, ends.nbytes)
        for row, (follower, matcher, output) in enumerate(live):
            if matcher.is_error():
                self._start_again(follower, output, masks[row])
            follower.mask = masks[row]
            if follower.goes_on and (rest := masks[row] & ~ends).any():
                follower.mask = rest

    def _start(self, follower: _Follower) -> None:
        try:
            follower.matcher = self.prepare(follower.grammar).result().deep_copy()
        except RopewayError as error:
            follower.error = error
        except BaseException as error:  # a panic of the library is one that is no Exception
            follower.error = EngineError(f"Compiling a grammar failed with {type(error).__name__}: {error}.")

    def _start_again(self, follower: _Follower, output: NDArray[np.int32], mask: NDArray[np.uint32]) -> None:
        """Copies of a grammar share what they have learned of it, and that has a limit: one that fails, perhaps for
        what others have left behind, gets a second chance by itself."""
        with self._keeping:
            self._compiled.pop(follower.grammar, None)
        self._start(follower)
        matcher = follower.matcher
        if matcher is None or follower.error is not None:
            return
        if len(output):
            matcher.consume_tokens(output.tolist())
        matcher.unsafe_compute_mask_ptr(mask.ctypes.data, mask.nbytes)
        if matcher.is_error():
            follower.error = _refusal(follower.grammar, "cannot be followed any further", matcher)


def _refusal(grammar: str, what: str, matcher: llguidance.LLMatcher) -> RequestError:
    from ropeway.text.grammar_worker import reason

    return RequestError(
        f"The schema or grammar {what}: {reason(matcher.get_error())}. Make it simpler.", param=param_of(grammar)
    )


def open_grammars(config: EngineConfig, spec: ModelSpec, directory: Path) -> Grammars:
    """The guide of the model in `directory`. Its vocabulary is read when the first grammar comes."""

    def words() -> Words:
        place = directory if config.tokenizer is None else tokenizer_directory(config.tokenizer, config.download_dir)
        tokenizer = HubTokenizer.load(place)
        ends = [*spec.eos_ids, *([] if tokenizer.eos_id is None else [tokenizer.eos_id])]
        return vocabulary(tokenizer, list(dict.fromkeys(ends)), spec.vocab)

    # As many as leave half of the processor to the forward pass beside them.
    return Grammars(words, threads=min(8, max(1, cpu_info.detect().cores // 2)))
