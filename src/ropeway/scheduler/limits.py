"""How many tokens may this sequence run now? Every limit answers alone; the smallest answer holds.

A limit that a sequence runs into also says so in words, which is what `why` tells a person.
"""

from __future__ import annotations

from collections.abc import Callable, Collection

from ropeway.kv import BlockPool
from ropeway.scheduler.forecast import Forecast
from ropeway.scheduler.peak import Peak
from ropeway.scheduler.resources import Resources
from ropeway.scheduler.sequence import Sequence, State

ANYBODY = 1 << 62


class Limit:
    """`aboard`: it holds back those on board too, not only those who would board. `passes`: how many may board before
    a sequence that stood before them, while this limit holds it back. Then the others wait for it."""

    name: str
    aboard = False
    passes = 0

    def begin(self, running: Collection[Sequence], line: Callable[[], list[Sequence]]) -> None:
        """Boarding begins. `running` is live: it grows as sequences board."""

    def cap(self, seq: Sequence, want: int) -> int:
        """At most this many of the `want` tokens now; 0 or less holds the sequence back. `want` is at least 1."""
        raise NotImplementedError

    def boards(self, seq: Sequence) -> None:
        """`seq` is on board from now on, with its matched blocks."""

    def leaves(self, seq: Sequence) -> None:
        """`seq` is put back or has ended, and is about to give back its blocks."""

    def why(self, seq: Sequence) -> str:
        """What this limit lacks for `seq`, and what must happen first."""
        raise NotImplementedError


class TokenLimit(Limit):
    """The step's token budget. Whoever plans a row takes its tokens from `left`. Without chunked prefill a sequence
    runs everything it wants in one step, or nothing."""

    name = "tokens"
    aboard = True

    def __init__(self, in_parts: bool) -> None:
        self.left = self._budget = 0
        self._in_parts, self.passes = in_parts, 0 if in_parts else 16

    def fill(self, tokens: int, used: int = 0) -> None:
        """The step may carry `tokens`, of which more urgent rows have taken `used`."""
        self.left, self._budget = tokens - used, tokens

    def cap(self, seq: Sequence, want: int) -> int:
        return want if want <= self.left else self.left if self._in_parts else 0

    def why(self, seq: Sequence) -> str:
        if not self._in_parts:
            return f"its {seq.known - seq.computed} tokens must run in one step, which has {max(0, self.left)} left"
        beside = " beside interactive requests" if seq.urgency else ""
        return f"the step's budget of {self._budget} tokens{beside} is taken by requests before it"


class SlotLimit(Limit):
    """A sequence needs a seat; the last `reserved` ones are not for background work."""

    name = "seats"

    def __init__(self, slots: int, reserved: int) -> None:
        self._slots, self._reserved = slots, reserved
        # Taken from the end: the lowest free number first, which keeps the runner's rows dense.
        self.free = list(range(slots - 1, -1, -1))

    def cap(self, seq: Sequence, want: int) -> int:
        return want if len(self.free) > (self._reserved if seq.urgency else 0) else 0

    def boards(self, seq: Sequence) -> None:
        seq.slot = self.free.pop()

    def leaves(self, seq: Sequence) -> None:
        self.free.append(seq.slot)
        seq.slot = -1

    def why(self, seq: Sequence) -> str:
        kept = f" or kept for interactive requests ({self._reserved})" if seq.urgency and self._reserved else ""
        return f"all {self._slots} seats are taken{kept}; the next request to finish frees one"


class BlockLimit(Limit):
    """A sequence needs KV blocks. To board, it must have room beside what those on board are expected to become, at the
    peak of it (see `Peak`), and `Forecast.reserve` must stay free for the error in that."""

    name = "kv-blocks"
    aboard = True
    passes = 16
    RENEW = 16  # steps in which somebody may board, after which expectations are asked for again

    def __init__(self, pool: BlockPool, block_size: int, forecast: Forecast) -> None:
        self._pool, self._block_size, self._forecast = pool, block_size, forecast
        self._running: Collection[Sequence] = ()
        self._spare = 0  # free blocks if all on board become as long as they may
        self._peak = Peak(())
        self._orphans = 0  # blocks held whose bringer has left
        self._left = 0  # steps for which these two hold

    def begin(self, running: Collection[Sequence], line: Callable[[], list[Sequence]]) -> None:
        self._running = running
        self._left -= 1
        self._spare = self._pool.available - sum([self._most(seq) for seq in running])

    def cap(self, seq: Sequence, want: int) -> int:
        if seq.state is State.RUNNING:
            left = (len(seq.blocks) + self._pool.available) * self._block_size - seq.computed
            return want if want <= left else left
        sure = self._most(seq) + self._pool.idle(seq.blocks) <= self._spare
        return want if sure or self._missing(seq) <= 0 else 0

    def boards(self, seq: Sequence) -> None:
        self._spare = self._pool.available - sum([self._most(one) for one in self._running])
        if self._left > 0:
            self._peak = Peak([*self._peak.crowd, self._outlook(seq, seq.shared)])

    def leaves(self, seq: Sequence) -> None:
        self._left = 0

    def why(self, seq: Sequence) -> str:
        return (
            f"it needs {max(1, self._missing(seq))} KV blocks more than will be free when all on board have become as "
            "long as expected; running requests must finish first"
        )

    def _most(self, seq: Sequence) -> int:
        """Blocks that `seq` may ask for yet."""
        return -(-(seq.end - 1) // self._block_size) - len(seq.blocks)

    def _outlook(self, seq: Sequence, shared: int) -> tuple[int, int]:
        """The tokens by which `seq` grows, and those that it holds without what it has from others."""
        # What is held now includes the next token, and the last one needs no KV.
        blocks = -(-(len(seq.tokens) + 1) // self._block_size) - shared
        return max(0, self._forecast.draw(seq) - 2), blocks * self._block_size

    def _missing(self, seq: Sequence) -> int:
        """Blocks that `seq`, whose `blocks` are matched but not yet held, lacks to board."""
        if not self._running:
            return 0  # the door refused what an empty pool cannot hold
        if self._left <= 0:
            self._left = self.RENEW
            self._forecast.survey(self._running)
            self._peak = Peak([self._outlook(one, one.shared) for one in self._running])
            self._orphans = self._pool.used - sum([len(one.blocks) - one.shared for one in self._running])
        growth, own = self._outlook(seq, len(seq.blocks) - self._pool.idle(seq.blocks))
        lacking = own // self._block_size - self._pool.available
        if lacking > 0:
            return lacking
        peak = self._orphans - (-self._peak.plus(growth, own) // self._block_size)
        return peak - round(self._pool.num_blocks * (1 - self._forecast.reserve))


class SharedPrefix(Limit):
    """Of waiting sequences with the same beginning one computes it and the others board when it is cached. Whoever
    computes it runs, so nobody waits for ever; if it is preempted or ends, the others are free to go. Nobody waits for
    one that is less urgent."""

    name = "shared-prefix"
    passes = ANYBODY

    def __init__(self, block_size: int) -> None:
        self._block_size = block_size
        self._coming: dict[bytes, Sequence] = {}  # names of blocks under way, and who computes each

    def boards(self, seq: Sequence) -> None:
        """It is going to compute its full blocks that are not cached."""
        for key in seq.keys[len(seq.blocks) :]:
            if self._coming.setdefault(key, seq).urgency > seq.urgency:
                self._coming[key] = seq

    def leaves(self, seq: Sequence) -> None:
        self.settle(seq, seq.keys[seq.published :])

    def settle(self, seq: Sequence, keys: list[bytes]) -> None:
        """`keys` of `seq` are cached now, or will not be computed by it after all."""
        for key in keys:
            if self._coming.get(key) is seq:
                del self._coming[key]

    def cap(self, seq: Sequence, want: int) -> int:
        return want if self._leader(seq) is None else 0

    def why(self, seq: Sequence) -> str:
        rid = getattr(self._leader(seq), "rid", None)
        return f"request {rid} computes the beginning of the prompt that both share; then it boards"

    def _leader(self, seq: Sequence) -> Sequence | None:
        """Who computes the first block that `seq` could match but cannot yet. Its last token is always its own."""
        first = seq.computed // self._block_size
        shareable = (len(seq.tokens) - 1) // self._block_size
        found = self._coming.get(seq.keys[first]) if first < min(shareable, len(seq.keys)) else None
        return found if found is not None and found.urgency <= seq.urgency else None


class StaticBatch(Limit):
    """Static batching, the baseline: whoever waits when a batch has ended makes up the next, and nobody else boards."""

    name = "static-batch"
    passes = ANYBODY

    def __init__(self, slots: int) -> None:
        self._slots = slots
        self._members: list[Sequence] = []

    def begin(self, running: Collection[Sequence], line: Callable[[], list[Sequence]]) -> None:
        self._members = [seq for seq in self._members if seq.state is not State.FINISHED]
        if not self._members:
            self._members = line()[: self._slots]

    def cap(self, seq: Sequence, want: int) -> int:
        return want if seq in self._members else 0

    def why(self, seq: Sequence) -> str:
        return f"batching is static and {len(self._members)} requests of the running batch have not finished"


class Limits:
    """All limits that apply, in the order in which they are asked."""

    def __init__(self, resources: Resources, pool: BlockPool, forecast: Forecast) -> None:
        self.tokens = TokenLimit(resources.chunked_prefill)
        self.slots = SlotLimit(resources.slots, resources.reserved_seats)
        self.shared = SharedPrefix(resources.block_size)
        self.blocks = BlockLimit(pool, resources.block_size, forecast)
        self._all: list[Limit] = [
            *([StaticBatch(resources.slots)] if resources.static_batching else []),
            self.slots,
            self.shared,
            self.tokens,
            self.blocks,
        ]
        self._aboard = [limit for limit in self._all if limit.aboard]
        self.places = (self.slots, self.blocks)  # what somebody else can give up

    def cap(self, seq: Sequence) -> tuple[int, Limit | None]:
        """How many tokens `seq` may run, and the limit that held it to that. None holds back who has come to its own
        end or to that of the model's context: the last token needs no KV."""
        count, holder = min(seq.known, seq.end - 1) - seq.computed, None
        for limit in self._aboard if seq.state is State.RUNNING else self._all:
            allowed = limit.cap(seq, count)
            if allowed < count:
                count, holder = allowed, limit
                if count <= 0:
                    break
        return count, holder

    def begin(self, running: Collection[Sequence], line: Callable[[], list[Sequence]]) -> None:
        for limit in self._all:
            limit.begin(running, line)

    def boards(self, seq: Sequence) -> None:
        for limit in self._all:
            limit.boards(seq)

    def leaves(self, seq: Sequence) -> None:
        for limit in self._all:
            limit.leaves(seq)
