"""What crosses a boundary: plain data without tensors, callables or back-references; and the seams it crosses."""

from ropeway.contract.event import (
    EngineStats,
    ErrorInfo,
    FinishReason,
    Pinned,
    TierStats,
    TokenEvent,
    Usage,
    Why,
    with_extras,
)
from ropeway.contract.message import (
    Cancel,
    Command,
    Drain,
    Explain,
    Explained,
    Ordered,
    Pin,
    Pins,
    Ready,
    Reorder,
    Report,
    Step,
    Stopped,
    Submit,
)
from ropeway.contract.plan import Admit, BlockCopy, Row, StepPlan
from ropeway.contract.request import GenerateRequest, SamplingParams, Urgency
from ropeway.contract.result import ExecutorInfo, Extra, Pooling, RowFault, StepResult, Tier, TokenLogprob

__all__ = [
    "Admit", "BlockCopy", "Cancel", "Command", "Drain", "EngineStats", "ErrorInfo", "ExecutorInfo", "Explain",
    "Explained", "Extra", "FinishReason", "GenerateRequest", "Ordered", "Pin", "Pinned", "Pins", "Pooling", "Ready",
    "Reorder", "Report", "Row", "RowFault", "SamplingParams", "Step", "StepPlan", "StepResult", "Stopped", "Submit",
    "Tier", "TierStats", "TokenEvent", "TokenLogprob", "Urgency", "Usage", "Why", "with_extras",
]  # fmt: skip
