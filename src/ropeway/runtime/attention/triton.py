"""Paged attention for CUDA devices in Triton alone. See kernels/triton/{attention,cache}.py."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from ropeway.runtime.attention.backend import AttentionSpec
from ropeway.runtime.attention.rotation import Rotation
from ropeway.runtime.batch import BatchInputs

MAX_HEAD_DIM = 256
MAX_LATENT = 512
_MOST_HEADS = {False: 64, True: 32}
"""Query heads of one KV head that a program computes, without and with a latent: its accumulator, these times V's width
in float32, has to fit the registers of four to eight warps."""
_LONGEST = 4096
"""Keys that one program of a decode step walks at most while splits are left: no row is to outlast the others."""
_SHORTEST = 512
"""Keys below which a split is not worth the part that it writes and `combine` reads, where rows alone fill the device:
a part is four bytes for each two of K and V of one key, for each head."""
_MOST_SPLITS = 64
_HELD = 128 * 128
"""Elements that eight warps can hold of an accumulator, and of a tile of keys beside it."""


@dataclass(frozen=True)
class Processor:
    """What tiles and splits follow from: multiprocessors, and bytes of shared memory that one program may have."""

    count: int
    shared: int

    @staticmethod
    def of(device: torch.device) -> Processor:
        if device.type != "cuda":
            return Processor(2, 99 * 1024)
        found: Any = torch.cuda.get_device_properties(device)
        return Processor(found.multi_processor_count, found.shared_memory_per_block_optin)


@dataclass(frozen=True)
class Tile:
    """Rows and keys of a program's tile, its warps, and the stages of its loop over keys.

    The compiler spreads them over two loads, that of keys after that of the block table: with 2 b + 1 stages it keeps b
    tiles of keys in shared memory, and one more where it multiplies them as they lie there (Hopper's wgmma).
    """

    m: int
    n: int
    warps: int
    stages: int


def tile(spec: AttentionSpec, heads: int, shared: int, *, single: bool) -> Tile:
    """The tile for rows of one token (`single`) or of more, when a program computes `heads` query heads of a KV head.

    Single tokens wait for memory: the fewest rows that a matrix unit takes. Longer rows compute: as many rows as
    registers hold an accumulator for, 128 x 128 in 16 bits, and float32 a quarter of it, as it goes through no matrix
    unit. Keys come 64 at a time, and two tiles of them at once, less where they do not fit shared memory. Codes go
    through registers on their way to a product, which leaves less of these for other things.
    """
    width, narrow = max(16, _power(spec.value_dim)), spec.dtype != torch.float32
    least = max(16, _power(heads))
    m, n, stages = least, 64 if narrow else 32, 5
    if not single:
        m = max(least, 128 if narrow and width <= 128 else 64 if narrow else 32)
    if spec.quantized:
        m, n = min(m, max(least, _HELD // width)), max(min(n, _HELD // width), 16)
    query = spec.head_dim * spec.dtype.itemsize
    key = spec.vectors * spec.head_dim * spec.kv_dtype.itemsize
    read = spec.vectors * query if spec.quantized else 0  # codes become operands of products, which lie there too
    # An eighth is left for what the compiler keeps there itself.
    while m * query + n * ((stages + 1) // 2 * key + read) > shared * 7 // 8:
        if n > 32:
            n //= 2
        elif stages > 3:
            stages = 3
        elif n > 16:
            n //= 2
        elif stages > 1:
            stages = 1
        elif m > least:
            m //= 2
        else:
            break
    wide = m * width > _HELD // 2 or (spec.quantized and n * width > _HELD // 2)
    return Tile(m, n, 8 if wide else 4, stages)


def splits(programs: int, longest: int, n: int, processors: int) -> tuple[int, int]:
    """Into how many parts a decode step splits the keys of each row, a power of two, and the fewest tiles in a part.

    `programs` is their number without splitting, `longest` bounds the rows' lengths, `n` is the keys of a tile. There
    are to be two programs for each multiprocessor, which run at once, and none that walks far longer than the others:
    but where most rows may be short, programs without keys cost more than they save. All of it follows from shapes and
    from integers of the host, so that a captured graph stays right for other lengths.
    """
    wanted = max(2 * processors // programs, 1)
    most = min(max(8 * processors // programs, 1), -(-longest // n), _MOST_SPLITS)
    parts = min(max(wanted, -(-longest // _LONGEST)), most)
    return 1 << (parts.bit_length() - 1), 1 if wanted > 1 else -(-_SHORTEST // n)


@dataclass(frozen=True)
class TritonMeta:
    """One step. `rows` and `before` say which rows the blocks of queries belong to, None if all rows are single tokens.
    `parts`, `peaks` and `sums` are the workspace of split rows."""

    inputs: BatchInputs
    rows: Tensor | None
    before: Tensor | None
    splits: int
    least: int
    parts: Tensor
    peaks: Tensor
    sums: Tensor


class TritonBackend:
    """One kernel for all rows: chunks in blocks of queries, single tokens with their keys split where the device would
    idle. In a mixed step each kind has its own launch. K, V and queries are rotated by the kernel that writes K.

    The cache may be int8 or fp8 and lies in (kv_heads, K then V then scales). A row's result depends on that row alone
    but for rounding: how many splits a row has follows from the number of rows.
    """

    name = "triton"
    capturable = True

    def __init__(
        self,
        spec: AttentionSpec,
        device: torch.device,
        *,
        processor: Processor | None = None,
        tiles: Mapping[bool, Tile] | None = None,
    ) -> None:
        """`processor` defaults to that of `device`, and `tiles`, by `single`, to what follows from it."""
        import triton.language as tl

        from ropeway.runtime.kernels.triton import attention, cache

        self.spec, self.device = spec, device
        self._kernels, self._cache = attention, cache
        self._layout = cache.by_head(spec)
        self._processor = processor or Processor.of(device)
        group = spec.heads // spec.kv_heads
        slices = -(-group // _MOST_HEADS[spec.latent > 0])
        self._heads = -(-group // slices)
        self._columns = spec.kv_heads * slices
        self._tiles = {one: tile(spec, self._heads, self._processor.shared, single=one) for one in (False, True)}
        self._tiles.update(tiles or {})
        self._queries = self._tiles[False].m // self._heads
        # Triton's interpreter, which is all that runs this on a CPU, cannot multiply matrices of bfloat16.
        operand = tl.float32 if device.type == "cpu" else cache.TYPES[spec.dtype]
        coded = spec.quantized and operand != tl.float32
        self._fixed: dict[str, Any] = {
            "KV_HEADS": spec.kv_heads,
            "GROUP": group,
            "PART": self._heads,
            "PARTS": slices,
            "D": spec.head_dim,
            "MAIN": spec.value_dim,
            "BLOCK_D": max(16, _power(spec.value_dim)),
            "BLOCK_T": max(16, _power(spec.head_dim - spec.value_dim)),
            "BLOCK_SIZE": spec.block_size,
            "CAPPED": spec.softcap is not None,
            "CODED": cache.CODES[spec.kv_cache_dtype],
            "UNIT": cache.UNIT[spec.kv_cache_dtype],
            "LATENT": spec.latent > 0,
            "OPERAND": operand,
            # A weight times the scale of a small V may be below what float16 holds.
            "WEIGHTS": tl.bfloat16 if coded else operand,
        }
        # Without a cap scores count in units of ln 2 at once, which spares a multiplication each.
        self._scale = spec.scale if spec.softcap is not None else spec.scale * math.log2(math.e)

    @classmethod
    def supports(cls, spec: AttentionSpec, device: torch.device) -> str | None:
        if device.type != "cuda":
            return f"it runs on CUDA devices, not on {device.type}"
        if find_spec("triton") is None:
            return "the package triton is not installed"
        capability = torch.cuda.get_device_capability(device)
        if capability < (8, 0):
            return "it needs compute capability 8.0 or higher, not {}.{}".format(*capability)
        return lacking(spec)

    def block_shape(self) -> tuple[int, ...]:
        return (self.spec.kv_heads, self._layout.head)

    def prepare(self, inputs: BatchInputs) -> TritonMeta:
        spec = self.spec
        rows = before = None
        if inputs.max_count > 1:
            # Row r has at most count // queries + 1 blocks, so cu_q // queries + r is a place to begin that no row
            # before it reaches. Some blocks stay empty in between, and the host need not know the counts.
            number = torch.arange(inputs.num_rows, dtype=torch.int32, device=inputs.device)
            before = inputs.cu_q[:-1] // self._queries + number
            blocks = inputs.num_tokens // self._queries + inputs.num_rows
            every = torch.arange(blocks, dtype=torch.int32, device=inputs.device)
            rows = torch.searchsorted(before, every, right=True, out_int32=True) - 1
        parts, least = splits(
            inputs.num_rows * self._columns, inputs.max_length, self._tiles[True].n, self._processor.count
        )
        shape = (inputs.num_rows if parts > 1 else 0, spec.heads, parts)

        def room(*sizes: int) -> Tensor:
            return torch.empty(sizes, dtype=torch.float32, device=inputs.device)

        return TritonMeta(inputs, rows, before, parts, least, room(*shape, spec.value_dim), room(*shape), room(*shape))

    def forward(
        self,
        layer: int,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        kv: Tensor,
        meta: TritonMeta,
        rotation: Rotation | None = None,
    ) -> Tensor:
        spec, inputs = self.spec, meta.inputs
        q = self._cache.write(q, k, v, kv, layer, inputs.write_slots, spec, self._layout, rotation)
        out = torch.empty((q.shape[0], spec.heads * spec.value_dim), dtype=spec.dtype, device=q.device)
        if meta.rows is not None:
            self._attend(layer, q, kv, out, meta, meta.rows.shape[0], single=False)
            if inputs.num_rows == 1:
                return out
        self._attend(layer, q, kv, out, meta, inputs.num_rows, single=True)
        if meta.splits > 1:
            width = min(self._fixed["BLOCK_D"], 128)
            self._kernels.combine[(inputs.num_rows, spec.heads, -(-spec.value_dim // width))](
                meta.parts, meta.peaks, meta.sums, out, inputs.cu_q, meta.splits,
                HEADS=spec.heads, MAIN=spec.value_dim, BLOCK_D=width, MOST=_MOST_SPLITS, num_warps=4,
            )  # fmt: skip
        return out

    def _attend(
        self, layer: int, q: Tensor, kv: Tensor, out: Tensor, meta: TritonMeta, blocks: int, *, single: bool
    ) -> None:
        spec, inputs, layout, shape = self.spec, meta.inputs, self._layout, self._tiles[single]
        parts = meta.splits if single else 1
        rows = inputs.cu_q if meta.rows is None else meta.rows
        self._kernels.attend[(blocks, self._columns, parts)](
            q, kv, kv.view(torch.float32) if spec.quantized else kv, out, meta.parts, meta.peaks, meta.sums,
            inputs.block_tables, inputs.cu_q, inputs.starts, rows, rows if meta.before is None else meta.before,
            q.stride(0), inputs.block_tables.stride(0), kv.stride(0), layer * kv.stride(1), layout.head, layout.value,
            layout.key_scales, layout.value_scales, self._scale, spec.softcap or 0.0, parts, meta.least,
            **self._fixed, BLOCK_M=shape.m, BLOCK_N=shape.n, WINDOW=spec.windows[layer] or 0, SINGLE=single,
            SPLIT=parts > 1, num_warps=shape.warps, num_stages=shape.stages,
        )  # fmt: skip


def lacking(spec: AttentionSpec) -> str | None:
    """What the kernels do not do that `spec` asks for, on any device."""
    if spec.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"it computes float32, bfloat16 and float16, not {str(spec.dtype).removeprefix('torch.')}"
    if spec.latent > MAX_LATENT or (not spec.latent and spec.head_dim > MAX_HEAD_DIM):
        return f"K has {spec.head_dim} elements; it takes {MAX_HEAD_DIM}, and of a latent {MAX_LATENT}"
    return None


def _power(value: int) -> int:
    """The least power of two that is not below `value`."""
    return 1 << max(value - 1, 0).bit_length()
