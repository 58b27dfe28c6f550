#!/usr/bin/env bash
# What to run, in order, on a machine with a GPU that Ropeway has not been measured on yet.
#
#   benchmarks/gpu/first_hour.sh            # everything
#   benchmarks/gpu/first_hour.sh 2 3        # some of the stages
#   TO=results benchmarks/gpu/first_hour.sh # where logs and results go (default: build/first-hour)
#
# Each stage ends within ten minutes and leaves a log of its own; a stage that fails does not keep the next one from
# running. All that there is so far is packed into first-hour.tar.gz, in $OUT or else beside the logs. Nothing is
# downloaded. Without Ropeway installed its source is used; PYTHON says which interpreter, and
# WHEELS a directory of wheels to install first (what pyproject.toml names and this machine lacks).
set -uo pipefail
cd "$(dirname "$0")/../.."
PYTHON=${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python3)}
TO=${TO:-build/first-hour}
PACK=${OUT:-$TO/..}/first-hour.tar.gz
mkdir -p "$TO" "$(dirname "$PACK")"
export PYTHONPATH="$PWD/src${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1

if [ -n "${WHEELS:-}" ]; then
    "$PYTHON" -m pip install -q --no-index --no-deps --no-compile --upgrade --target "$TO/site" "$WHEELS"/*.whl
    export PYTHONPATH="$TO/site:$PYTHONPATH"
fi

stage() { # NUMBER NAME SECONDS COMMAND...
    local number=$1 name=$2 seconds=$3 status begun=$SECONDS
    shift 3
    if [ -n "$CHOSEN" ] && ! grep -qw "$number" <<<"$CHOSEN"; then return; fi
    echo "== $number $name"
    timeout --signal=INT --kill-after=20 "$seconds" "$@" >"$TO/$number-$name.log" 2>&1
    status=$?
    tail -n 15 "$TO/$number-$name.log"
    echo "== $number $name: exit status $status after $((SECONDS - begun)) s" | tee -a "$TO/summary.txt"
    tar -czf "$PACK" --exclude=site -C "$(dirname "$TO")" "$(basename "$TO")"
}

# Plugins that only other tests need may be missing here, so the project's own options for pytest are left out.
with_pytest() {
    stage "$1" "$2" "$3" "$PYTHON" -m pytest -q -o addopts= -p no:cacheprovider --durations=10 "${@:4}"
}
TOGETHER=$("$PYTHON" -c 'import xdist' 2>/dev/null && echo "-n 4 --dist load")

CHOSEN="$*"
# Is the kernel code right? Compiled on this GPU for the first time, each kernel against plain torch.
with_pytest 1 kernels 540 $TOGETHER tests/gpu_kernels
with_pytest 2 conformance 540 $TOGETHER tests/gpu/test_gpu_attention.py tests/gpu/test_gpu_ops.py
# Is the engine right? Greedy text against transformers', at every depth, with graphs and without.
with_pytest 3 engine 590 $TOGETHER tests/gpu/test_gpu_engine.py -k "not memory_that_is_not_there"
with_pytest 4 transformers 540 $TOGETHER tests/gpu/test_gpu_transformers.py tests/unit/runtime/test_runner.py
# How fast is it? Shares of what the device can do; first the parts that matter most.
stage 5 benchmark 540 "$PYTHON" benchmarks/gpu/run.py --out "$TO" --budget 450
stage 6 more 590 "$PYTHON" benchmarks/gpu/run.py --out "$TO/more" --budget 500 \
    --only ceilings,fp8,int4,int8,fp8-cache,tiers,offline,online,peers-decode
# Does it last? And what takes all of the memory, with nobody beside it.
with_pytest 7 soak 400 tests/gpu/test_gpu_soak.py \
    tests/gpu/test_gpu_engine.py::test_memory_that_is_not_there_is_refused_with_a_number_that_works
with_pytest 8 sanitizer 590 tests/gpu/test_gpu_sanitizer.py
# Where does the time of a decode step go?
if command -v ncu >/dev/null; then
    stage 9 ncu 590 ncu --clock-control none --graph-profiling node --set basic --launch-skip 2000 --launch-count 40 \
        "$PYTHON" benchmarks/gpu/run.py --worker "$TO/ncu.jsonl" --until 9999999999 --only decode
fi
if command -v nsys >/dev/null; then
    stage 10 nsys 590 nsys profile --force-overwrite true --cuda-graph-trace node --output "$TO/decode" \
        "$PYTHON" benchmarks/gpu/run.py --worker "$TO/nsys.jsonl" --until 9999999999 --only decode
fi
cat "$TO/summary.txt"
