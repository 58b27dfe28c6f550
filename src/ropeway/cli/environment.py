"""What `collect-env` tells of a machine."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import ropeway
from ropeway._version import __version__
from ropeway.cli.checks import check_compiler, check_cuda, check_memory
from ropeway.config import EngineConfig, ServerConfig, settings
from ropeway.runtime import cpu_info
from ropeway.runtime.kernels import build

PACKAGES = (
    "torch", "triton", "flashinfer-python", "transformers", "tokenizers", "safetensors", "huggingface-hub", "numpy",
    "llguidance", "msgspec", "fastapi", "starlette", "pydantic", "uvicorn", "uvloop", "httptools", "httpx2", "redis",
    "openai", "typer",
)  # fmt: skip
"""Those whose version may matter."""

VARIABLES = re.compile(
    r"(ROPEWAY|OMP|KMP|GOMP|MKL|OPENBLAS|TORCH|PYTORCH|TRITON|CUDA|NVIDIA|NCCL|HF|TRANSFORMERS|MALLOC|OPENAI)_\w+"
    r"|CXX|LD_PRELOAD|LD_LIBRARY_PATH|PYTHONPATH|XDG_(CACHE|DATA)_HOME|(https?|all|no)_proxy",
    re.IGNORECASE,
)
"""Names of variables that change what happens."""

_SECRET = re.compile(r"KEY|TOKEN|SECRET|PASSWORD|CREDENTIAL|AUTH", re.IGNORECASE)
_LOGIN = re.compile(r"(?:(?<=://)|^)[^/\s]*@")
_NOTED = frozenset({"amx_tile", "amx_int8", "amx_bf16", "asimd", "asimddp", "bf16", "i8mm", "sve", "hypervisor"})


def facts(environ: Mapping[str, str] = os.environ) -> Iterator[tuple[str, str]]:
    """Names and what is there, which may have several lines. None of it is a secret."""
    yield "Ropeway", f"{__version__} at {_short(str(Path(ropeway.__file__).parent))}"
    yield "Python", f"{platform.python_version()} ({platform.python_implementation()}) at {_short(sys.executable)}"
    yield "System", f"{platform.platform()}, {' '.join(platform.libc_ver()) or 'libc unknown'}"
    cpu = cpu_info.detect()
    known = _NOTED.union(*cpu_info.ISA_FLAGS.values())
    yield "CPU", f"{cpu.model}, {cpu.cores} of {os.cpu_count()} for this process\n{' '.join(sorted(cpu.flags & known))}"
    yield "Memory", check_memory().found
    yield "Compiler", check_compiler().found
    yield "Kernels", _kernels(cpu.isa, environ)
    yield "GPU", check_cuda().found
    yield "torch", _torch()
    yield "Packages", "\n".join(_packages())
    yield "Variables", "\n".join(_variables(environ)) or "none"


def _kernels(isa: str, environ: Mapping[str, str]) -> str:
    """Nothing is compiled to find out."""
    library = build.built(isa, environ)
    if library is None:
        able = "can be built at the first start" if build.obtainable(isa, environ) else "cannot be built"
        return f"{isa}, not built, {able}"
    return f"{isa}, built at {_short(str(library))}"


def _torch() -> str:
    """How it was built, and which devices it finds."""
    try:
        import torch
    except (ImportError, OSError) as error:
        return f"cannot be imported: {error}"
    made = [f"{torch.__version__}, CUDA {torch.version.cuda or 'none'}, {torch.get_num_threads()} threads"]
    for number in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        about = torch.cuda.get_device_properties(number)
        made.append(f"{about.name}, compute capability {about.major}.{about.minor}, {about.total_memory >> 20} MiB")
    lines = (line.strip(" -") for line in torch.__config__.show().splitlines()[1:])
    return "\n".join([*made, *(line for line in lines if line and not line.startswith("Build settings"))])


def _packages() -> Iterator[str]:
    for name in PACKAGES:
        try:
            yield f"{name} {importlib.metadata.version(name)}"
        except importlib.metadata.PackageNotFoundError:
            continue


def _variables(environ: Mapping[str, str]) -> Iterator[str]:
    """Those that matter, without what nobody else should know."""
    known = {setting.variable: setting.secret for setting in settings(EngineConfig, ServerConfig)}
    for name in sorted(environ):
        if VARIABLES.fullmatch(name):
            secret = known.get(name, _SECRET.search(name) is not None)
            yield f"{name}={'(hidden)' if secret else _short(_LOGIN.sub('', environ[name]))}"


def _short(text: str) -> str:
    """With ~ for the home directory, which often is somebody's name."""
    home = str(Path.home())
    return text.replace(home, "~") if len(home) > 1 else text
