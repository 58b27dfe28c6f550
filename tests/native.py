"""The native kernels, for tests that have nothing to say without them."""

from __future__ import annotations

import pytest

from ropeway.runtime import cpu_info
from ropeway.runtime.kernels.build import VARIANTS
from ropeway.runtime.kernels.library import NativeLibrary, load

NATIVE = not isinstance(load(), str)
_NONE = "there are no native kernels here"
needs_native = pytest.mark.skipif(not NATIVE, reason=_NONE)

# For greedy texts that are to be the same in any batch: torch's products round otherwise where there are more rows,
# which bfloat16 shows in a text, and float32 hardly ever.
GREEDY_DTYPE = "auto" if NATIVE else "float32"


def skip_unless_there_is(level: str) -> None:
    """Skips the test of a `kernel_level` that needs native kernels where there are none."""
    if level in ("2", "3") and not NATIVE:
        pytest.skip(_NONE)


def skip_without(variant: str) -> None:
    """Skips the test where the processor lacks the instructions of `variant`."""
    if not cpu_info.ISA_FLAGS[VARIANTS[variant].isa] <= cpu_info.detect().flags:
        pytest.skip(f"this processor lacks {VARIANTS[variant].isa}")


def library_of(variant: str | None = None) -> NativeLibrary:
    """The kernels of that variant, or the best for this processor. Skips the test where there are none."""
    if variant is not None:
        skip_without(variant)
    library = load(variant)
    if isinstance(library, str):
        pytest.skip(library)
    return library
