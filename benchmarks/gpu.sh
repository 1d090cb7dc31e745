#!/usr/bin/env bash
# What only a machine with a CUDA GPU can show, in parts of at most nine minutes.
#
#   benchmarks/gpu.sh test       the operations and the engine's plan on the GPU, the precompiled
#                                kernels found there
#   benchmarks/gpu.sh sanitize   compute-sanitizer's memcheck and racecheck over a small set
#   benchmarks/gpu.sh kernels    every kernel against its peers, side by side; which forward a
#                                training convolution should take, as lines for the table
#   benchmarks/gpu.sh network    the engine's recorded plan and the whole network against the static
#                                one, the plan launch by launch, and the first call with and without
#                                precompiling; MEDDANET_CASE names a labelled case, else a phantom
#   benchmarks/gpu.sh tuned      the same volume by max-autotune and TensorRT, which take minutes to build
#   benchmarks/gpu.sh tune       block sizes of the plan's convolutions and of the decision networks'
#                                stages, on the same case; what follows goes to tune.py, as --channels 64
#
#   benchmarks/gpu.sh PART --dry-run [...]   the same on the CPU, small: proves the script, times nothing
#   benchmarks/gpu.sh PART -k crop           what follows goes to pytest; `test -n 8` compiles kernels
#                                            in as many processes (pytest-xdist)
#
# Where the checkout has no .git, MEDDANET_COMMIT says what was measured.
# Results go to $OUT (default benchmarks/results) under the names that `make report` reads, such as
# gpu_kernels_rtx-4090.json, and are whole after every test. Nothing has to be installed: the
# checkout is put on Python's path. On a machine without network, packages that are missing can lie
# in .gpu-packages beside this folder; fill it elsewhere, for that machine's Python:
#   pip install --target .gpu-packages --python-version 3.12 --only-binary=:all: --no-deps \
#     hypothesis sortedcontainers nibabel packaging typing_extensions isal safetensors \
#     jsonargparse docstring-parser typeshed-client
set -uo pipefail
cd "$(dirname "$0")/.."

part=${1:-}
case $part in
test | sanitize | kernels | network | tuned | tune) shift ;;
*)
  sed -n '2,/^set/{/^set/d;s/^# \{0,1\}//;p}' benchmarks/gpu.sh >&2
  exit 2
  ;;
esac
dry_run=
if [[ ${1:-} == --dry-run ]]; then
  dry_run=1
  shift
elif [[ ${MEDDANET_DRY_RUN:-} == 1 ]]; then
  dry_run=1
fi

python=${PYTHON:-python3}
out=$(realpath -m "${OUT:-benchmarks/results}")
mkdir -p "$out"
# for the processes that tests start elsewhere, too
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
# a part that is stopped keeps its log
export PYTHONUNBUFFERED=1
[[ -d .gpu-packages ]] && PYTHONPATH="$PYTHONPATH:$PWD/.gpu-packages"
[[ -n $dry_run ]] && export MEDDANET_DRY_RUN=1 CUDA_VISIBLE_DEVICES=

say() { echo "gpu.sh $part: $*" >&2; }

# modules that must be there, all named at once
need() {
  "$python" - "$@" <<'END' || exit 1
import importlib.util, os, sys
missing = [name for name in sys.argv[1:] if importlib.util.find_spec(name) is None]
if missing:
    sys.exit(f"gpu.sh: this Python lacks {', '.join(missing)}: see the head of benchmarks/gpu.sh")
import torch
if os.environ.get("MEDDANET_DRY_RUN") != "1" and not torch.cuda.is_available():
    sys.exit("gpu.sh: PyTorch sees no CUDA GPU; --dry-run proves the script without one")
END
}

seconds=${LIMIT:-530}
began=$SECONDS
# runs a command within what is left of the part's time
limited() {
  local left=$((seconds - (SECONDS - began)))
  if ((left < 5)); then
    say "out of time before: $*"
    return 1
  fi
  timeout --signal=INT --kill-after=10 "$left" "$@" 2>&1 | tee -a "$log"
  local code=${PIPESTATUS[0]}
  ((code == 124)) && say "stopped after $left s; results up to here are kept"
  return "$code"
}
# -v writes a line per test as it goes; what takes long elsewhere does not on a GPU
tests() {
  limited "$python" -c 'import sys, pytest; sys.exit(pytest.main(sys.argv[1:]))' \
    -v -m '' -p no:cacheprovider "$@"
}
case_of=(${MEDDANET_CASE:+--case "$MEDDANET_CASE"})

# the file of some results; those of a dry run are none of a card's
result() {
  if [[ -n $dry_run ]]; then
    echo "$out/dry-$1.json"
  else
    echo "$out/$1_$card.json"
  fi
}
card_of() {
  PYTHONPATH="benchmarks:$PYTHONPATH" "$python" -c \
    'import timing, torch; print(timing.card_name(torch.cuda.get_device_name()))'
}

# what the results of this machine are named after
name_card() {
  [[ -n $dry_run ]] || card=$(card_of) || exit 1
}
# where pytest's part of the results goes
results_into() {
  name_card
  MEDDANET_RESULTS=$(result "$1")
  export MEDDANET_RESULTS
}

log=$out/gpu-$part.log
: >"$log"
status=0

case $part in
test)
  need pytest hypothesis numpy triton nibabel isal safetensors
  # of ahead-of-time compilation what needs a GPU: the rest takes minutes anywhere
  tests tests/kernels/test_devices.py tests/kernels/test_plan.py tests/test_gpu_plan.py \
    tests/test_on_device.py \
    tests/kernels/test_aot.py::test_the_first_launches_on_this_gpu_compile_nothing "$@" || status=1
  ;;

sanitize)
  need pytest hypothesis numpy triton nibabel isal
  sanitizer=$(command -v compute-sanitizer || ls /usr/local/cuda*/bin/compute-sanitizer 2>/dev/null | tail -1)
  if [[ -z $sanitizer && -z $dry_run ]]; then
    say "compute-sanitizer is not here: install the CUDA toolkit's, or put it on the PATH"
    exit 1
  fi
  # the caching allocator would hide a write beside a tensor
  export PYTORCH_NO_CUDA_MEMORY_CACHING=1
  chosen=(tests/kernels/test_devices.py -k "not second_gpu and not training_convolution")
  tests "${chosen[@]}" "$@" || status=1
  for tool in memcheck racecheck; do
    [[ -n $dry_run ]] && continue
    # all of ours, and of PyTorch's those whose names hold the word
    limited "$sanitizer" --tool "$tool" \
      --target-processes application-only --kernel-regex kns=_kernel --error-exitcode 9 \
      "$python" -c 'import sys, pytest; sys.exit(pytest.main(sys.argv[1:]))' \
      -v -x -m '' -p no:cacheprovider "${chosen[@]}" "$@"
    code=$?
    say "$tool ended with $code (0: clean, 9: errors found, 124: out of time)"
    ((code == 0)) || status=1
  done
  ;;

kernels)
  need pytest pytest_benchmark numpy triton nibabel isal safetensors
  results_into gpu_kernels
  tests benchmarks/test_kernels.py -s --benchmark-disable-gc --benchmark-columns=median,rounds "$@" \
    || status=1
  ways=$(result forward_way)
  limited "$python" benchmarks/forward_way.py "$ways" || status=1
  say "results: $MEDDANET_RESULTS $ways"
  ;;

network)
  need pytest pytest_benchmark numpy triton nibabel isal safetensors
  name_card
  launches=$(result gpu_launches)
  # of BraTS2021_00000: gpu_launches_CARD_00000.json
  [[ -n ${MEDDANET_CASE:-} ]] && launches=${launches%.json}_${MEDDANET_CASE##*[_/]}.json
  if [[ -n $dry_run ]]; then
    launches=
  else
    limited "$python" benchmarks/plan_launches.py "$launches" "${case_of[@]}" || status=1
  fi
  results_into gpu_network
  tests benchmarks/test_network.py -k "not tuned" -s --benchmark-columns=median,rounds "$@" ||
    status=1
  cold=$(result cold_start)
  # a round compiles everything three times, which takes minutes
  limited "$python" benchmarks/cold_start.py "$cold" --rounds 1 || status=1
  say "results: $MEDDANET_RESULTS $launches $cold"
  ;;

tuned)
  need pytest pytest_benchmark numpy triton nibabel isal safetensors
  results_into gpu_network_tuned
  tests benchmarks/test_network.py -k tuned -s --benchmark-columns=median,rounds "$@" || status=1
  say "results: $MEDDANET_RESULTS"
  ;;

tune)
  need numpy triton nibabel isal safetensors
  [[ -n $dry_run ]] && say "there is no dry run of this part"
  name_card
  [[ -n $dry_run ]] ||
    limited "$python" benchmarks/tune_stage.py "$(result gpu_tune_stage)" "${case_of[@]}" || status=1
  [[ -n $dry_run ]] ||
    limited "$python" benchmarks/tune.py "$(result gpu_tune)" "${case_of[@]}" "$@" || status=1
  ;;
esac

((status == 0)) && say "done in $((SECONDS - began)) s, log: $log" || say "FAILED, see $log"
exit $status
