"""The Llama layout of the bundled model, written for training; parameter names are those of Hugging Face.

Batches hold one document per row, padded on the right. With causal attention a row never sees its padding, so that no
mask is needed and every document starts at position 0, as it does when it is served.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class Shape:
    """Sizes of the model; the names are those of `transformers.LlamaConfig`."""

    vocab_size: int = 4096
    hidden_size: int = 256
    intermediate_size: int = 704
    num_hidden_layers: int = 5
    num_attention_heads: int = 4
    num_key_value_heads: int = 2
    head_dim: int = 64
    max_position_embeddings: int = 2048
    rms_norm_eps: float = 1e-5
    rope_theta: float = 10000.0

    def config_json(self, bos: int, eos: int, pad: int) -> dict[str, Any]:
        """The content of `config.json` for this shape."""
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            **asdict(self),
            "rope_scaling": None,
            "hidden_act": "silu",
            "attention_bias": False,
            "attention_dropout": 0.0,
            "mlp_bias": False,
            "initializer_range": 0.02,
            "tie_word_embeddings": True,
            "bos_token_id": bos,
            "eos_token_id": eos,
            "pad_token_id": pad,
            "torch_dtype": "bfloat16",
            "use_cache": True,
        }


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding in the half-split layout of Llama. `x` is [batch, heads, length, head_dim]."""
    low, high = x.chunk(2, dim=-1)
    return torch.cat((low * cos - high * sin, high * cos + low * sin), dim=-1)


class Attention(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.dim = shape.num_attention_heads, shape.num_key_value_heads, shape.head_dim
        self.q_proj = nn.Linear(shape.hidden_size, self.heads * self.dim, bias=False)
        self.k_proj = nn.Linear(shape.hidden_size, self.kv_heads * self.dim, bias=False)
        self.v_proj = nn.Linear(shape.hidden_size, self.kv_heads * self.dim, bias=False)
        self.o_proj = nn.Linear(self.heads * self.dim, shape.hidden_size, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        batch, length, _ = x.shape
        q = self.q_proj(x).view(batch, length, self.heads, self.dim).transpose(1, 2)
        k = self.k_proj(x).view(batch, length, self.kv_heads, self.dim).transpose(1, 2)
        v = self.v_proj(x).view(batch, length, self.kv_heads, self.dim).transpose(1, 2)
        group = self.heads // self.kv_heads
        q, k = _rotate(q, cos, sin), _rotate(k, cos, sin).repeat_interleave(group, dim=1)
        y = F.scaled_dot_product_attention(q, k, v.repeat_interleave(group, dim=1), is_causal=True)
        return self.o_proj(y.transpose(1, 2).reshape(batch, length, self.heads * self.dim))  # type: ignore[no-any-return]


class Mlp(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(shape.hidden_size, shape.intermediate_size, bias=False)
        self.up_proj = nn.Linear(shape.hidden_size, shape.intermediate_size, bias=False)
        self.down_proj = nn.Linear(shape.intermediate_size, shape.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))  # type: ignore[no-any-return]


class Layer(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.input_layernorm = nn.RMSNorm(shape.hidden_size, eps=shape.rms_norm_eps)
        self.self_attn = Attention(shape)
        self.post_attention_layernorm = nn.RMSNorm(shape.hidden_size, eps=shape.rms_norm_eps)
        self.mlp = Mlp(shape)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), cos, sin)
        return x + self.mlp(self.post_attention_layernorm(x))  # type: ignore[no-any-return]


class Body(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(shape.vocab_size, shape.hidden_size)
        self.layers = nn.ModuleList(Layer(shape) for _ in range(shape.num_hidden_layers))
        self.norm = nn.RMSNorm(shape.hidden_size, eps=shape.rms_norm_eps)


class Model(nn.Module):
    """A Llama decoder whose output matrix is the embedding matrix (tied)."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        self.model = Body(shape)
        for name, p in self.named_parameters():
            if p.ndim == 2:
                residual = name.endswith(("o_proj.weight", "down_proj.weight"))
                nn.init.normal_(p, std=0.02 / (2 * shape.num_hidden_layers) ** 0.5 if residual else 0.02)
        steps = torch.arange(0, shape.head_dim, 2).float() / shape.head_dim
        angle = torch.outer(torch.arange(shape.max_position_embeddings).float(), shape.rope_theta**-steps)
        self.register_buffer("cos", angle.cos(), persistent=False)
        self.register_buffer("sin", angle.sin(), persistent=False)

    def hidden(self, ids: Tensor) -> Tensor:
        """Final hidden states, [batch, length, hidden], of token ids [batch, length]."""
        cos, sin = self.get_buffer("cos")[: ids.shape[1]], self.get_buffer("sin")[: ids.shape[1]]
        x = self.model.embed_tokens(ids)
        for layer in self.model.layers:
            x = layer(x, cos, sin)
        return self.model.norm(x)  # type: ignore[no-any-return]

    def loss(self, ids: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Summed weighted next-token loss in nats, and the summed weight.

        `ids` is [batch, length]; `weight` has the same shape and says how much it matters to predict that token from
        those before it (0 for padding). Positions with weight 0 skip the output matrix altogether.
        """
        target, w = ids[:, 1:].reshape(-1), weight[:, 1:].reshape(-1)
        keep = w.nonzero(as_tuple=True)[0]
        x = self.hidden(ids[:, :-1]).reshape(-1, self.shape.hidden_size)[keep]
        each = F.cross_entropy(F.linear(x, self.model.embed_tokens.weight).float(), target[keep], reduction="none")
        return (each * w[keep]).sum(), w.sum()


@torch.no_grad()
def plant_induction(model: Model, seed: int = 0) -> None:
    """Give a fresh model two heads that look back: "what followed the last time this token occurred?"

    Such induction heads (Olsson et al., 2022) are what copying, names in stories and the operands of sums need. They
    arise by themselves, but only after many more tokens than an hour on two cores allows. Layer 0 copies each token's
    left neighbour into a free part of the residual stream; layer 1 looks for places whose left neighbour is the current
    token, and brings their token. What the heads attend to stays as it is here, since the first noisy steps would wash
    it out: its gradients are masked. What becomes of the token that they bring is learned, as is everything else.
    All other residual writes start at zero.
    """
    shape = model.shape
    layers = [layer for layer in model.model.layers if isinstance(layer, Layer)]
    first, second = layers[0].self_attn, layers[1].self_attn
    for layer in layers:
        layer.self_attn.o_proj.weight.zero_()
        layer.mlp.down_proj.weight.zero_()
    # Orthonormal directions without coordinate 0, which is the same for all tokens and serves as a constant.
    embedding = model.model.embed_tokens.weight
    embedding[:, 0] = 0.5
    noise = torch.randn(shape.hidden_size - 1, shape.hidden_size - 1, generator=torch.Generator().manual_seed(seed))
    basis = F.pad(torch.linalg.qr(noise)[0], (1, 0))
    width, half = shape.head_dim, shape.head_dim // 2
    token, left, next_ = basis[:width], basis[width : 2 * width], basis[2 * width : 3 * width]

    # Layer 0: queries and keys know only positions. Their fast rotary pairs agree at a distance of exactly one.
    fast = half // 3
    angle = shape.rope_theta ** (-torch.arange(fast) / half)
    q, k = first.q_proj.weight[:width], first.k_proj.weight[:width]
    q.zero_()
    k.zero_()
    q[:fast, 0] = 1.8
    k[:fast, 0], k[half : half + fast, 0] = 1.8 * angle.cos(), 1.8 * angle.sin()
    # A slow pair takes nearly all of that away again: then a larger constant cannot stand in for the right distance.
    q[half - 1, 0] = 1.8 * (fast - 0.4) ** 0.5
    k[half - 1, 0] = -q[half - 1, 0]
    first.v_proj.weight[:width] = token
    first.o_proj.weight[:, :width] = 0.2 * left.T

    # Layer 1: the slow rotary pairs, which hardly turn, compare the current token with the left neighbours.
    slow = torch.cat((torch.arange(half * 9 // 16, half), torch.arange(half + half * 9 // 16, 2 * half)))
    q, k = second.q_proj.weight[:width], second.k_proj.weight[:width]
    q.zero_()
    k.zero_()
    q[slow], k[slow] = 2.5 * token[: len(slow)], 2.5 * left[: len(slow)]
    second.v_proj.weight[:width] = next_
    second.o_proj.weight[:, :width] = next_.T

    rows, columns = slice(None, width), slice(None)
    for linear in (first.q_proj, first.k_proj, first.v_proj, second.q_proj, second.k_proj, second.v_proj):
        _freeze(linear.weight, rows, columns)
    _freeze(first.o_proj.weight, columns, rows)
    _freeze(embedding, columns, slice(None, 1))


def _freeze(parameter: Tensor, rows: slice, columns: slice) -> None:
    """Keep a part of a matrix as it is: no gradient reaches it. (It needs an optimizer without weight decay.)"""
    learn = torch.ones_like(parameter)
    learn[rows, columns] = 0
    parameter.register_hook(lambda gradient: gradient * learn)
