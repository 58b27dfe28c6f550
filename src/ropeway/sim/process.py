"""`python -m ropeway.sim.process`: an engine process over the fake executor, for tests and demos without a model."""

from __future__ import annotations

import sys
import time

from ropeway.config import EngineConfig
from ropeway.contract import ExecutorInfo, StepResult
from ropeway.remote.process import serve_fd0
from ropeway.sim.cost import CostModel
from ropeway.sim.executor import FakeExecutor


class RealTimeExecutor(FakeExecutor):
    """Takes as long as the cost model says."""

    def collect(self, ticket: int) -> StepResult:
        result = super().collect(ticket)
        time.sleep(result.seconds)
        return result


def make_executor(config: EngineConfig) -> FakeExecutor:
    info = ExecutorInfo(
        model=config.model, device="sim", dtype="none", num_blocks=config.num_kv_blocks or 1024,
        block_size=config.block_size, max_slots=config.max_num_seqs, max_model_len=config.max_model_len or 2048,
        vocab_size=256, attention="none", notes=["device: simulated, there is no model"],
    )  # fmt: skip
    return RealTimeExecutor(info, cost=CostModel(base=0.002, per_token=0.00001))


if __name__ == "__main__":
    sys.exit(serve_fd0(make_executor))
