"""What one request takes of its account's limits, from the door to its end."""

from __future__ import annotations

from collections.abc import Callable

from ropeway.accounts.account import NANO, Account
from ropeway.accounts.bucket import Loan
from ropeway.accounts.charges import Used, amounts_of
from ropeway.accounts.prices import Prices
from ropeway.accounts.standing import Standing
from ropeway.accounts.usage import Ledger
from ropeway.errors import BudgetError, ContextLengthError, UnknownModelError


class Meter:
    """The account of one HTTP request, which one answer may belong to; see `service.request.Meter`.

    Whoever stands at the door calls `enter` and `leave`; whoever makes the answer, `begin`, `reserve` for each
    sequence, and `end`. The request counts as under way until both are done. `model` is the name that the client used,
    where that is another one than the deployment's; set it before `begin`. `cost` is known after `end`, in billionths
    of the currency's unit.

    A `job` asks no rates, which are its queue's, but models and budget. What it uses is in `used` instead of in the
    ledger: it is entered with its answer, where that is kept.
    """

    def __init__(
        self,
        ledger: Ledger,
        prices: Prices,
        *,
        standing: Standing | None,
        tenant: str,
        job: bool,
        clock: Callable[[], int],
        now: Callable[[], float],
    ) -> None:
        self.model: str | None = None
        self.cost: int | None = None
        self.used: Used | None = None
        self._ledger = ledger
        self._prices = prices
        self._standing = standing
        self._tenant = tenant
        self._job = job
        self._limited = standing is not None and not job
        self._clock = clock
        self._now = now
        self._served = ""
        self._holders = 0
        self._sequences = 0
        self._loan = Loan()
        self._held = (0, 0)

    @property
    def account(self) -> Account | None:
        return self._standing.account if self._standing is not None else None

    def enter(self) -> None:
        """Count the request. Raises RateLimitError."""
        if self._standing is not None and self._limited:
            self._standing.enter(self._clock())
        self._join()

    def leave(self) -> None:
        """The request has been answered. Call it once for each `enter` that raised nothing."""
        self._part()

    def begin(self, model: str) -> None:
        """An answer of `model` is asked for. Raises UnknownModelError if the key may not use it, BudgetError if it must
        not spend more than a certain sum and nobody knows what the model costs."""
        self._served = self.model or model
        standing = self._standing
        if standing is not None:
            check_model(standing.account, self._served)
            if standing.account.limits.budget_cost is not None and self._prices.of(self._served) is None:
                raise BudgetError(
                    f"This key has a budget in money, and the model {self._served} has no price. Ask whoever runs "
                    "the server to add it to --prices."
                )
        self._join()
        self._ledger.start(self._served)

    def reserve(self, prompt: int, answer: int | None, longest: int | None = None) -> None:
        """A sequence is about to run: so many tokens of prompt, and at most so many of answer, or as many as it likes.
        For several at once `longest` is the longest prompt. Raises RopewayError if the key may not have so many."""
        standing = self._standing
        self._sequences += 1
        if standing is None:
            return
        most = standing.account.limits.max_prompt_tokens
        longest = prompt if longest is None else longest
        if most is not None and longest > most:
            message = f"A prompt of this key may have {most} tokens. However, yours has {longest}. Shorten it."
            raise ContextLengthError(message, param="prompt")
        likely = standing.expected if answer is None else answer
        if standing.account.limits.has_budget:
            cost = self._prices.cost(self._served, prompt, 0, likely) or 0
            standing.hold(prompt + likely, cost, self._now())
            self._held = (self._held[0] + prompt + likely, self._held[1] + cost)
        if self._limited:
            standing.reserve(prompt, answer, self._clock(), self._loan)

    def end(self, prompt: int, cached: int, answer: int) -> None:
        """The answer is over, however it ended, and has used so many tokens: of prompts, of which `cached` were in the
        prefix cache, and of answers. Nothing at all means that it was refused. Call it once for each `begin` that
        raised nothing."""
        self._ledger.stop(self._served, prompt - cached + answer)
        standing, used = self._standing, prompt + answer
        self.cost = self._prices.cost(self._served, prompt, cached, answer) if used else None
        if standing is not None:
            if self._limited:
                standing.settle(self._loan, used, self._clock())
            if answer and self._sequences:
                standing.learn(answer / self._sequences)
            standing.spend(self._held, (used, self.cost or 0), self._now())
        self._sequences, self._loan, self._held = 0, Loan(), (0, 0)
        if used:
            found = Used(model=self._served, prompt=prompt, cached=cached, answer=answer)
            if self._job:
                self.used = found.plus(self.used)
            else:
                key = standing.account.id if standing is not None else ""
                self._ledger.add(key, self._tenant, self._served, amounts_of(found, self._prices))
        self._part()

    def forgive(self) -> None:
        """Nobody gets what a job has made: it costs nothing."""
        used, self.used = self.used, None
        if used is not None and self._standing is not None:
            cost = amounts_of(used, self._prices).cost
            self._standing.spend((0, 0), (-used.prompt - used.answer, -cost), self._now())

    def headers(self) -> list[tuple[bytes, bytes]]:
        """What to tell the client of its limits, and of the cost if that is known."""
        found = self._standing.headers(self._clock()) if self._standing is not None else []
        if self.cost is not None:
            found.append((b"x-ropeway-cost", in_units(self.cost).encode()))
        return found

    def _join(self) -> None:
        self._holders += 1
        if self._holders == 1 and self._standing is not None and self._limited:
            self._standing.running += 1

    def _part(self) -> None:
        self._holders -= 1
        if self._holders == 0 and self._standing is not None and self._limited:
            self._standing.running -= 1


def check_model(account: Account, model: str) -> None:
    """Raises UnknownModelError, with the words for a model that is not there, if the account may not use it."""
    if not account.allows(model):
        raise UnknownModelError.of(model, f"Your key may use {', '.join(account.limits.models)}.")


def in_units(cost: int) -> str:
    """Billionths as a decimal number of units, without an exponent: 0.0000042."""
    return f"{cost // NANO}.{cost % NANO:09}".rstrip("0").rstrip(".")
