"""vLLM's CPU build, offline. Settings are the arguments of its `LLM`; threads come from VLLM_CPU_OMP_THREADS_BIND."""

import os

from protocol import Generate, Job, Start, serve


def load(start: Start) -> tuple[str, Generate]:
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", f"0-{start.threads - 1}")
    import vllm
    from vllm import LLM, SamplingParams

    llm = LLM(start.model, **{"seed": 0, "disable_log_stats": True, **start.settings})

    def generate(job: Job) -> list[int]:
        sampling = [SamplingParams(temperature=0, max_tokens=r.max_tokens, ignore_eos=True) for r in job.requests]
        prompts = [{"prompt_token_ids": r.prompt} for r in job.requests]
        answers = llm.generate(prompts, sampling, use_tqdm=False)
        return [len(answer.outputs[0].token_ids) for answer in answers]

    return vllm.__version__, generate


# vLLM starts processes that import this file again.
if __name__ == "__main__":
    serve(load)
