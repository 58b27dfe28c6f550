"""Choose a token for each row of logits on a GPU, by the rules of `runtime/draw.py`, without sorting.

A row is read in tiles by as many programs. The highest logit and the sum of the weights of each tile are enough for
rows that take the best or draw from all. For the others a histogram of the distances to the highest logit bounds how
far down the answer can lie, what is above that bound is copied together in the order of ids, and one program for each
row finds the thresholds among those few by narrowing an interval of the ordered bits of float32. If they are not few,
the same program reads the row itself.

Weights below e^-32 of the best token's are never drawn where a row truncates: all of a vocabulary of 256k of them weigh
less than 1e-8 of it.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from ropeway.runtime.draw import ALMOST, GREEDY_BELOW, NOT_FINITE

_GREEDY = tl.constexpr(GREEDY_BELOW)
_ALMOST = tl.constexpr(ALMOST)
_NOT_FINITE = tl.constexpr(NOT_FINITE)
_LEAST = tl.constexpr(1.2664165549094176e-14)  # e^-32
_BINS = tl.constexpr(128)
_PER_NAT = tl.constexpr(4.0)


@dataclass(frozen=True)
class Sizes:
    """Powers of two: logits in a tile, candidates that are kept of a row, how many of them are looked at at once, and
    the number of thresholds that are tried at once."""

    tile: int = 2048
    room: int = 4096
    chunk: int = 1024
    ways: int = 16


SIZES = Sizes()


def sample(
    logits: Tensor,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    min_p: Tensor,
    noise: Tensor,
    *,
    truncates: bool = True,
    sizes: Sizes = SIZES,
) -> Tensor:
    """See `ropeway.runtime.device_sampler.sample`. Never waits for the device."""
    logits = logits.float()
    if logits.stride(1) != 1:
        logits = logits.contiguous()
    rows, vocab = logits.shape
    tokens = torch.empty(rows, dtype=torch.int64, device=logits.device)
    if not rows:
        return tokens
    tiles = triton.cdiv(vocab, sizes.tile)
    padded = triton.next_power_of_2(tiles)
    maxima, sums = torch.empty((2, rows, tiles), dtype=torch.float32, device=logits.device)
    row = logits, logits.stride(0), vocab, tiles
    wishes = temperature, top_k, top_p, min_p
    _scan[(rows, tiles)](*row, temperature, maxima, sums, TILE=sizes.tile, num_warps=8)
    if truncates:
        found = torch.zeros((rows, _BINS.value), dtype=torch.int32, device=logits.device)
        upto = torch.empty((rows, tiles, _BINS.value), dtype=torch.int32, device=logits.device)
        values = torch.empty((rows, sizes.room), dtype=torch.float32, device=logits.device)
        ids = torch.empty((rows, sizes.room), dtype=torch.int32, device=logits.device)
        number = torch.empty(rows, dtype=torch.int32, device=logits.device)
        cut = {"TILE": sizes.tile, "TILES": padded}
        _count[(rows, tiles)](*row, *wishes, maxima, found, upto, **cut, num_warps=8)
        _gather[(rows, tiles)](
            *row, *wishes, maxima, sums, found, upto, values, ids, number, ROOM=sizes.room, **cut, num_warps=8
        )
        _select[(rows,)](
            *row, *wishes, noise, maxima, sums, values, ids, number, tokens,
            ROOM=sizes.room, CHUNK=sizes.chunk, WAYS=sizes.ways, TILES=padded, num_warps=8,
        )  # fmt: skip
    _pick[(rows,)](*row, *wishes, noise, maxima, sums, tokens, TILE=sizes.tile, TILES=padded, num_warps=8)
    return tokens


@triton.jit
def _wishes(temperature, top_k, top_p, min_p, row, vocab):
    """A row's wishes, its top_k 0 where it asks for none, and whether they cut anything off."""
    t = tl.load(temperature + row).to(tl.float32)
    k = tl.load(top_k + row).to(tl.int64)
    p = tl.load(top_p + row).to(tl.float64)
    least = tl.load(min_p + row).to(tl.float64)
    k = tl.where((k > 0) & (k < vocab), k, 0)
    cuts = (t >= _GREEDY) & ((k > 0) | (p < 1.0) | (least > 0.0))
    return t, k, p, least, cuts


@triton.jit
def _top(maxima, row, tiles, TILES: tl.constexpr):
    """The highest logit of a row; NaN if there is a NaN."""
    at = tl.arange(0, TILES)
    each = tl.load(maxima + row * tiles + at, mask=at < tiles, other=float("-inf"))
    top = tl.max(tl.where(each == each, each, float("-inf")))
    return tl.where(tl.sum((each != each).to(tl.int32)) > 0, float("nan"), top)


@triton.jit
def _total(maxima, sums, row, tiles, top, t, TILES: tl.constexpr):
    """The weight of all logits of a row."""
    at = tl.arange(0, TILES)
    highest = tl.load(maxima + row * tiles + at, mask=at < tiles, other=float("-inf"))
    part = tl.load(sums + row * tiles + at, mask=at < tiles, other=0.0)
    return tl.sum((part * tl.exp((highest - top) / t)).to(tl.float64))


@triton.jit
def _floor(top, t, least):
    """What a logit must reach to be drawn at all, by min_p and by `_LEAST`."""
    return (top.to(tl.float64) + t.to(tl.float64) * tl.log(tl.maximum(least, _LEAST))).to(tl.float32)


@triton.jit
def _bin(x, top, t):
    """How far `x` is below `top`, in steps of a quarter of a nat; _BINS for all that is farther."""
    return tl.minimum((top - x) / t * _PER_NAT, _BINS).to(tl.int32)


@triton.jit
def _ordered(x):
    """The bits of float32 numbers as integers in the same order, -0 like 0."""
    bits = (x + 0.0).to(tl.int32, bitcast=True)
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


@triton.jit
def _scan(logits, stride, vocab, tiles, temperature, maxima, sums, TILE: tl.constexpr):
    """The highest logit of a tile, NaN if there is one, and the sum of its weights relative to that."""
    row = tl.program_id(0).to(tl.int64)
    tile = tl.program_id(1)
    at = tile * TILE + tl.arange(0, TILE)
    x = tl.load(logits + row * stride + at, mask=at < vocab, other=float("-inf"))
    top = tl.max(tl.where(x == x, x, float("-inf")))
    t = tl.maximum(tl.load(temperature + row).to(tl.float32), _GREEDY)
    weights = tl.where(x > float("-inf"), tl.exp((x - top) / t), 0.0)
    unsound = tl.sum((x != x).to(tl.int32)) > 0
    tl.store(maxima + row * tiles + tile, tl.where(unsound, float("nan"), top))
    tl.store(sums + row * tiles + tile, tl.sum(weights))


@triton.jit
def _pick(
    logits, stride, vocab, tiles, temperature, top_k, top_p, min_p, noise, maxima, sums, tokens,
    TILE: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """The token of a row that takes the best or draws from all, or what is wrong with a row."""
    row = tl.program_id(0).to(tl.int64)
    t, _k, _p, _least, cuts = _wishes(temperature, top_k, top_p, min_p, row, vocab)
    top = _top(maxima, row, tiles, TILES)
    if tl.abs(top) < float("inf"):
        if cuts == 0:
            at = tl.arange(0, TILES)
            highest = tl.load(maxima + row * tiles + at, mask=at < tiles, other=float("-inf"))
            part = tl.load(sums + row * tiles + at, mask=at < tiles, other=0.0)
            scale = tl.maximum(t, _GREEDY)
            weights = (part * tl.exp((highest - top) / scale)).to(tl.float64)
            upto = tl.cumsum(weights)
            target = tl.load(noise + row).to(tl.float64) * tl.sum(weights)
            # The first tile whose end is beyond the target; rounding must not make it one that weighs nothing.
            end = tl.max(tl.where(weights > 0.0, at, 0))
            drawn = tl.min(tl.where((weights > 0.0) & (upto > target), at, end))
            best = tl.min(tl.where(highest == top, at, TILES))
            greedy = t < _GREEDY
            tile = tl.where(greedy, best, drawn)
            before = tl.sum(tl.where(at < tile, weights, 0.0))
            place = tl.arange(0, TILE)
            inside = tile * TILE + place
            x = tl.load(logits + row * stride + inside, mask=inside < vocab, other=float("-inf"))
            weight = tl.exp((x - top) / scale).to(tl.float64)
            last = tl.max(tl.where(weight > 0.0, place, 0))
            drawn = tl.min(tl.where((weight > 0.0) & (before + tl.cumsum(weight) > target), place, last))
            best = tl.min(tl.where(x == top, place, TILE))
            tl.store(tokens + row, (tile * TILE + tl.where(greedy, best, drawn)).to(tl.int64))
    else:
        tl.store(tokens + row, tl.cast(_NOT_FINITE, tl.int64))


@triton.jit
def _count(
    logits, stride, vocab, tiles, temperature, top_k, top_p, min_p, maxima, found, upto,
    TILE: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """How many logits of a tile lie in each bin and those above it, and of the row in each bin alone."""
    row = tl.program_id(0).to(tl.int64)
    tile = tl.program_id(1)
    t, _k, _p, _least, cuts = _wishes(temperature, top_k, top_p, min_p, row, vocab)
    top = _top(maxima, row, tiles, TILES)
    if cuts & (tl.abs(top) < float("inf")):
        at = tile * TILE + tl.arange(0, TILE)
        x = tl.load(logits + row * stride + at, mask=at < vocab, other=float("-inf"))
        bins = _bin(x, top, t)
        here = tl.histogram(bins, _BINS, mask=bins < _BINS)
        each = tl.arange(0, _BINS)
        tl.store(upto + (row * tiles + tile) * _BINS + each, tl.cumsum(here))
        tl.atomic_add(found + row * _BINS + each, here, mask=here > 0, sem="relaxed")


@triton.jit
def _gather(
    logits, stride, vocab, tiles, temperature, top_k, top_p, min_p, maxima, sums, found, upto, values, ids, number,
    ROOM: tl.constexpr, TILE: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """Copy what may be drawn of a tile behind what may be drawn of the tiles before it, if all of it has room."""
    row = tl.program_id(0).to(tl.int64)
    tile = tl.program_id(1)
    t, k, p, least, cuts = _wishes(temperature, top_k, top_p, min_p, row, vocab)
    top = _top(maxima, row, tiles, TILES)
    if cuts & (tl.abs(top) < float("inf")):
        at = tl.arange(0, TILES)
        bins = tl.arange(0, _BINS)
        here = tl.load(found + row * _BINS + bins)
        # top_p is a share of what top_k and min_p leave, so all of that must be there to be weighed.
        by_count = tl.where(k > 0, tl.sum((tl.cumsum(here) < k).to(tl.int32)), _BINS - 1)
        heaviest = here.to(tl.float64) * tl.exp(bins.to(tl.float32) / -_PER_NAT).to(tl.float64)
        below = tl.sum(heaviest) - tl.cumsum(heaviest)
        total = _total(maxima, sums, row, tiles, top, t, TILES)
        by_weight = tl.sum((below > (1.0 - p) * total * 0.9999).to(tl.int32))
        lowest = tl.where((k > 0) | (least > 0.0), by_count, by_weight)
        lowest = tl.minimum(lowest, tl.minimum(_bin(_floor(top, t, least), top, t), _BINS - 1))
        each = tl.load(upto + (row * tiles + at) * _BINS + lowest, mask=at < tiles, other=0)
        count = tl.sum(each)
        if tile == 0:
            tl.store(number + row, count)
        if count <= ROOM:
            where = tile * TILE + tl.arange(0, TILE)
            x = tl.load(logits + row * stride + where, mask=where < vocab, other=float("-inf"))
            taken = _bin(x, top, t) <= lowest
            place = row * ROOM + tl.sum(tl.where(at < tile, each, 0)) + tl.cumsum(taken.to(tl.int32)) - 1
            tl.store(values + place, x, mask=taken)
            tl.store(ids + place, where, mask=taken)


@triton.jit
def _chunk(logits, values, few, n, start, CHUNK: tl.constexpr):
    """`n` logits from `start`: of the candidates if they are `few`, else of the row."""
    at = start + tl.arange(0, CHUNK)
    candidate = tl.load(values + at, mask=at < tl.where(few, n, 0), other=float("-inf"))
    plain = tl.load(logits + at, mask=at < tl.where(few, 0, n), other=float("-inf"))
    return tl.where(few, candidate, plain)


@triton.jit
def _search(
    logits, values, few, n, low, high, wanted, top, t,
    BY_WEIGHT: tl.constexpr, CHUNK: tl.constexpr, WAYS: tl.constexpr,
):  # fmt: skip
    """The highest key within [low, high] such that the logits from it upwards weigh, or number, `wanted`; `low` if none
    of those above it does."""
    ways = tl.arange(0, WAYS).to(tl.int64) + 1
    while low < high:
        step = (high - low + WAYS - 1) // WAYS
        at = low + ways * step
        sums = tl.zeros([WAYS], dtype=tl.float64)
        for start in range(0, n, CHUNK):
            x = _chunk(logits, values, few, n, start, CHUNK)
            if BY_WEIGHT:
                weights = tl.exp((x - top) / t)
            else:
                weights = tl.full([CHUNK], 1.0, tl.float32)
            reached = _ordered(x)[:, None] >= at.to(tl.int32)[None, :]
            sums += tl.sum(tl.where(reached, weights[:, None], 0.0), axis=0).to(tl.float64)
        # Keys beyond `high` may not fit 32 bits; what was summed for them means nothing.
        steps = tl.sum(((at <= high) & (sums >= wanted)).to(tl.int64))
        low = low + steps * step
        high = tl.minimum(high, low + step - 1)
    return low


@triton.jit
def _tally(logits, values, few, n, at, top, t, CHUNK: tl.constexpr):
    """How many logits are above the key `at`, what they weigh, and how many are equal to it."""
    above = tl.zeros([CHUNK], dtype=tl.int64)
    equal = tl.zeros([CHUNK], dtype=tl.int64)
    weights = tl.zeros([CHUNK], dtype=tl.float64)
    for start in range(0, n, CHUNK):
        x = _chunk(logits, values, few, n, start, CHUNK)
        keys = _ordered(x).to(tl.int64)
        above += (keys > at).to(tl.int64)
        equal += (keys == at).to(tl.int64)
        weights += tl.where(keys > at, tl.exp((x - top) / t), 0.0).to(tl.float64)
    return tl.sum(above), tl.sum(weights), tl.sum(equal)


@triton.jit
def _weight(key, top, t):
    """The weight of a logit by its key."""
    bits = key.to(tl.int32)
    x = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits).to(tl.float32, bitcast=True)
    return tl.exp((x - top) / t).to(tl.float64)


@triton.jit
def _select(
    logits, stride, vocab, tiles, temperature, top_k, top_p, min_p, noise, maxima, sums, values, ids, number, tokens,
    ROOM: tl.constexpr, CHUNK: tl.constexpr, WAYS: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """The token of a row that truncates: above the key `at`, or one of its first `ties` equals."""
    row = tl.program_id(0).to(tl.int64)
    t, k, p, least, cuts = _wishes(temperature, top_k, top_p, min_p, row, vocab)
    top = _top(maxima, row, tiles, TILES)
    if cuts & (tl.abs(top) < float("inf")):
        count = tl.load(number + row)
        few = count <= ROOM
        n = tl.where(few, count, vocab)
        source = logits + row * stride
        candidates = values + row * ROOM
        high = _ordered(top).to(tl.int64)
        at = _ordered(_floor(top, t, least)).to(tl.int64)
        if k > 0:
            at = _search(source, candidates, few, n, at, high, k.to(tl.float64), top, t, False, CHUNK, WAYS)
        above, heavier, equal = _tally(source, candidates, few, n, at, top, t, CHUNK)
        ties = tl.where(k > 0, k - above, equal)
        if p < 1.0:
            total = heavier + tl.minimum(ties, equal).to(tl.float64) * _weight(at, top, t)
            # Where top_p alone cuts, there are no candidates but those that it may keep.
            whole = _total(maxima, sums, row, tiles, top, t, TILES)
            share = p * _ALMOST * tl.where((k > 0) | (least > 0.0), total, whole)
            key = _search(source, candidates, few, n, at, high, share, top, t, True, CHUNK, WAYS)
            above, heavier, equal = _tally(source, candidates, few, n, key, top, t, CHUNK)
            enough = tl.maximum(tl.ceil((share - heavier) / _weight(key, top, t)).to(tl.int64), 1)
            ties = tl.where(key == at, tl.minimum(ties, enough), enough)
            at = key
        target = heavier + tl.minimum(ties, equal).to(tl.float64) * _weight(at, top, t)
        target *= tl.load(noise + row).to(tl.float64)
        place = _invert(source, candidates, few, n, at, ties, target, top, t, CHUNK)
        token = tl.load(ids + row * ROOM + place, mask=few, other=0)
        tl.store(tokens + row, tl.where(few, token, place).to(tl.int64))


@triton.jit
def _invert(logits, values, few, n, at, ties, target, top, t, CHUNK: tl.constexpr):
    """The first kept logit at which the running sum of the weights exceeds `target`."""
    places = tl.arange(0, CHUNK)
    run = target * 0.0
    seen = ties * 0
    start = n * 0
    found = start - 1
    last = start
    while (found < 0) & (start < n):
        x = _chunk(logits, values, few, n, start, CHUNK)
        keys = _ordered(x).to(tl.int64)
        equal = (keys == at).to(tl.int64)
        kept = (keys > at) | ((equal > 0) & (seen + tl.cumsum(equal) <= ties))
        weights = tl.where(kept, tl.exp((x - top) / t), 0.0).to(tl.float64)
        first = tl.min(tl.where(kept & (run + tl.cumsum(weights) > target), places, CHUNK))
        end = tl.max(tl.where(kept, places, -1))
        found = tl.where(first < CHUNK, start + first, found)
        last = tl.where(end >= 0, start + end, last)
        run += tl.sum(weights)
        seen += tl.sum(equal)
        start += CHUNK
    # Rounding may leave the target a little beyond all of them.
    return tl.where(found < 0, last, found)
