"""OpenVINO GenAI's continuous batching pipeline, stepped until nothing is left, as a server would.

Settings: `scheduler` and `properties` are set as they are on SchedulerConfig and the CPU plugin (a type by its name).
The pipeline looks its prefix cache up when a request is added, so requests that come together cannot share what none
of them has computed yet: with a shared prefix the first is taken to its first token before the others are added.
"""

from typing import Any

import numpy as np
import openvino as ov
import openvino_genai as genai
from protocol import Generate, Job, Start, serve


def _property(value: Any) -> Any:
    return getattr(ov.Type, value) if value in ("bf16", "f16", "f32", "u8", "i8", "u4") else value


def load(start: Start) -> tuple[str, Generate]:
    scheduler = genai.SchedulerConfig()
    for name, value in start.settings["scheduler"].items():
        getattr(scheduler, name)
        setattr(scheduler, name, value)
    properties = {name: _property(value) for name, value in start.settings["properties"].items()}
    properties["INFERENCE_NUM_THREADS"] = start.threads
    pipeline = genai.ContinuousBatchingPipeline(start.model, scheduler, "CPU", properties)

    def generate(job: Job) -> list[int]:
        handles = []
        for number, request in enumerate(job.requests):
            config = genai.GenerationConfig()
            config.max_new_tokens = config.min_new_tokens = request.max_tokens
            config.ignore_eos = True
            config.do_sample = False
            handles.append(pipeline.add_request(number, ov.Tensor(np.array([request.prompt], np.int64)), config))
            while job.shared and number == 0 and not handles[0].can_read():
                pipeline.step()
        while pipeline.has_non_finished_requests():
            pipeline.step()
        return [len(handle.read_all()[0].generated_ids) for handle in handles]

    return genai.__version__, generate


if __name__ == "__main__":
    serve(load)
