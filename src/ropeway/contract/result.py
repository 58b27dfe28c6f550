"""What an executor answers for one step."""

from __future__ import annotations

from msgspec import Struct
from msgspec.structs import replace


class RowFault(Struct, frozen=True, array_like=True):
    """Row number `row` of the plan failed alone; `code` is an error code of `ropeway.errors`, `param` the field of the
    request at fault if it was one."""

    row: int
    code: str
    message: str
    param: str | None = None


class TokenLogprob(Struct, frozen=True, array_like=True, gc=False):
    """The natural logarithm of a token's probability, its rank (1 = likeliest), and the likeliest tokens with theirs,
    best first. Of the logits as the model gives them."""

    token: int
    logprob: float
    rank: int
    top_ids: list[int] = []
    top: list[float] = []


class Extra(Struct, frozen=True, array_like=True):
    """What a row yields besides its tokens, because its request asked for it: one of `logprobs` for each token;
    `prompt_logprobs` of the prompt's tokens from number `prompt_at` on (the first has none); `vector`, float32 in
    native byte order."""

    rid: int
    logprobs: list[TokenLogprob] = []
    prompt_logprobs: list[TokenLogprob] = []
    prompt_at: int = 0
    vector: bytes = b""


class StepResult(Struct, frozen=True, array_like=True):
    """`tokens[i]` are the tokens that row i of the plan emitted: empty, one, or several with a drafter.
    `seconds` is the executor's own time for the step, `copy_seconds[i]` what of it the plan's copy i took. `lost` are
    the keys of copies whose source turned out to be damaged: what was computed from them is void. `extras` are
    there for rows that asked for them only."""

    step: int
    tokens: list[list[int]]
    faults: list[RowFault] = []
    seconds: float = 0.0
    copy_seconds: list[float] = []
    lost: list[bytes] = []
    extras: list[Extra] = []


class Tier(Struct, frozen=True):
    """Memory for `blocks` KV blocks beneath the device's. A `lasting` tier outlives the process; `kept` are the numbers
    and keys of the blocks that it has brought over, least recently used first."""

    name: str
    blocks: int
    lasting: bool = False
    kept: list[tuple[int, bytes]] = []


class Pooling(Struct, frozen=True):
    """The vectors of `size` numbers that a model makes of prompts. Unless a request says otherwise they are made by
    `kind`, as in `GenerateRequest.pooling`, and brought to the length 1 if `normalize`. A model that `judges` is a
    cross-encoder: its one number says how well the second text of a pair answers the first."""

    kind: str
    size: int
    normalize: bool = True
    judges: bool = False


class ExecutorInfo(Struct, frozen=True, kw_only=True):
    """The resources that an executor offers, fixed for its life.

    `depth` is how many plans may be in flight. `notes` are sentences for the start-up banner, in order: why this
    device, dtype, attention back end, number of blocks. `tiers` are the memory beneath the device's, nearest first;
    `secret` keys the names of what they have kept, and is empty if there is none. Both stay inside the engine.
    `pooling` is None if the model makes no vectors. One that `generates` nothing looks at all of a prompt at once, so a
    prompt has to run whole, in one step. `device_id` is a GPU's UUID, by which its driver knows it. `arithmetic` is
    what the last digits of a logit hang on besides: code, quantization and kernels.
    """

    model: str
    device: str
    dtype: str
    num_blocks: int
    block_size: int
    max_slots: int
    max_model_len: int
    vocab_size: int
    depth: int = 1
    attention: str = ""
    arithmetic: str = ""
    threads: int = 0
    weight_bytes: int = 0
    kv_bytes: int = 0
    notes: list[str] = []
    tiers: list[Tier] = []
    secret: bytes = b""
    pooling: Pooling | None = None
    generates: bool = True
    device_id: str = ""

    def public(self) -> ExecutorInfo:
        """Without what only the engine needs to know."""
        return replace(self, tiers=[replace(tier, kept=[]) for tier in self.tiers], secret=b"")
