#!/usr/bin/env bash
# All that only a GPU can tell, in about a quarter of an hour: tests, compute-sanitizer, benchmarks. `make gpu`
# builds first. Every step runs, whatever became of the others; the exit status says whether one failed.
set -u
cd "$(dirname "$0")/.."
python=.venv/bin/python
failed=()

step() {  # step NAME SECONDS COMMAND...
  local name=$1 seconds=$2
  shift 2
  echo "=== $name"
  timeout "$seconds" "$@" || failed+=("$name")
}

$python -c 'import sys, torch; sys.exit(None if torch.cuda.is_available() else "torch finds no GPU")' || exit 1
nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv || true
$python -m neumuter_kernels
# Baselines; the benchmarks do without those that cannot be had.
$python -m pip install --quiet --no-deps liger-kernel || true
$python -m pip install --quiet peft || true

# Of the ops, and of the layer above on the GPU; `make test` runs all.
step tests 240 $python -m pytest -q -n auto --maxprocesses 8 --dist worksteal tests/test_masked_ffn.py \
  tests/test_hard_concrete.py tests/test_select_muted.py tests/test_mute.py tests/test_token_losses.py \
  tests/test_properties.py tests/test_devices.py tests/test_doctor.py tests/test_trainer.py tests/test_cli.py

if command -v compute-sanitizer > /dev/null; then
  # Every allocation its own, so that an access beyond one, or to what nobody wrote, shows.
  export PYTORCH_NO_CUDA_MEMORY_CACHING=1
  for tool in memcheck racecheck initcheck; do
    check=(compute-sanitizer --tool "$tool" --error-exitcode 1 $python -m pytest -q -x)
    step "$tool, CUDA" 60 "${check[@]}" tests/test_select_muted.py tests/test_mute.py -k "cuda and not many"
    step "$tool, Triton" 30 "${check[@]}" tests/test_masked_ffn.py \
      -k "test_dtypes_and_activations and triton and silu and bfloat16"
  done
  unset PYTORCH_NO_CUDA_MEMORY_CACHING
else
  echo "compute-sanitizer is not there: skipped"
fi

step benchmarks 600 $python -m bench all
step README 30 $python -m bench readme

if ((${#failed[@]})); then
  printf 'failed: %s\n' "${failed[@]}"
  exit 1
fi
