"""Load the native kernels: a plain C interface through ctypes, independent of torch's C++ interface."""

from __future__ import annotations

import ctypes
import functools
import logging
from ctypes import c_char_p, c_double, c_int, c_int64, c_void_p

import torch

from ropeway.errors import KernelError
from ropeway.runtime import cpu_info
from ropeway.runtime.kernels import build
from ropeway.runtime.pages import Arena

logger = logging.getLogger(__name__)


class AttentionStep(ctypes.Structure):
    """What all layers of a step share; mirrors the struct of this name in cpu/attention.h."""

    _fields_ = (
        *((name, c_int64) for name in ("type", "kv_type", "rows", "tokens", "heads", "kv_heads", "head_dim")),
        *((name, c_int64) for name in ("block_size", "layers", "table_stride", "threads")),
        *((name, c_void_p) for name in ("cu_q", "starts", "tables", "slots")),
        ("scale", c_double),
    )


class AttentionLayer(ctypes.Structure):
    """One layer of one step; mirrors the struct of this name in cpu/attention.h."""

    _fields_ = (
        *((name, c_void_p) for name in ("q", "k", "v", "kv", "out")),
        *((name, c_int64) for name in ("q_stride", "k_stride", "v_stride", "layer", "window")),
    )


class LinearWeight(ctypes.Structure):
    """A packed weight of a linear layer; mirrors the struct of this name in cpu/linear.h.

    It holds addresses only: whoever makes one keeps the memory alive.
    """

    _fields_ = (
        *((name, c_int64) for name in ("type", "format", "columns", "depth", "group")),
        *((name, c_void_p) for name in ("packed", "bias")),
    )


class NativeLibrary:
    """The kernels of one variant, with their argument types bound.

    `threads` is passed to every kernel. torch's own setting is per thread of the caller, so it is read once per step
    (`refresh`) instead of being left to the OpenMP runtime. Loading after torch binds to the OpenMP runtime that torch
    brought along, and both share one pool of threads. `weights` is where packed weights lie.
    """

    def __init__(self, variant: str) -> None:
        self.variant = variant
        path = build.build(variant)
        try:
            self._library = ctypes.CDLL(str(path))
        except OSError as error:
            raise KernelError(f"the compiled kernels cannot be loaded: {error}", f"Delete {path} to rebuild.") from None
        self.threads = torch.get_num_threads()
        self.weights = Arena()
        i, p, d = c_int64, c_void_p, c_double
        self.attention = self._bind("ropeway_attention", [p, p])
        self.rms_norm = self._bind("ropeway_rms_norm", [i, p, p, p, i, i, i, i, i, d, i])
        self.add_rms_norm = self._bind("ropeway_add_rms_norm", [i, p, p, p, p, i, i, d, i])
        self.rotary = self._bind("ropeway_rotary", [i, p, p, p, p, d, p, p, p, i, i, i, i, i, i, i, i])
        self.silu_mul = self._bind("ropeway_silu_mul", [i, p, p, i, i, i])
        self.read = self._bind("ropeway_read", [p, i, i])
        self.read.restype = ctypes.c_uint64
        self.peak = self._bind("ropeway_peak", [i, i, i])
        self.peak.restype = c_double

        self.sample = self._bind("ropeway_sample", [p, i, i, c_char_p, p, p, p, i])
        self.logprobs = self._bind("ropeway_logprobs", [p, i, i, p, i, p, p, p, i])
        self.sample_scratch = self._bind("ropeway_sample_scratch", [i])
        self.sample_scratch.restype = c_int64

        self.packed_bytes = self._bind("ropeway_packed_bytes", [p])
        self.packed_bytes.restype = c_int64
        self.pack = self._bind("ropeway_pack", [p, p, p, p, p, i])
        self.unpack = self._bind("ropeway_unpack", [p, p, p, i, i])
        self.linear = self._bind("ropeway_linear", [p, p, p, i, i])

        self.step = self._bind("ropeway_step", [p, p, p])
        self.step_scratch = self._bind("ropeway_step_scratch", [p, p, p])
        self.step_scratch.restype = c_int64

    def refresh(self) -> int:
        """Take over torch's number of threads, and return it."""
        self.threads = torch.get_num_threads()
        return self.threads

    def _bind(self, name: str, arguments: list[type]) -> ctypes._NamedFuncPointer:
        function: ctypes._NamedFuncPointer = getattr(self._library, name)
        function.argtypes = arguments
        function.restype = c_int
        return function


@functools.cache
def load(variant: str | None = None) -> NativeLibrary | str:
    """The kernels for this processor (or of the named variant), or why there are none, said once in the log too.

    The reason is the cause alone, without a full stop, to be put into sentences; what to do about it is in the log.

    Where the compiler is too old for the processor's best instructions, the next best that it can build serve.
    """
    flags = cpu_info.detect().flags
    usable = [name for name, needed in cpu_info.ISA_FLAGS.items() if needed <= flags]
    faults = []
    for name in [variant] if variant else usable[:-1] or usable:  # the last, "generic", is slower than torch
        try:
            library = NativeLibrary(name)
        except KernelError as error:
            faults.append(error)
        else:
            if faults:
                logger.warning("Native kernels for %s serve, slower than they could be: %s", name, faults[0].message)
            return library
    logger.warning("Native kernels are off and torch serves, slower: %s", faults[0].message)
    return faults[0].cause
