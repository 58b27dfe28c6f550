"""Multi-head latent attention: what is kept of a token is one vector for all heads (DeepSeek-V2, DeepSeek-AI 2024)."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from ropeway.modelspec.reader import Reader

LATENT = ("DeepseekV2ForCausalLM", "DeepseekV3ForCausalLM")
"""Architectures with it."""
_LAYER = re.compile(r"model\.layers\.(\d+)\.")


@dataclass(frozen=True, kw_only=True)
class LatentSpec:
    """A token's K and V of all heads are linear in a latent of `rank` elements; `rope` more, shared by all heads, carry
    the position. A head's query and key have `nope` + `rope` elements, its value `value`. Queries come from a latent of
    `q_rank` elements, or straight from the hidden state if that is 0. `interleaved`: in the checkpoint's order,
    neighbours are rotated together, not element i with i + rope / 2.
    """

    rank: int
    rope: int
    nope: int
    value: int
    q_rank: int = 0
    interleaved: bool = True

    @property
    def width(self) -> int:
        """Elements that the cache keeps of a token in each layer."""
        return self.rank + self.rope

    def linears(self, hidden: int, heads: int) -> list[tuple[int, int]]:
        """(out_features, in_features) of one layer's projections, but for `kv_b_proj`: see `expansion`."""
        queries = heads * (self.nope + self.rope)
        down = (self.q_rank or queries) + self.width
        up = [(queries, self.q_rank)] if self.q_rank else []
        return [(down, hidden), *up, (hidden, heads * self.value)]

    def expansion(self, heads: int) -> int:
        """Weights of one layer's `kv_b_proj`. It is used head by head on queries and outputs and stays in the model's
        dtype, however the other layers are quantized."""
        return heads * (self.nope + self.value) * self.rank

    def modules(self) -> list[str]:
        """Names of the projections in `linears`, within a decoder layer."""
        queries = ["q_a_proj", "q_b_proj"] if self.q_rank else ["q_proj"]
        return [f"self_attn.{name}" for name in (*queries, "kv_a_proj_with_mqa", "o_proj")]


def read_latent(reader: Reader) -> LatentSpec:
    """Raises ModelError for values that cannot be."""
    rope = reader.count("qk_rope_head_dim", 64)
    if rope % 2:
        raise reader.wrong("qk_rope_head_dim", "must be even")
    # A null says that queries are not compressed; a missing key means the default of the family's code.
    direct = "q_lora_rank" in reader.config and reader.config["q_lora_rank"] is None
    q_rank = 0 if direct else reader.count("q_lora_rank", 1536)
    if not q_rank and reader.flag("attention_bias"):
        raise reader.wrong("attention_bias", "must be false where q_lora_rank is null")
    return LatentSpec(
        rank=reader.count("kv_lora_rank", 512),
        rope=rope,
        nope=reader.count("qk_nope_head_dim", 128),
        value=reader.count("v_head_dim", 128),
        q_rank=q_rank,
        interleaved=reader.flag("rope_interleave", True),
    )


def further_layers(names: Iterable[str], layers: int) -> set[str]:
    """The tensors of `names` that belong to layers beyond the last. DeepSeek-V3 keeps there what predicts more than one
    token, which is not computed."""
    found = {name: _LAYER.match(name) for name in names}
    return {name for name, match in found.items() if match is not None and int(match[1]) >= layers}
