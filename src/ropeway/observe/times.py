"""What requests and KV blocks leave behind when they have ended, as histograms under vLLM's names.

Source of names and buckets: vLLM's `vllm:*` metrics, documentation "Production metrics".
"""

from __future__ import annotations

from collections.abc import Iterable

from ropeway.contract import Usage
from ropeway.contract.scene import BlockLife
from ropeway.observe.histogram import (
    FEW_BUCKETS,
    ITL_BUCKETS,
    LATENCY_BUCKETS,
    MAX_TOKENS_BUCKET,
    PREEMPTION_BUCKETS,
    RESIDENCE_BUCKETS,
    TTFT_BUCKETS,
    Histogram,
    one_two_five,
)


class RequestTimes:
    """Of finished requests."""

    def __init__(self) -> None:
        lengths = one_two_five(MAX_TOKENS_BUCKET)
        self.ttft = Histogram("vllm:time_to_first_token_seconds", "Time to first token", TTFT_BUCKETS)
        self.itl = Histogram("vllm:inter_token_latency_seconds", "Time between tokens of a request", ITL_BUCKETS)
        self.each = Histogram(
            "vllm:request_time_per_output_token_seconds", "A request's mean time between tokens", ITL_BUCKETS
        )
        self.e2e = Histogram("vllm:e2e_request_latency_seconds", "Time from arrival to the last token", LATENCY_BUCKETS)
        self.queue = Histogram("vllm:request_queue_time_seconds", "Time in the waiting queue", LATENCY_BUCKETS)
        self.prefill = Histogram(
            "vllm:request_prefill_time_seconds", "Time from boarding to the first token", LATENCY_BUCKETS
        )
        self.decode = Histogram("vllm:request_decode_time_seconds", "Time from first to last token", LATENCY_BUCKETS)
        self.inference = Histogram(
            "vllm:request_inference_time_seconds", "Time from boarding to the last token", LATENCY_BUCKETS
        )
        self.prompt = Histogram("vllm:request_prompt_tokens", "Prompt tokens of a finished request", lengths)
        self.generation = Histogram("vllm:request_generation_tokens", "Generated tokens of a finished request", lengths)
        self.most = Histogram(
            "vllm:request_max_num_generation_tokens", "Tokens of the longest of an answer's sequences", lengths
        )
        self.computed = Histogram("vllm:request_prefill_kv_computed_tokens", "Prompt tokens that no cache had", lengths)
        self.preemptions = Histogram(
            "vllm:request_num_preemptions", "How often a finished request was put back", PREEMPTION_BUCKETS
        )
        self.choices = Histogram("vllm:request_params_n", "The n of requests", FEW_BUCKETS)
        self.limit = Histogram("vllm:request_params_max_tokens", "The max_tokens of requests that have one", lengths)

    def ended(self, usage: Usage) -> None:
        """A sequence has ended."""
        boarded, first = usage.first_scheduled_s, usage.first_token_s
        self.e2e.observe(usage.total_s)
        self.prompt.observe(usage.prompt_tokens)
        self.generation.observe(usage.completion_tokens)
        self.computed.observe(usage.prompt_tokens - usage.cached_tokens)
        self.preemptions.observe(usage.preemptions)
        if boarded is not None:
            self.queue.observe(boarded)
            self.inference.observe(usage.total_s - boarded)
        if boarded is not None and first is not None:
            self.prefill.observe(first - boarded)
        if first is not None:
            self.ttft.observe(first)
            self.decode.observe(usage.total_s - first)
            if usage.completion_tokens > 1:
                self.each.observe((usage.total_s - first) / (usage.completion_tokens - 1))


class BlockTimes:
    """Of a sample of what KV blocks held."""

    def __init__(self) -> None:
        self.lifetime = Histogram(
            "vllm:kv_block_lifetime_seconds",
            "Time from the handing out of a KV block until it was handed out again, of a sample",
            RESIDENCE_BUCKETS,
        )
        self.idle = Histogram(
            "vllm:kv_block_idle_before_evict_seconds",
            "Time that a KV block's content was not asked for before it was lost, of a sample",
            RESIDENCE_BUCKETS,
        )
        self.gap = Histogram(
            "vllm:kv_block_reuse_gap_seconds",
            "Time between requests that found a KV block's content, of the last few of a sample",
            RESIDENCE_BUCKETS,
        )

    def ended(self, lives: Iterable[BlockLife]) -> None:
        """These lives have ended."""
        for life in lives:
            self.lifetime.observe(life.lifetime)
            self.idle.observe(life.idle)
            for gap in life.gaps:
                self.gap.observe(gap)
