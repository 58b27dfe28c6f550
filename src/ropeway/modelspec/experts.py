"""Mixtures of experts: how many there are, and how a token's few are chosen."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from ropeway.modelspec.reader import Reader

_COUNT = ("num_experts", "num_local_experts", "n_routed_experts")


@dataclass(frozen=True, kw_only=True)
class ExpertSpec:
    """Experts in the place of a layer's MLP (Shazeer et al. 2017), in the layers l with `sparse[l]`.

    Each token goes through `chosen` of `count` gated MLPs of `inner` features, and besides through one of `shared`
    features (DeepSeekMoE, Dai et al. 2024; 0: there is none). The router's logits become scores by `scoring`; one that
    is `biased` adds a learned number to each score, for choosing alone. Of `groups` equal groups of experts only the
    `kept_groups` with the best sum of their `group_best` (1 or 2) highest scores take part. The weights of the chosen
    are their scores, divided by their sum if `normalize`, times `scale`.

    `block` is the part of a layer that holds router and experts in a checkpoint, `parts` are the names of an expert's
    gate, up and down projections.
    """

    count: int
    chosen: int
    inner: int
    sparse: tuple[bool, ...]
    shared: int = 0
    scoring: Literal["softmax", "sigmoid"] = "softmax"
    biased: bool = False
    normalize: bool = True
    scale: float = 1.0
    groups: int = 1
    kept_groups: int = 1
    group_best: int = 1
    block: str = "mlp"
    parts: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")

    def linears(self, hidden: int) -> list[tuple[int, int]]:
        """(out_features, in_features) of the experts of one layer, the shared one last."""
        shared = [(2 * self.shared, hidden), (hidden, self.shared)] if self.shared else []
        return [(2 * self.inner, hidden), (hidden, self.inner)] * self.count + shared

    def router(self, hidden: int) -> int:
        """Parameters of one layer's router, which are kept in float32."""
        return self.count * (hidden + self.biased)

    def modules(self) -> list[str]:
        """Names of the experts' linear layers within a decoder layer, where each is stored by itself."""
        named = [f"{self.block}.experts.{e}.{part}" for e in range(self.count) for part in self.parts]
        return named + [f"{self.block}.shared_experts.{part}" for part in self.parts] * bool(self.shared)


def read_mixtral(reader: Reader, layers: int) -> ExpertSpec:
    """Mixtral (Jiang et al. 2024): all layers are sparse, and `intermediate_size` is that of an expert."""
    return _checked(
        reader,
        count=_count(reader, 8),
        chosen=reader.count("num_experts_per_tok", 2),
        inner=reader.count("intermediate_size"),
        sparse=(True,) * layers,
        block="block_sparse_moe",
        parts=("w1", "w3", "w2"),
    )


def read_qwen3_moe(reader: Reader, layers: int) -> ExpertSpec:
    """Qwen3-MoE (Yang et al. 2025)."""
    step = reader.count("decoder_sparse_step", 1)
    dense = reader.get("mlp_only_layers", [])
    if not isinstance(dense, list) or not all(type(layer) is int for layer in dense):
        raise reader.wrong("mlp_only_layers", "must be a list of layer numbers")
    return _checked(
        reader,
        count=_count(reader, 128),
        chosen=reader.count("num_experts_per_tok", 8),
        inner=reader.count("moe_intermediate_size", 768),
        sparse=tuple(layer not in dense and (layer + 1) % step == 0 for layer in range(layers)),
        normalize=reader.flag("norm_topk_prob"),
    )


def read_deepseek_v2(reader: Reader, layers: int) -> ExpertSpec:
    """DeepSeek-V2 (DeepSeek-AI 2024): softmax scores, of all groups or of those with the best expert each."""
    _only(reader, "scoring_func", "softmax")
    if reader.flag("norm_topk_prob"):
        raise reader.wrong("norm_topk_prob", "must be false, since implementations of DeepSeek-V2 disagree about it")
    method = reader.get("topk_method", "greedy")
    if method not in ("greedy", "group_limited_greedy"):
        raise reader.wrong("topk_method", "must be 'greedy' or 'group_limited_greedy'")
    limited = method == "group_limited_greedy"
    return _checked(
        reader,
        **_deepseek(reader, layers, inner=1407, shared=2, first_dense=0, scale=1.0),
        count=_count(reader, 64),
        chosen=reader.count("num_experts_per_tok"),
        normalize=False,
        groups=reader.count("n_group") if limited else 1,
        kept_groups=reader.count("topk_group") if limited else 1,
    )


def read_deepseek_v3(reader: Reader, layers: int) -> ExpertSpec:
    """DeepSeek-V3 (DeepSeek-AI 2024): sigmoid scores, chosen by score and bias, from groups with the best two each."""
    _only(reader, "scoring_func", "sigmoid")
    _only(reader, "topk_method", "noaux_tc")
    return _checked(
        reader,
        **_deepseek(reader, layers, inner=2048, shared=1, first_dense=3, scale=2.5),
        count=_count(reader, 256),
        chosen=reader.count("num_experts_per_tok", 8),
        scoring="sigmoid",
        biased=True,
        normalize=reader.flag("norm_topk_prob", True),
        groups=reader.count("n_group", 8),
        kept_groups=reader.count("topk_group", 4),
        group_best=2,
    )


EXPERTS: dict[str, Callable[[Reader, int], ExpertSpec]] = {
    "MixtralForCausalLM": read_mixtral,
    "Qwen3MoeForCausalLM": read_qwen3_moe,
    "DeepseekV2ForCausalLM": read_deepseek_v2,
    "DeepseekV3ForCausalLM": read_deepseek_v3,
}
"""Architectures with experts, and who reads them from a config with so many layers. Raise ModelError."""


def _deepseek(
    reader: Reader, layers: int, *, inner: int, shared: int, first_dense: int, scale: float
) -> dict[str, Any]:
    """What both generations spell in the same way; the arguments are what their code takes for granted."""
    dense = reader.get("first_k_dense_replace", first_dense)
    if type(dense) is not int or dense < 0:
        raise reader.wrong("first_k_dense_replace", "must be a whole number")
    if reader.get("moe_layer_freq", 1) != 1:
        raise reader.wrong("moe_layer_freq", "must be 1")
    number = reader.get("n_shared_experts", shared)
    if type(number) is not int or number < 0:
        raise reader.wrong("n_shared_experts", "must be a whole number")
    inner = reader.count("moe_intermediate_size", inner)
    return {
        "inner": inner,
        "shared": number * inner,
        "sparse": tuple(layer >= dense for layer in range(layers)),
        "scale": reader.number("routed_scaling_factor", scale),
    }


def _checked(reader: Reader, **fields: Any) -> ExpertSpec:
    """Raises ModelError if so many experts cannot be chosen."""
    spec = ExpertSpec(**fields)
    if spec.count % spec.groups:
        raise reader.wrong("n_group", f"must divide the {spec.count} experts")
    if spec.kept_groups > spec.groups:
        raise reader.wrong("topk_group", f"must be at most n_group ({spec.groups})")
    size = spec.count // spec.groups
    if spec.chosen > spec.kept_groups * size:
        raise reader.wrong(
            "num_experts_per_tok", f"must be at most {spec.kept_groups * size}, the experts to choose from"
        )
    if spec.groups > 1 and spec.group_best > size:
        raise reader.wrong("n_group", f"must leave at least {spec.group_best} of the {spec.count} experts in a group")
    return spec


def _count(reader: Reader, default: int) -> int:
    """The number of experts, under whichever name a family has for it."""
    return next((reader.count(key) for key in _COUNT if reader.get(key) is not None), default)


def _only(reader: Reader, key: str, value: str) -> None:
    if reader.get(key, value) != value:
        raise reader.wrong(key, f"must be {value!r}")
