"""Every error that Ropeway raises on purpose, as one tree.

    RopewayError                   code        who has to act
    ├── ConfigError                RW-CFG      the operator: a flag, a file, a variable
    ├── ModelError                 RW-MODEL    the operator: a checkpoint that is wrong, damaged or unknown
    ├── MemoryBudgetError          RW-MEM      the operator: weights or KV cache do not fit
    ├── KernelError                RW-KERNEL   the operator: a native kernel cannot be built or loaded
    ├── RequestError               RW-REQ      the client: this request can never succeed as it is
    │   ├── ContextLengthError     RW-CTX      prompt and answer exceed the model's context
    │   ├── NeverFitsError         RW-FIT      the request needs more KV blocks than exist
    │   ├── UnknownModelError      RW-NAME     no such model is served
    │   └── TemplateError          RW-TPL      the chat template refused these messages, or took too long
    ├── RateLimitError             RW-RATE     the client: later, its key has sent enough requests for now
    │   └── TokenLimitError        RW-TPM      its key has used enough tokens for now
    ├── BudgetError                RW-BUDGET   the operator: what a key may spend is spent
    ├── OverloadedError            RW-BUSY     the client: later, after `retry_after` seconds
    │   ├── NotReadyError          RW-LOAD     the engine is starting or restarting
    │   └── DrainingError          RW-DRAIN    the server is shutting down
    ├── StorageError               RW-DISK     the operator: what must last cannot be written
    ├── DeadlineError              RW-TIME     the client: the request's deadline passed
    ├── NumericalError             RW-NAN      the operator: the model produced NaN or infinity for this request
    └── EngineError                RW-ENGINE   the operator: the engine process failed

A message says what happened, with numbers, and ends with what to do next. Codes are stable; messages are not.
"""

from __future__ import annotations

from typing import ClassVar

MAX_SHOWN = 128
"""Characters of a name that a client sent, in an answer."""


class RopewayError(Exception):
    """Base of the tree. `param` names the request field or option at fault; `retry_after` is in seconds."""

    code: ClassVar[str] = "RW"

    def __init__(self, message: str, *, param: str | None = None, retry_after: float | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.retry_after = retry_after


class ConfigError(RopewayError):
    code = "RW-CFG"


class ModelError(RopewayError):
    code = "RW-MODEL"


class MemoryBudgetError(RopewayError):
    code = "RW-MEM"


class KernelError(RopewayError):
    """`cause` is the message without what to do next, for sentences that go on."""

    code = "RW-KERNEL"

    def __init__(
        self, cause: str, advice: str = "", *, param: str | None = None, retry_after: float | None = None
    ) -> None:
        super().__init__(f"{cause}. {advice}" if advice else cause, param=param, retry_after=retry_after)
        self.cause = cause


class RequestError(RopewayError):
    code = "RW-REQ"


class ContextLengthError(RequestError):
    code = "RW-CTX"


class NeverFitsError(RequestError):
    code = "RW-FIT"


class UnknownModelError(RequestError):
    code = "RW-NAME"

    @classmethod
    def of(cls, model: str, there_is: str) -> UnknownModelError:
        """In the words that OpenAI has for it. `there_is` says what may be asked for instead."""
        shown = model if len(model) <= MAX_SHOWN else model[:MAX_SHOWN] + "..."
        return cls(f"The model `{shown}` does not exist or you do not have access to it. {there_is}", param="model")


class TemplateError(RequestError):
    code = "RW-TPL"


class RateLimitError(RopewayError):
    """Without `retry_after` the request is larger than what its key may use at once."""

    code = "RW-RATE"


class TokenLimitError(RateLimitError):
    code = "RW-TPM"


class BudgetError(RopewayError):
    code = "RW-BUDGET"


class OverloadedError(RopewayError):
    code = "RW-BUSY"


class NotReadyError(OverloadedError):
    code = "RW-LOAD"


class DrainingError(OverloadedError):
    code = "RW-DRAIN"


class StorageError(RopewayError):
    code = "RW-DISK"


class DeadlineError(RopewayError):
    code = "RW-TIME"


class NumericalError(RopewayError):
    code = "RW-NAN"


class EngineError(RopewayError):
    code = "RW-ENGINE"


def _tree(root: type[RopewayError]) -> dict[str, type[RopewayError]]:
    found = {root.code: root}
    for child in root.__subclasses__():
        found.update(_tree(child))
    return found


BY_CODE: dict[str, type[RopewayError]] = _tree(RopewayError)
"""Code to class, so that an error that crossed a process boundary can be raised again as itself."""
