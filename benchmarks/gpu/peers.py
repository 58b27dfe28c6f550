"""What else can be done with the same model on the same device: transformers in two ways, and a loop in plain torch."""

from __future__ import annotations

import gc
import time
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from layouts import LAYOUTS, Ask
from measure import Deadline, OutOfTime
from torch import Tensor
from torch.nn import functional


class Peer:
    """A layout's model in transformers' code, with random weights made on the device."""

    def __init__(self, layout: str, device: torch.device) -> None:
        import transformers

        config = transformers.AutoConfig.for_model(**LAYOUTS[layout])
        begun = time.perf_counter()
        with torch.device(device):
            self.model = transformers.AutoModelForCausalLM.from_config(
                config, dtype=torch.bfloat16, attn_implementation="sdpa"
            ).eval()
        self.device, self.version = device, transformers.__version__
        self.start_seconds = time.perf_counter() - begun

    def close(self) -> None:
        del self.model
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def settings(self, output: int, seconds: float | None = None) -> Any:
        """Greedy, exactly `output` tokens, given up after `seconds`."""
        from transformers import GenerationConfig

        return GenerationConfig(
            do_sample=False, max_new_tokens=output, min_new_tokens=output, pad_token_id=0, eos_token_id=None,
            max_time=seconds,
        )  # fmt: skip

    def pad(self, prompts: Sequence[Sequence[int]]) -> dict[str, Tensor]:
        """A batch whose prompts end together."""
        width = max(map(len, prompts))
        ids = torch.tensor([[0] * (width - len(prompt)) + list(prompt) for prompt in prompts], device=self.device)
        mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=self.device)
        return {"input_ids": ids, "attention_mask": mask}

    @torch.inference_mode()
    def generate(self, prompts: Sequence[Sequence[int]], output: int, seconds: float | None = None) -> float:
        """Seconds that `generate` takes for one padded batch. Raises OutOfTime if it was given up."""
        batch = self.pad(prompts)
        begun = time.perf_counter()
        made = self.model.generate(**batch, generation_config=self.settings(output, seconds))
        if made.shape[1] - batch["input_ids"].shape[1] < output:  # reading the shape does not wait for the device
            raise OutOfTime
        made.cpu()
        return time.perf_counter() - begun

    def decode(self, prompts: Sequence[Sequence[int]], steps: int, deadline: Deadline) -> dict[str, Any]:
        """What a step of `generate` takes: of two runs over the same prompts the difference."""
        self.generate(prompts, 2, deadline.left)
        short = self.generate(prompts, 2, deadline.left)
        long = self.generate(prompts, 2 + steps, deadline.left)
        ms = (long - short) / steps * 1000
        return {"rows": len(prompts), "ms": ms, "tokens_s": len(prompts) / ms * 1000}

    def static(self, asks: Sequence[Ask], batch: int, deadline: Deadline) -> dict[str, Any]:
        """Batches in order of arrival, each until its longest answer is done: of as many as there is time for, what
        was asked for in the time it took. A first short batch does not count."""
        self.generate([ask.prompt for ask in asks[:batch]], 2, deadline.left)
        made = done = 0
        seconds = 0.0
        for first in range(0, len(asks), batch):
            some = asks[first : first + batch]
            try:
                seconds += self.generate([a.prompt for a in some], max(a.output for a in some), deadline.left)
            except OutOfTime:
                if not done:
                    raise
                break
            made, done = made + sum(ask.output for ask in some), done + len(some)
        return {"requests": done, "seconds": seconds, "output_tokens": made, "output_s": made / seconds}

    def continuous(self, asks: Sequence[Ask], deadline: Deadline) -> dict[str, Any]:
        """All requests at once through transformers' continuous batching. What it prepares on its first use counts as
        its start."""
        settings = self.settings(max(ask.output for ask in asks))
        settings.min_new_tokens, settings.eos_token_id = None, -1
        manager = self.model.init_continuous_batching(settings, self._bounds())
        begun = time.perf_counter()
        manager.start()
        try:
            self._answered(manager, [Ask(asks[0].prompt, 2)], "first", deadline)
            start = time.perf_counter() - begun
            begun = time.perf_counter()
            made = self._answered(manager, asks, "ask", deadline)
            seconds = time.perf_counter() - begun
        finally:
            for number in range(len(asks)):  # what is still under way would go on beside the next measurement
                manager.cancel_request(f"ask-{number}")
            manager.stop(block=True, timeout=30)
        return {
            "requests": len(asks), "seconds": seconds, "output_tokens": made, "output_s": made / seconds,
            "start_seconds": start,
        }  # fmt: skip

    def _bounds(self) -> Any:
        """None, so that it takes of a GPU's memory what it thinks right. On a CPU that would be all of RAM."""
        from transformers.generation.configuration_utils import ContinuousBatchingConfig

        return None if self.device.type == "cuda" else ContinuousBatchingConfig(num_blocks=32, max_batch_tokens=256)

    def _answered(self, manager: Any, asks: Sequence[Ask], name: str, deadline: Deadline) -> int:
        """Tokens of output once all `asks` are answered."""
        for number, ask in enumerate(asks):
            manager.add_request(ask.prompt, request_id=f"{name}-{number}", max_new_tokens=ask.output)
        made: dict[str, int] = {}
        while len(made) < len(asks):
            deadline.check()
            output = manager.get_result(timeout=1)
            if output is not None and output.error is not None:
                raise RuntimeError(f"transformers could not answer: {output.error}")
            if output is not None and output.is_finished():
                made[output.request_id] = len(output.generated_tokens)
            elif output is None and not manager.is_running():
                raise RuntimeError("transformers' loop has ended without all answers")
        return sum(made.values())


class PlainLoop:
    """A decode step as one would write it: torch's own products and attention, one contiguous cache for each layer,
    nothing fused, nothing captured. Weights are those of a `Peer`; llama-shaped models only."""

    def __init__(self, peer: Peer, rows: int, context: int, room: int) -> None:
        config = peer.model.config
        self.layers, self.inner = peer.model.model.layers, peer.model.model
        self.head, self.eps = peer.model.lm_head.weight, config.rms_norm_eps
        self.heads, self.kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.dim = config.hidden_size // self.heads
        shape = (2, len(self.layers), rows, self.kv_heads, context + room, self.dim)
        self.cache = torch.randn(shape, device=peer.device, dtype=torch.bfloat16)
        frequencies = 10000.0 ** (-torch.arange(0, self.dim, 2, device=peer.device).float() / self.dim)
        angles = torch.outer(torch.arange(context + room, device=peer.device).float(), frequencies)
        self.cos, self.sin = angles.cos().bfloat16(), angles.sin().bfloat16()
        self.tokens = torch.randint(16, config.vocab_size, (rows,), device=peer.device)
        self.length = context

    @torch.inference_mode()
    def step(self) -> None:
        """The next token of every row."""
        x = functional.embedding(self.tokens, self.inner.embed_tokens.weight)
        for number, layer in enumerate(self.layers):
            x = x + self._attend(number, layer, self._norm(x, layer.input_layernorm.weight))
            y = self._norm(x, layer.post_attention_layernorm.weight)
            gate = functional.silu(functional.linear(y, layer.mlp.gate_proj.weight))
            up = functional.linear(y, layer.mlp.up_proj.weight)
            x = x + functional.linear(gate * up, layer.mlp.down_proj.weight)
        self.tokens = functional.linear(self._norm(x, self.inner.norm.weight), self.head).argmax(-1)
        self.length += 1

    def _attend(self, number: int, layer: Any, x: Tensor) -> Tensor:
        rows, at = x.shape[0], self.length
        part = layer.self_attn
        q = self._rotate(functional.linear(x, part.q_proj.weight).view(rows, self.heads, 1, self.dim))
        k = self._rotate(functional.linear(x, part.k_proj.weight).view(rows, self.kv_heads, 1, self.dim))
        v = functional.linear(x, part.v_proj.weight).view(rows, self.kv_heads, 1, self.dim)
        keys, values = self.cache[:, number]
        keys[:, :, at : at + 1], values[:, :, at : at + 1] = k, v
        out = functional.scaled_dot_product_attention(
            q, keys[:, :, : at + 1], values[:, :, : at + 1], enable_gqa=self.heads != self.kv_heads
        )
        return functional.linear(out.reshape(rows, -1), part.o_proj.weight)

    def _rotate(self, x: Tensor) -> Tensor:
        low, high = x.chunk(2, dim=-1)
        cos, sin = self.cos[self.length], self.sin[self.length]
        return torch.cat([low * cos - high * sin, high * cos + low * sin], dim=-1)

    def _norm(self, x: Tensor, weight: Tensor) -> Tensor:
        return functional.rms_norm(x, x.shape[-1:], weight, self.eps)


def plain_loop(peer: Peer, rows: int, context: int, steps: int, deadline: Deadline) -> dict[str, Any]:
    """`steps` steps of the loop with `rows` rows, each token read by the host, as a program that streams them must."""
    loop = PlainLoop(peer, rows, context, steps + 4)
    for _ in range(3):
        loop.step()
        loop.tokens.tolist()
        deadline.check()
    begun = time.perf_counter()
    for _ in range(steps):
        loop.step()
        loop.tokens.tolist()
        deadline.check()
    seconds = time.perf_counter() - begun
    return {"rows": rows, "ms": seconds / steps * 1000, "tokens_s": rows * steps / seconds}


def decode_all(
    peer: Peer, batches: Sequence[int], prompts: Sequence[Sequence[int]], steps: int, deadline: Deadline
) -> Iterator[dict[str, Any]]:
    """Both ways to decode, at each number of rows."""
    context = len(prompts[0])
    for rows in batches:
        yield {"who": "plain torch loop"} | plain_loop(peer, rows, context, steps, deadline)
        yield {"who": "transformers generate"} | peer.decode(prompts[:rows], steps, deadline)
