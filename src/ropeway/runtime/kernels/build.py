"""Compile the native CPU kernels with the system's C++ compiler, once, into a cache.

`python -m ropeway.runtime.kernels.build` does it ahead of time (for a container image) and prints where the result is.
"""

from __future__ import annotations

import hashlib
import logging
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from ropeway.errors import KernelError
from ropeway.runtime import cpu_info

logger = logging.getLogger(__name__)

SOURCES = Path(__file__).parent / "cpu"
COMPILERS = ("g++", "c++", "clang++")
FLAGS = ("-O3", "-std=c++17", "-fPIC", "-fopenmp", "-ffp-contract=fast", "-fvisibility=hidden", "-Wno-psabi")
TIMEOUT = 300.0


@dataclass(frozen=True)
class Variant:
    """One way to compile the same sources. `isa` is what the processor must have (see `cpu_info.ISA_FLAGS`)."""

    name: str
    isa: str
    flags: tuple[str, ...] = ()


_AVX2 = ("-mavx2", "-mfma", "-mf16c")
_AVX512 = (*_AVX2, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mprefer-vector-width=512")

VARIANTS: dict[str, Variant] = {
    variant.name: variant
    for variant in (
        Variant("avx512_bf16", "avx512_bf16", (*_AVX512, "-mavx512vnni", "-mavx512bf16")),
        Variant("avx512_vnni", "avx512_vnni", (*_AVX512, "-mavx512vnni")),
        Variant("avx512", "avx512", _AVX512),
        Variant("avx_vnni", "avx_vnni", (*_AVX2, "-mavxvnni")),
        Variant("avx2", "avx2", _AVX2),
        Variant("generic", "generic"),
        # The algorithms and layouts of avx512_bf16 with its instructions emulated, to be tested on lesser processors.
        Variant(
            "avx512_bf16_emulated",
            "avx2",
            (*_AVX2, "-O1", "-DROPEWAY_LANES=16", "-DROPEWAY_PAIR_DOT=1", "-DROPEWAY_QUAD_DOT=1"),
        ),
    )
}


def find_compiler(environ: Mapping[str, str] = os.environ) -> list[str]:
    """The compiler's command: `CXX` if set, else the first of `COMPILERS` that exists. Raises KernelError."""
    wanted = environ.get("CXX", "").split()
    if wanted:
        if shutil.which(wanted[0]) is None:
            raise KernelError(f"CXX names {wanted[0]!r}, which is not there", "Unset CXX or install that compiler.")
        return wanted
    for name in COMPILERS:
        if shutil.which(name):
            return [name]
    raise KernelError(f"there is no C++ compiler ({', '.join(COMPILERS)})", "Install g++ (Debian: apt install g++).")


def cache_dir(environ: Mapping[str, str] = os.environ) -> Path:
    """Where compiled kernels are kept: $ROPEWAY_CACHE_DIR/kernels, else in the user's cache directory."""
    if environ.get("ROPEWAY_CACHE_DIR"):
        return Path(environ["ROPEWAY_CACHE_DIR"]) / "kernels"
    base = Path(environ["XDG_CACHE_HOME"]) if environ.get("XDG_CACHE_HOME") else Path.home() / ".cache"
    return base / "ropeway" / "kernels"


def build(name: str, environ: Mapping[str, str] = os.environ) -> Path:
    """The shared library of variant `name`, compiled now if the cache lacks it. Raises KernelError.

    The name of its directory is a hash of everything that shapes it, so that a changed source is never mixed with an
    old library. Several processes may ask at once: one compiles, the others wait for it.
    """
    if sys.platform == "win32":
        raise KernelError("they are built on Linux and macOS only", "Use WSL on Windows.")
    variant = VARIANTS[name]
    directory = cache_dir(environ) / _fingerprint(variant, environ)
    library = directory / f"{name}.so"
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        _refuse_shared(directory)
        if library.exists():
            return library
        with _locked(directory / f"{name}.lock"):
            if not library.exists():
                compiler = find_compiler(environ)
                logger.warning("Compiling the kernels for %s with %s, once: they are kept.", name, compiler[0])
                _compile(compiler, variant, library)
    except OSError as error:
        raise KernelError(
            f"the kernel cache {directory} cannot be used: {error.strerror}",
            "Set ROPEWAY_CACHE_DIR to a private, writable directory.",
        ) from None
    return library


def built(name: str, environ: Mapping[str, str] = os.environ) -> Path | None:
    """The shared library of variant `name`, if the cache has it."""
    library = cache_dir(environ) / _fingerprint(VARIANTS[name], environ) / f"{name}.so"
    return library if library.exists() else None


def obtainable(name: str, environ: Mapping[str, str] = os.environ) -> bool:
    """Whether variant `name` is in the cache or there is a compiler to build it. Compiles nothing."""
    if sys.platform == "win32":
        return False
    if built(name, environ) is not None:
        return True
    try:
        find_compiler(environ)
    except KernelError:
        return False
    return True


def _fingerprint(variant: Variant, environ: Mapping[str, str]) -> str:
    digest = hashlib.blake2b(digest_size=12)
    context = (variant.name, *variant.flags, *FLAGS, environ.get("CXX", ""), platform.machine(), *platform.libc_ver())
    digest.update("\0".join(context).encode())
    for path in sorted(SOURCES.iterdir()):
        if path.suffix in {".cpp", ".h"}:
            digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()


def _refuse_shared(directory: Path) -> None:
    """Code is loaded from here: nobody else may have put it there."""
    status = directory.stat()
    if status.st_uid not in {os.getuid(), 0} or status.st_mode & 0o022:
        raise KernelError(
            f"the kernel cache {directory} can be written by others, so nothing is loaded from it",
            "Set ROPEWAY_CACHE_DIR to a private directory.",
        )


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    import fcntl

    with path.open("w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def _compile(compiler: list[str], variant: Variant, library: Path) -> None:
    """Each source by a compiler of its own, all at once; then link, and move the result into place in one step."""
    command = [*compiler, *FLAGS, *variant.flags]
    with tempfile.TemporaryDirectory(dir=library.parent) as name:
        objects = {source: Path(name) / f"{source.stem}.o" for source in sorted(SOURCES.glob("*.cpp"))}
        compiles = [[*command, "-c", str(source), "-o", str(target)] for source, target in objects.items()]
        linked = Path(name) / library.name
        _run(compiles, library)
        _run([[*command, "-shared", *map(str, objects.values()), "-o", str(linked)]], library)
        os.replace(linked, library)


def _run(commands: list[list[str]], library: Path) -> None:
    """Run `commands` side by side. What they say is kept beside the library if one fails, which is a KernelError."""
    log = library.with_suffix(".log")
    with log.open("wb") as output:
        started = [subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT) for command in commands]
        try:
            end = time.monotonic() + TIMEOUT
            failed = [c for c, p in zip(commands, started, strict=True) if p.wait(max(0.0, end - time.monotonic()))]
        except subprocess.TimeoutExpired:
            raise KernelError(
                f"{commands[0][0]} did not finish the {library.stem} kernels within {TIMEOUT:.0f} s", "Try another CXX."
            ) from None
        finally:
            for process in started:
                if process.poll() is None:
                    process.kill()
                    process.wait()
    if failed:
        raise KernelError(
            f"{failed[0][0]} failed on the {library.stem} kernels; what it said is in {log}",
            "Set CXX to another compiler, or install g++ 9 or newer.",
        )
    log.unlink()


def main(arguments: list[str]) -> int:
    """Build the given variants, or the best for this machine. Returns an exit status."""
    names = arguments or [cpu_info.detect().isa]
    unknown = [name for name in names if name not in VARIANTS]
    if unknown:
        print(f"There is no variant {unknown[0]!r}. Choose from {', '.join(VARIANTS)}.", file=sys.stderr)
        return 2
    for name in names:
        start = time.perf_counter()
        try:
            path = build(name)
        except KernelError as error:
            print(f"The kernels cannot be built: {error.message}", file=sys.stderr)
            return 1
        print(f"{name}: {path} ({time.perf_counter() - start:.1f} s)")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
