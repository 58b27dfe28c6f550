"""The command around `bench throughput`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from ropeway.bench.config import DatasetConfig
from ropeway.bench.datasets import Sample
from ropeway.bench.throughput import measure
from ropeway.cli.places import Place
from ropeway.config import EngineConfig
from ropeway.contract import SamplingParams
from ropeway.service.llm import LLM
from ropeway.text.tokenizer import Tokenizer


class _ModelTokens:
    """The model's own vocabulary, as the datasets want it: without marks for beginning and end."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer

    def encode(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, False)

    def decode(self, ids: Sequence[int]) -> str:
        return self._tokenizer.decode(ids)


def run(config: EngineConfig, dataset: DatasetConfig, output: Path | None) -> None:
    """Answers have exactly the dataset's lengths, whatever the model would like to say."""
    place = None if output is None else Place(output, "--output-json")
    with LLM(**vars(config)) as llm:
        samples = dataset.samples(_ModelTokens(llm.get_tokenizer()))

        def generate(chosen: Sequence[Sample]) -> list[tuple[int, int]]:
            params = [SamplingParams(max_tokens=s.output_len, ignore_eos=True) for s in chosen]
            outputs = llm.generate([s.prompt for s in chosen], params)
            for result in outputs:
                if result.error is not None:
                    raise result.error
            return [(len(o.prompt_token_ids), len(o.outputs[0].token_ids)) for o in outputs]

        # What happens only once is not measured; a prompt of its own, so that it warms no prefix of the dataset.
        generate([Sample("warm up", 2, 2)])
        result = measure(generate, samples)
    print(result)
    print(f"Total num prompt tokens:  {result.prompt_tokens}")
    print(f"Total num output tokens:  {result.output_tokens}")
    if place is not None:
        place.write(json.dumps(result.fields()) + "\n")
