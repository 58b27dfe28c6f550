"""What `doctor` looks at. Each check is a function that finds something out and says what to do if it is not good."""

from __future__ import annotations

import os
import platform
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from ropeway._version import __version__
from ropeway.errors import ConfigError, KernelError
from ropeway.runtime import cpu_info
from ropeway.runtime.kernels import build
from ropeway.runtime.memory import GIB, cpu_memory, gib
from ropeway.runtime.torch_version import check_torch as check_version

PROXIES = ("http_proxy", "https_proxy", "all_proxy")
LITTLE_MEMORY = 2 * GIB
LITTLE_DISK = 5 * GIB


@dataclass(frozen=True)
class Check:
    """One line. `advice` is the next step; empty if there is nothing to do."""

    name: str
    found: str
    ok: bool = True
    advice: str = ""


def run_checks(port: int) -> Iterator[Check]:
    """All checks, one after the other; none raises."""
    every: tuple[Callable[[], Check], ...] = (
        check_python, check_torch, check_cpu, check_memory, check_compiler, check_kernels, check_cuda, check_disk,
        lambda: check_port(port), check_proxies,
    )  # fmt: skip
    for check in every:
        yield check()
    yield from check_speed()


def check_python(version: tuple[int, int] = sys.version_info[:2]) -> Check:
    found = f"{platform.python_version()} at {sys.executable}, ropeway {__version__}"
    if version < (3, 11):
        return Check("Python", found, False, "Ropeway needs Python 3.11 or newer.")
    return Check("Python", found)


def check_torch() -> Check:
    """The version by its metadata: importing torch takes seconds and is not needed to know."""
    try:
        return Check("torch", check_version())
    except ConfigError as error:
        return Check("torch", "not good enough", False, error.message)


def check_cpu(cpu: cpu_info.CpuInfo | None = None) -> Check:
    cpu = cpu or cpu_info.detect()
    bf16 = "native bfloat16" if cpu.native_bf16 else "no native bfloat16"
    found = f"{cpu.model}, {cpu.cores} core{'s' if cpu.cores > 1 else ''}, {cpu.isa}, {bf16}"
    if cpu.isa == "generic":
        return Check("CPU", found, False, "It has no AVX2: everything works, but slowly.")
    return Check("CPU", found)


def check_memory() -> Check:
    memory = cpu_memory()
    found = f"{gib(memory.free)} free of {gib(memory.total)} {memory.limit}"
    if memory.free < LITTLE_MEMORY:
        return Check("Memory", found, False, "Only small models fit. `ropeway plan MODEL` shows which.")
    return Check("Memory", found)


def check_compiler() -> Check:
    try:
        command = build.find_compiler()
        answer = subprocess.run([*command, "--version"], capture_output=True, text=True, timeout=20, check=True)
    except KernelError as error:
        return Check("Compiler", "none", False, error.message)
    except (OSError, subprocess.SubprocessError) as error:
        return Check("Compiler", f"{command[0]} does not run ({error})", False, "Install g++, or set CXX.")
    return Check("Compiler", next(iter(answer.stdout.splitlines()), command[0]))


def check_kernels(isa: str | None = None) -> Check:
    """Compiles them if that has not happened yet, as the first start would."""
    isa = isa or cpu_info.detect().isa
    try:
        return Check("Kernels", f"{isa}, at {build.build(isa)}")
    except KernelError as error:
        return Check(
            "Kernels", f"not built: {error.message}", False, "Without them attention runs in plain torch, slowly."
        )


def check_speed() -> Iterator[Check]:
    """Memory and arithmetic of this machine, and what the linear layers reach of them. Takes some seconds."""
    import torch

    from ropeway.runtime.kernels.library import load
    from ropeway.runtime.roofline import ROWS, measure

    library = load()
    if isinstance(library, str):
        yield Check("Speed", "not measured: there are no native kernels", False, "See Kernels above.")
        return
    torch.set_num_threads(cpu_info.detect().cores)
    roofline = measure(library)
    threads = f"{roofline.threads} thread{'s' if roofline.threads > 1 else ''}"
    yield Check("Bandwidth", f"{roofline.read / 1e9:.1f} GB/s, reading with {threads}")
    for reach in roofline.reaches:
        unit = "GOP/s" if reach.format == "int8" else "GFLOP/s"
        yield Check(
            reach.format,
            f"{reach.peak / 1e9:,.0f} {unit} peak; linear layers reach {reach.many_rows / reach.peak:.0%} of it with "
            f"{ROWS} rows, and {reach.one_row / roofline.read:.0%} of the bandwidth with one",
        )


def check_cuda() -> Check:
    program = shutil.which("nvidia-smi")
    if program is None:
        return Check("CUDA", "no NVIDIA driver; models run on the CPU")
    query = [program, "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"]
    try:
        gpus = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError) as error:
        return Check("CUDA", f"nvidia-smi fails ({error})", False, "Check the NVIDIA driver.")
    version = check_torch().found
    if "+cpu" in version:
        advice = f"torch {version} cannot use it: install a CUDA build (PyTorch's installation page names its index)."
        return Check("CUDA", gpus, False, advice)
    return Check("CUDA", gpus)


def check_disk() -> Check:
    """Where hub models are kept."""
    home = Path(os.environ.get("HF_HUB_CACHE") or os.environ.get("HF_HOME") or Path.home() / ".cache" / "huggingface")
    there = next(path for path in (home, *home.parents) if path.exists())
    free = shutil.disk_usage(there).free
    found = f"{gib(free)} free at {home}"
    if free < LITTLE_DISK:
        return Check("Disk", found, False, "Little room for models: set HF_HOME to a larger disk.")
    return Check("Disk", found)


def check_port(port: int) -> Check:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError as error:
            return Check("Port", f"{port}: {error.strerror}", False, "Stop what runs there, or use another --port.")
    return Check("Port", f"{port} is free")


def check_proxies() -> Check:
    """A proxy that also takes requests for this machine hides the server from its clients."""
    seen = {name: os.environ.get(name) or os.environ.get(name.upper()) for name in PROXIES}
    used = [name for name, value in seen.items() if value]
    if not used:
        return Check("Proxies", "none")
    exempt = (os.environ.get("no_proxy") or os.environ.get("NO_PROXY") or "").replace(" ", "").split(",")
    if "*" in exempt or {"127.0.0.1", "localhost"} <= set(exempt):
        return Check("Proxies", f"{', '.join(used)}; not for this machine itself")
    advice = "Clients may send requests for 127.0.0.1 to it: set NO_PROXY=127.0.0.1,localhost"
    return Check("Proxies", ", ".join(used), False, advice)
