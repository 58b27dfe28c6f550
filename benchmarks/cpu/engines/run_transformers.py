"""Hugging Face transformers. Settings: `dtype`, `attention`, `mode` and `batch`.

mode static: padded batches of `batch` in order of arrival, each run until its longest answer is done; only tokens that
were asked for count. mode continuous: transformers' own continuous batching.
"""

from typing import Any

import torch
import transformers
from protocol import Generate, Job, Request, Start, serve
from transformers import AutoModelForCausalLM, GenerationConfig


def _static(model: Any, requests: list[Request]) -> list[int]:
    width, length = max(len(r.prompt) for r in requests), max(r.max_tokens for r in requests)
    ids = torch.zeros(len(requests), width, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, request in enumerate(requests):
        ids[row, width - len(request.prompt) :] = torch.tensor(request.prompt)
        mask[row, width - len(request.prompt) :] = 1
    config = GenerationConfig(do_sample=False, max_new_tokens=length, min_new_tokens=length, pad_token_id=0)
    made = model.generate(ids, attention_mask=mask, generation_config=config)
    return [min(r.max_tokens, made.shape[1] - width) for r in requests]


def _continuous(model: Any, requests: list[Request]) -> list[int]:
    longest = max(r.max_tokens for r in requests)
    config = GenerationConfig(do_sample=False, max_new_tokens=longest, eos_token_id=-1, pad_token_id=0)
    manager = model.init_continuous_batching(generation_config=config)
    manager.start()
    try:
        for number, request in enumerate(requests):
            manager.add_request(request.prompt, request_id=str(number), max_new_tokens=request.max_tokens)
        counts: dict[str, int] = {}
        while len(counts) < len(requests):
            output = manager.get_result(timeout=1)
            if output is not None and output.error is not None:
                raise RuntimeError(f"transformers could not answer: {output.error}")
            if output is not None and output.is_finished():
                counts[output.request_id] = len(output.generated_tokens)
            elif output is None and not manager.is_running():
                raise RuntimeError("transformers' loop has ended without all answers")
    finally:
        manager.stop(block=True)
    return [counts[str(number)] for number in range(len(requests))]


def load(start: Start) -> tuple[str, Generate]:
    settings = start.settings
    torch.set_num_threads(start.threads)
    torch.set_grad_enabled(False)
    dtype = getattr(torch, settings["dtype"])
    model = AutoModelForCausalLM.from_pretrained(start.model, dtype=dtype, attn_implementation=settings["attention"])
    model.eval()

    def generate(job: Job) -> list[int]:
        if settings["mode"] == "continuous":
            return _continuous(model, job.requests)
        size = settings["batch"]
        batches = [job.requests[i : i + size] for i in range(0, len(job.requests), size)]
        return [count for batch in batches for count in _static(model, batch)]

    return f"{transformers.__version__} (torch {torch.__version__})", generate


if __name__ == "__main__":
    serve(load)
