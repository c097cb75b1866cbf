#!/usr/bin/env bash
# Everything that wants a GPU, on one H100 or H200: value tests first, then timings. Needs the package installed with
# its `dev` extra, and nvcc for the Hopper kernel (without it that kernel's tests are skipped, with the reason).
#
#   bench/gpu.sh                all of it, at most 4 hours; PYTHON names the interpreter (default .venv/bin/python, python3)
#   bench/gpu.sh tests kernels  these parts alone: tests, kernels, overhead, throughput
#
# Results are JSON files in bench/results, named after the device; what was printed is in bench/results/gpu-logs.
# A part that fails or runs past its time does not stop the next, save that no kernel is timed unless the tests pass.
# Exits with 0 if all passed, 1 if one did not, 2 if nothing could start.
set -uo pipefail
cd "$(dirname "$0")/.."

PYTHON=${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python3)}
LOGS=bench/results/gpu-logs
# torch takes the folder above nvcc's for the toolkit, which is wrong where nvcc is a script that calls the real one.
if [ -z "${CUDA_HOME:-}" ] && [ -e /usr/local/cuda/include/cuda_runtime.h ]; then export CUDA_HOME=/usr/local/cuda; fi

case "${1:-}" in -h | --help) sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p}' "$0"; exit 0 ;; esac
for part in "$@"; do
  case "$part" in
    tests | kernels | overhead | throughput) ;;
    *) echo "bench/gpu.sh: wanted tests, kernels, overhead or throughput, got $part" >&2; exit 2 ;;
  esac
done
"$PYTHON" - <<'PY' || exit 2
import sys
import torch
if not torch.cuda.is_available():
    sys.exit("bench/gpu.sh: wanted a CUDA device, got none")
from sr_kernels.routing import hopper
device = torch.cuda.get_device_properties(0)
print(f"{device.name}, {device.multi_processor_count} multiprocessors, {device.total_memory / 2**30:.0f} GiB, torch "
      f"{torch.__version__}; Hopper routing kernel: {hopper.why_not() or 'built'}")
PY
mkdir -p "$LOGS"
failed=()

part() {  # part NAME MINUTES COMMAND...: run it unless other parts were asked for
  local name=$1 minutes=$2
  shift 2
  if [ ${#wanted[@]} -gt 0 ] && [[ " ${wanted[*]} " != *" $name "* ]]; then return 0; fi
  echo "== $name (at most $minutes minutes): $*"
  timeout --kill-after=60 "${minutes}m" "$@" 2>&1 | tee "$LOGS/$name.log"
  local status=${PIPESTATUS[0]}
  [ "$status" = 124 ] && echo "== $name: not done in $minutes minutes"
  [ "$status" = 0 ] || { failed+=("$name"); return 1; }
}

wanted=("$@")
if part tests 45 "$PYTHON" -m pytest -m gpu tests; then
  part kernels 60 "$PYTHON" -m pytest bench/kernels --benchmark-only
else
  echo "== kernels: not timed, since the values are not right"
fi
part overhead 75 "$PYTHON" -m bench.overhead
part throughput 60 "$PYTHON" -m bench.throughput

echo "== results in bench/results; \`$PYTHON -m bench.report\` puts them into the READMEs"
if [ ${#failed[@]} -gt 0 ]; then
  echo "== failed: ${failed[*]}"
  exit 1
fi
