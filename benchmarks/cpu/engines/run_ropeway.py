"""Ropeway, offline in one process. Settings are the fields of `EngineConfig`."""

from protocol import Generate, Job, Start, serve

import ropeway
from ropeway import LLM, SamplingParams


def load(start: Start) -> tuple[str, Generate]:
    llm = LLM(start.model, threads=start.threads, **start.settings)

    def generate(job: Job) -> list[int]:
        sampling = [SamplingParams(temperature=0, max_tokens=r.max_tokens, ignore_eos=True) for r in job.requests]
        answers = llm.generate([r.prompt for r in job.requests], sampling, use_tqdm=False)
        return [len(answer.outputs[0].token_ids) for answer in answers]

    return ropeway.__version__, generate


if __name__ == "__main__":
    serve(load)
