"""Building and loading the kernels: once, privately, and with a plain reason when it cannot be done."""

from __future__ import annotations

import logging
import os
import shutil
import stat
import subprocess
import threading
from pathlib import Path

import pytest
import torch

from native import library_of, skip_without
from ropeway.errors import ConfigError, KernelError
from ropeway.runtime import cpu_info
from ropeway.runtime.attention.reference import ReferenceBackend
from ropeway.runtime.attention.select import select
from ropeway.runtime.kernels import build, library
from ropeway.runtime.kernels.ops import NativeOps, TorchOps, select_ops
from ropeway.runtime.layers import linear

from .paged import spec_of

CPU = torch.device("cpu")


@pytest.fixture
def compiler(tmp_path: Path) -> dict[str, str]:
    """An environment whose compiler writes a line to calls.txt and an empty result."""
    script = tmp_path / "fake-cxx"
    script.write_text(
        f'#!/bin/sh\necho "$*" >> {tmp_path}/calls.txt\n'
        'while [ $# -gt 1 ]; do [ "$1" = "-o" ] && echo built > "$2"; shift; done\n'
    )
    script.chmod(0o755)
    return {"CXX": str(script), "ROPEWAY_CACHE_DIR": str(tmp_path / "cache")}


def calls(environ: dict[str, str]) -> int:
    """How often the compiler linked."""
    text = (Path(environ["CXX"]).parent / "calls.txt").read_text()
    return sum(" -shared " in line for line in text.splitlines())


def test_builds_once(compiler: dict[str, str]) -> None:
    first = build.build("avx2", compiler)
    assert first.read_text() == "built\n"
    assert build.build("avx2", compiler) == first
    assert calls(compiler) == 1
    assert stat.S_IMODE(first.parent.stat().st_mode) == 0o700
    assert build.build("generic", compiler) != first
    assert calls(compiler) == 2


def test_many_at_once_build_once(compiler: dict[str, str]) -> None:
    paths: list[Path] = []
    threads = [threading.Thread(target=lambda: paths.append(build.build("avx2", compiler))) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(paths)) == 1
    assert len(paths) == 6
    assert calls(compiler) == 1
    assert sorted(p.name for p in paths[0].parent.iterdir()) == ["avx2.lock", "avx2.so"]


def test_a_changed_source_is_built_anew(
    compiler: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = build.build("avx2", compiler)
    shutil.copytree(build.SOURCES, tmp_path / "sources")
    monkeypatch.setattr(build, "SOURCES", tmp_path / "sources")
    assert build.build("avx2", compiler) == first
    header = tmp_path / "sources" / "vec.h"
    header.write_text(header.read_text() + "// changed\n")
    assert build.build("avx2", compiler) != first


def test_a_failing_compiler_is_a_kernel_error(compiler: dict[str, str]) -> None:
    Path(compiler["CXX"]).write_text("#!/bin/sh\necho it hurts\nexit 3\n")
    with pytest.raises(KernelError, match=r"avx2\.log") as caught:
        build.build("avx2", compiler)
    log = Path(caught.value.message.split(" is in ")[1].split(".log")[0] + ".log")
    assert "it hurts" in log.read_text()
    assert not log.with_suffix(".so").exists()


def test_no_compiler_is_a_kernel_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(KernelError, match="CXX names 'no-such-compiler'"):
        build.find_compiler({"CXX": "no-such-compiler -O2"})
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(KernelError, match="Install g"):
        build.find_compiler({})


def test_a_cache_that_others_can_write_is_refused(compiler: dict[str, str]) -> None:
    path = build.build("avx2", compiler)
    os.chmod(path.parent, 0o777)
    with pytest.raises(KernelError, match="can be written by others"):
        build.build("avx2", compiler)


def test_a_cache_that_cannot_be_made_is_a_kernel_error(compiler: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(KernelError, match="Set ROPEWAY_CACHE_DIR"):
        build.build("avx2", compiler | {"ROPEWAY_CACHE_DIR": str(tmp_path / "file")})


def test_cache_dir_follows_the_environment() -> None:
    assert build.cache_dir({"ROPEWAY_CACHE_DIR": "/a"}) == Path("/a/kernels")
    assert build.cache_dir({"XDG_CACHE_HOME": "/b"}) == Path("/b/ropeway/kernels")
    assert build.cache_dir({}) == Path.home() / ".cache/ropeway/kernels"


@pytest.fixture
def no_kernels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):  # type: ignore[no-untyped-def]
    monkeypatch.setenv("CXX", "no-such-compiler")
    monkeypatch.setenv("ROPEWAY_CACHE_DIR", str(tmp_path))
    library.load.cache_clear()
    linear.choose.cache_clear()
    yield
    library.load.cache_clear()
    linear.choose.cache_clear()


@pytest.mark.usefixtures("no_kernels")
def test_without_kernels_torch_serves_and_one_sentence_says_so(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        backend, passed = select(spec_of(), CPU)
        ops, ops_passed = select_ops(CPU, torch.float32)
        sentence = linear.describe_linear(CPU, torch.float32)
    assert isinstance(backend, ReferenceBackend)
    assert isinstance(ops, TorchOps)
    assert all("no-such-compiler" in text for text in (*passed, *ops_passed, sentence))
    assert not any("Unset CXX" in text for text in (*passed, *ops_passed, sentence)), "what to do is said once"
    assert [record.getMessage().count("Unset CXX") for record in caplog.records] == [1]
    with pytest.raises(ConfigError, match="no-such-compiler"):
        select(spec_of(), CPU, "cpu")


def test_a_compiler_too_old_for_the_best_builds_the_next(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    tried = []

    class Library:
        def __init__(self, variant: str) -> None:
            tried.append(variant)
            if "avx512" in variant:
                raise KernelError(f"no {variant}")

    new = cpu_info.CpuInfo("new", cpu_info.ISA_FLAGS["avx512_vnni"], 2)
    monkeypatch.setattr(cpu_info, "detect", lambda: new)
    monkeypatch.setattr(library, "NativeLibrary", Library)
    load = library.load.__wrapped__
    with caplog.at_level(logging.WARNING):
        assert isinstance(load(), Library)
    assert tried == ["avx512_vnni", "avx512", "avx2"]
    assert [record.getMessage() for record in caplog.records if "no avx512_vnni" in record.getMessage()]
    assert load("avx512") == "no avx512"
    assert tried[-1] == "avx512"
    tried.clear()
    monkeypatch.setattr(cpu_info, "detect", lambda: cpu_info.CpuInfo("old", frozenset(), 2))
    load()
    assert tried == ["generic"]


@pytest.mark.parametrize("variant", build.VARIANTS)
def test_the_kernels_load_where_there_is_a_compiler_for_them(variant: str, tmp_path: Path) -> None:
    """All other tests skip what is native where it does not load, for whatever reason."""
    skip_without(variant)
    try:
        compiler = build.find_compiler()
    except KernelError as error:
        pytest.skip(error.message)
    (tmp_path / "empty.cpp").write_text("#include <omp.h>\n")
    flags = (*build.FLAGS, *build.VARIANTS[variant].flags, "-shared", "-o", str(tmp_path / "empty.so"))
    if subprocess.run([*compiler, *flags, str(tmp_path / "empty.cpp")], capture_output=True, check=False).returncode:
        pytest.skip(f"{compiler[0]} cannot build for {variant}")
    loaded = library.load(variant)
    assert not isinstance(loaded, str), loaded


def test_select_prefers_native_and_names_reasons() -> None:
    library_of()
    backend, passed = select(spec_of(), CPU)
    assert backend.name == "cpu"
    assert passed == []
    assert isinstance(select_ops(CPU, torch.bfloat16)[0], NativeOps)
    for spec, word in (
        (spec_of(head_dim=20), "multiple of 8"),
        (spec_of(head_dim=264), "up to 256"),
        (spec_of(dtype=torch.float16), "float16"),
        (spec_of(block_size=24), "block_size is 24"),
        (spec_of(kv_cache_dtype="fp8"), "cache of fp8"),
        (spec_of(kv_heads=1, latent=16), "latent"),
    ):
        backend, passed = select(spec, CPU)
        assert backend.name == "reference"
        assert word in passed[0]
        with pytest.raises(ConfigError, match=word):
            select(spec, CPU, "cpu")
    with pytest.raises(ConfigError, match="no attention back end 'fast'"):
        select(spec_of(), CPU, "fast")


def test_one_openmp_runtime_serves_torch_and_the_kernels() -> None:
    loaded = library.load()
    maps = Path("/proc/self/maps")
    if isinstance(loaded, str) or not maps.exists():
        pytest.skip("no native kernels here")
    if "clang" in build.find_compiler()[0]:
        pytest.skip("clang brings LLVM's runtime, torch GNU's")
    runtimes = {line.split()[-1] for line in maps.read_text().splitlines() if "libgomp" in line or "libomp" in line}
    assert len(runtimes) == 1, runtimes


def test_cpu_info_reads_what_the_kernel_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    proc, sys = tmp_path / "proc", tmp_path / "sys"
    proc.mkdir()
    flags = "fpu sse2 avx2 fma f16c avx512f avx512bw avx512dq avx512vl"
    (proc / "cpuinfo").write_text(
        f"processor : 0\nmodel name : Thing 9000\nflags : {flags}\n\nprocessor : 1\nflags : x\n"
    )
    for cpu in range(4):
        topology = sys / f"devices/system/cpu/cpu{cpu}/topology"
        topology.mkdir(parents=True)
        (topology / "physical_package_id").write_text("0\n")
        (topology / "core_id").write_text(f"{cpu % 2}\n")
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 2, 3}, raising=False)
    info = cpu_info.detect(proc, sys)
    assert (info.model, info.cores, info.isa, info.native_bf16) == ("Thing 9000", 2, "avx512", False)
    (sys / "fs/cgroup").mkdir(parents=True)
    (sys / "fs/cgroup/cpu.max").write_text("50000 100000\n")
    assert cpu_info.detect(proc, sys).cores == 1
    (sys / "fs/cgroup/cpu.max").write_text("max 100000\n")
    assert cpu_info.detect(proc, sys).cores == 2
    (proc / "cpuinfo").write_text(f"model name : T\nflags : {flags} avx512_vnni\n")
    assert cpu_info.detect(proc, sys).isa == "avx512_vnni"
    (proc / "cpuinfo").write_text(f"model name : T\nflags : {flags} avx512_vnni avx512_bf16\n")
    info = cpu_info.detect(proc, sys)
    assert (info.isa, info.native_bf16) == ("avx512_bf16", True)
    nothing = cpu_info.detect(tmp_path / "none", tmp_path / "none")
    assert (nothing.isa, nothing.cores, nothing.native_bf16) == ("generic", 4, False)
