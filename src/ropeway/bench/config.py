"""Settings of the load tools. Names are those of `vllm bench` where the meaning is equal; sizes are for a laptop."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from ropeway.config.option import option
from ropeway.errors import ConfigError

if TYPE_CHECKING:
    from ropeway.bench.datasets import Sample, Tokens


@dataclass(frozen=True, kw_only=True)
class DatasetConfig:
    """Which prompts to send and how long the answers shall be."""

    dataset_name: Literal["random", "sharegpt", "custom", "prefix_repetition"] = option(
        "random", "Dataset", "Where prompts come from."
    )
    dataset_path: str | None = option(None, "Dataset", "File for sharegpt (JSON) or custom (lines of JSON).")
    num_prompts: int = option(100, "Dataset", "How many requests to send.", low=1)
    seed: int = option(0, "Dataset", "Seed of prompts, lengths and arrivals.", low=0)
    random_input_len: int = option(128, "Dataset", "Prompt tokens of a random request.", low=1)
    random_output_len: int = option(64, "Dataset", "Answer tokens of a random request.", low=1)
    random_range_ratio: float = option(
        0.0, "Dataset", "Random lengths lie within this share of the given ones.", low=0, high=0.999
    )
    random_prefix_len: int = option(0, "Dataset", "Tokens that all random prompts begin with.", low=0)
    prefix_repetition_prefix_len: int = option(128, "Dataset", "Tokens of each common beginning.", low=1)
    prefix_repetition_suffix_len: int = option(64, "Dataset", "Tokens of each prompt's own ending.", low=1)
    prefix_repetition_num_prefixes: int = option(10, "Dataset", "How many common beginnings there are.", low=1)
    prefix_repetition_output_len: int = option(64, "Dataset", "Answer tokens for prefix_repetition.", low=1)
    custom_output_len: int = option(256, "Dataset", "Answer tokens where a custom line names none.", low=1)
    sharegpt_output_len: int | None = option(None, "Dataset", "Answer tokens, instead of the dataset's.", low=1)

    def samples(self, tokens: Tokens) -> list[Sample]:
        """The requests. Raises ConfigError."""
        from ropeway.bench import datasets  # late: numpy, which `ropeway --help` does without

        count, seed = self.num_prompts, self.seed
        if self.dataset_name == "random":
            return datasets.random(
                tokens,
                count,
                input_len=self.random_input_len,
                output_len=self.random_output_len,
                range_ratio=self.random_range_ratio,
                prefix_len=self.random_prefix_len,
                seed=seed,
            )
        if self.dataset_name == "prefix_repetition":
            return datasets.prefix_repetition(
                tokens,
                count,
                prefix_len=self.prefix_repetition_prefix_len,
                suffix_len=self.prefix_repetition_suffix_len,
                num_prefixes=self.prefix_repetition_num_prefixes,
                output_len=self.prefix_repetition_output_len,
                seed=seed,
            )
        if self.dataset_path is None:
            message = f"The dataset {self.dataset_name} is read from a file. Give --dataset-path."
            raise ConfigError(message, param="dataset_path")
        path = Path(self.dataset_path)
        if self.dataset_name == "sharegpt":
            return datasets.sharegpt(tokens, count, path, output_len=self.sharegpt_output_len, seed=seed)
        return datasets.custom(tokens, count, path, output_len=self.custom_output_len)


@dataclass(frozen=True, kw_only=True)
class LoadConfig:
    """How to load a server, and what to report."""

    backend: Literal["openai", "openai-chat"] = option("openai", "Server", "Completions or chat completions.")
    base_url: str | None = option(None, "Server", "Address of the server (default: made of host and port).")
    host: str = option("127.0.0.1", "Server", "Host of the server.")
    port: int = option(8000, "Server", "Port of the server.", low=1, high=65535)
    endpoint: str | None = option(
        None, "Server", "Path to post to (default: /v1/completions or /v1/chat/completions, by backend)."
    )
    model: str | None = option(None, "Server", "Model name to send (default: the first that the server lists).")
    tokenizer: str | None = option(
        None, "Server", "tokenizer.json, its directory or a hub name, to count prompt tokens; without it, words."
    )

    request_rate: float = option(float("inf"), "Load", "Requests per second; 'inf' sends all at once.", low=0)
    burstiness: float = option(1.0, "Load", "Shape of the gaps: 1 is Poisson, less is burstier.", low=0)
    max_concurrency: int | None = option(None, "Load", "The most requests in flight; others wait here.", low=1)
    num_warmups: int = option(0, "Load", "Requests to send before measuring.", low=0)
    ignore_eos: bool = option(False, "Load", "Ask for answers of exactly the given length.")
    extra_body: str | None = option(None, "Load", "JSON object to add to every request body.")
    ready_check_timeout_sec: float = option(0.0, "Load", "Seconds to wait for the server to come up.", low=0)

    percentile_metrics: str = option("ttft,tpot,itl,e2el", "Report", "Latencies to report: ttft, tpot, itl, e2el.")
    metric_percentiles: str = option("99", "Report", "Percentiles to report, separated by commas.")
    save_result: bool = option(False, "Report", "Write the result as JSON.")
    save_detailed: bool = option(False, "Report", "Add every request's times, lengths and text to the JSON.")
    result_dir: str | None = option(None, "Report", "Directory for the JSON (default: here).")
    result_filename: str | None = option(None, "Report", "Name of the JSON (default: by backend, rate and model).")
    label: str | None = option(None, "Report", "Name of this run in the JSON (default: the backend).")

    @property
    def url(self) -> str:
        return self.base_url or f"http://{self.host}:{self.port}"

    @property
    def path(self) -> str:
        return self.endpoint or ("/v1/chat/completions" if self.backend == "openai-chat" else "/v1/completions")

    @property
    def percentiles(self) -> list[float]:
        try:
            found = [float(p) for p in self.metric_percentiles.split(",") if p.strip()]
        except ValueError:
            found = [-1.0]
        if not found or not all(0 <= p <= 100 for p in found):
            raise ConfigError(f"metric-percentiles {self.metric_percentiles!r} must be numbers from 0 to 100.")
        return found

    @property
    def shown(self) -> list[str]:
        names = [name.strip() for name in self.percentile_metrics.split(",") if name.strip()]
        unknown = [name for name in names if name not in {"ttft", "tpot", "itl", "e2el"}]
        if unknown:
            raise ConfigError(f"percentile-metrics has unknown {unknown[0]!r}; known are ttft, tpot, itl, e2el.")
        return names
