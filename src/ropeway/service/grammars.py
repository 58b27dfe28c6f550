"""Whether grammars that clients send can be compiled: found out aside, within limits, before the engine hears of them.

Nobody waits for it but the request itself. Verdicts are remembered, so that a schema which comes with every request
costs one trial.
"""

from __future__ import annotations

import asyncio
import hashlib
import queue
import threading
import time
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import msgspec

import ropeway.text
from ropeway.contract import SamplingParams
from ropeway.errors import OverloadedError, RequestError
from ropeway.text.grammar import param_of, vocabulary
from ropeway.text.sandbox import Sandbox, SandboxError
from ropeway.text.tokenizer import Tokenizer

_REMEMBERED = 1024
_BUSY = "busy"


@dataclass(frozen=True)
class GrammarLimits:
    """What trying one grammar may take: seconds of a processor, seconds by the clock, bytes of memory beyond what the
    worker has anyway; and how long it may wait for its turn."""

    seconds: float = 0.5
    deadline: float = 1.5
    max_memory: int = 256 * 1024 * 1024
    patience: float = 10.0


class Grammars:
    """The judges of one model's grammars. Safe to use from several threads.

    `eos_ids` end an answer. `workers` grammars are tried at a time; their processes start when they are needed.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        eos_ids: Sequence[int],
        *,
        limits: GrammarLimits | None = None,
        workers: int = 2,
    ) -> None:
        self._tokenizer = tokenizer
        self._eos_ids = tuple(eos_ids)
        self._limits = limits or GrammarLimits()
        self._pool = ThreadPoolExecutor(workers, thread_name_prefix="grammar")
        self._workers = workers
        self._idle: queue.SimpleQueue[Sandbox] = queue.SimpleQueue()
        self._sandboxes: list[Sandbox] = []
        self._starting = threading.Lock()
        self._settings = b""
        self._begin = threading.Lock()
        self._verdicts: OrderedDict[bytes, Future[tuple[str, str]]] = OrderedDict()

    async def check(self, sampling: SamplingParams) -> SamplingParams:
        """What holds under the grammar of `sampling`, if it has one and the engine can follow it. Raises RequestError,
        with the field that the grammar came from as `param`, or OverloadedError if too many want to know."""
        if not sampling.grammar:
            return sampling
        # Shielded, because others may wait for the same verdict.
        return self._settle(sampling, await asyncio.shield(asyncio.wrap_future(self._verdict(sampling.grammar))))

    def check_now(self, sampling: SamplingParams) -> SamplingParams:
        """The same for callers without an event loop."""
        return self._settle(sampling, self._verdict(sampling.grammar).result()) if sampling.grammar else sampling

    def close(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)
        for sandbox in self._sandboxes:
            sandbox.stop()

    def _verdict(self, grammar: str) -> Future[tuple[str, str]]:
        if not self._eos_ids:
            raise RequestError(
                "The model names no end token, so nothing could end an answer that follows a grammar.",
                param=param_of(grammar),
            )
        try:
            job = grammar.encode()
        except UnicodeEncodeError:
            raise RequestError(
                "The grammar has half a surrogate pair, which is not valid Unicode.", param=param_of(grammar)
            ) from None
        key = hashlib.sha256(job).digest()
        with self._begin:
            future = self._verdicts.get(key)
            if future is None:
                future = self._verdicts[key] = self._pool.submit(self._try, job, time.monotonic())
                if len(self._verdicts) > _REMEMBERED:
                    self._verdicts.popitem(last=False)
            else:
                self._verdicts.move_to_end(key)
        return future

    def _try(self, job: bytes, asked: float) -> tuple[str, str]:
        if time.monotonic() - asked > self._limits.patience:
            return _BUSY, ""
        sandbox = self._sandbox()
        try:
            verdict: tuple[str, str] = msgspec.msgpack.decode(sandbox.ask(job), type=tuple[str, str])
        except SandboxError as error:
            verdict = ("late" if error.late else "gone"), ""
        finally:
            self._idle.put(sandbox)
        return verdict

    def _sandbox(self) -> Sandbox:
        """One that is idle; a new one while there are fewer than may work at a time."""
        with self._starting:
            if self._idle.empty() and len(self._sandboxes) < self._workers:
                script = Path(ropeway.text.__path__[0]) / "grammar_worker.py"
                self._settings = self._settings or self._describe()
                self._sandboxes.append(Sandbox(script, self._settings, self._limits.deadline))
                return self._sandboxes[-1]
        return self._idle.get()

    def _describe(self) -> bytes:
        limits = self._limits
        settings = {
            "vocabulary": vocabulary(self._tokenizer, self._eos_ids, self._tokenizer.vocab_size),
            "seconds": limits.seconds,
            "deadline": limits.deadline,
            "max_memory": limits.max_memory,
        }
        return msgspec.msgpack.encode(settings)

    def _settle(self, sampling: SamplingParams, verdict: tuple[str, str]) -> SamplingParams:
        """Do what follows from a verdict. Those that a busy machine may be to blame for are not remembered."""
        kind, text = verdict
        if kind == "ok":
            # An answer is complete when its grammar says so: a minimum beyond that could never be reached.
            return msgspec.structs.replace(sampling, min_tokens=0)
        if kind in ("late", "gone", _BUSY):
            with self._begin:
                self._verdicts.pop(hashlib.sha256(sampling.grammar.encode()).digest(), None)
        if kind == _BUSY:
            raise OverloadedError(
                f"Grammars were waiting for more than {self._limits.patience:g} s to be checked. Try again later.",
                retry_after=1.0,
            )
        what = {
            "late": f"takes longer than {self._limits.seconds:g} s to compile. Make it smaller.",
            "memory": f"takes more than {self._limits.max_memory // 2**20} MiB to compile. Make it smaller.",
            "deep": "is nested too deeply, or too long, to compile. Make it smaller.",
            "gone": "ended the process that should try it. Make it smaller.",
        }.get(kind, f"cannot be used: {text}. Correct it.")
        raise RequestError(f"The schema or grammar {what}", param=param_of(sampling.grammar))
