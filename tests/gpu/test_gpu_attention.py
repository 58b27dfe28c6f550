"""Attention on a GPU by each back end that can run there: the tests of tests/conformance/test_attention.py."""

from __future__ import annotations

import pytest
import torch

from conformance.test_attention import *  # noqa: F403 - all tests that there are, also those to come
from conformance.test_attention import Make
from ropeway.runtime.attention.backend import AttentionBackend, AttentionSpec
from ropeway.runtime.attention.select import BACKENDS


@pytest.fixture(params=["triton", "flashinfer", "reference"])
def make(request: pytest.FixtureRequest, device: str) -> Make:
    where, kind = torch.device(device), BACKENDS[request.param]

    def made(spec: AttentionSpec) -> AttentionBackend:
        reason = kind.supports(spec, where)
        # On a CPU the kernels are interpreted, which is for tests alone.
        if reason is not None and (device, request.param) != ("cpu", "triton"):
            pytest.skip(reason)
        return kind(spec, where)

    return made
