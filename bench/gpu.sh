#!/usr/bin/env bash
# Everything that takes a GPU, in one go:  bench/gpu.sh OUTPUT_FOLDER [STEP…]
#
# Builds for the GPU at hand, runs the GPU tests, the benchmark, the four tools of compute-sanitizer, the remaining
# tests, the laboratory (bench/lab) and, at the end, the report (bench/report.py; its folder has what goes to
# bench/results). Fetches nothing: it uses what $PYTHON (default: python3) holds, which must be torch >= 2.4 with CUDA,
# pytest and ninja, and an nvcc; with pytest-xdist the tests run side by side, with matplotlib there are pictures, with
# timm and torchvision whole models. BEFORE names the folder of another checkout, built for this GPU too: the step
# `compare`, which only runs when it is named, times the kernels of both in turn, and the step `host`, what their calls
# take the host. The step `paths`, which only runs when it is named, too, times the newer paths of a launch beside the
# measured ones; for their tests and sanitizers, set GC_CUDA_PATHS=all for those steps. OUTPUT_FOLDER gets GPU-NAME.md,
# the result, brought up to date after every step, GPU-NAME.log with all that was printed, and the benchmarks' own
# files. A step that fails does not keep the others from running; the exit status is 1 if any failed. The steps are
# those in the list below, in that order, or the ones named.
set -uo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
python=${PYTHON:-python3}

die() {
  printf 'bench/gpu.sh: %s\n' "$*" >&2
  exit 1
}

(($# >= 1)) || die "name the output folder: bench/gpu.sh OUTPUT_FOLDER [STEP…]"
output=$1
shift
steps=("$@")
(($#)) || steps=(build environment gpu-tests counters memcheck racecheck initcheck synccheck lab host bench
  bench-half bench-bfloat16 tests report)

gpu=$("$python" - << 'END'
import importlib.util
import sys

missing = [name for name in ("torch", "pytest", "ninja") if importlib.util.find_spec(name) is None]
if missing:
    sys.exit(f"bench/gpu.sh: {sys.executable} lacks {', '.join(missing)}")
import torch

if not torch.cuda.is_available():
    sys.exit(f"bench/gpu.sh: no CUDA device is visible to torch {torch.__version__} of {sys.executable}")
print(torch.cuda.get_device_name().replace(" ", "-").replace("/", "-"))
END
) || exit 1

mkdir -p "$output" || die "cannot make $output"
output=$(cd "$output" && pwd)
result=$output/$gpu.md
log=$output/$gpu.log
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$root" || exit 1
commit=$(git describe --always --dirty 2> /dev/null || echo unknown)
export PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH} FORCE_CUDA=1
unset TORCH_CUDA_ARCH_LIST # for this GPU
: > "$log"
failed=()

sanitizer() { # TOOL
  local home tool
  home=$("$python" -c 'from gc_cuda import _toolkit; print(_toolkit.find_toolkit().home)')
  tool=$(PATH=$PATH:$home/bin:$home/compute-sanitizer command -v compute-sanitizer) || {
    echo "skipped: there is no compute-sanitizer on the PATH or in $home"
    return 77
  }
  PYTORCH_NO_CUDA_MEMORY_CACHING=1 "$tool" --tool "$1" --error-exitcode 1 "$python" bench/sanitize.py
}

# Side by side where pytest-xdist is there, each process with one thread: with as many threads as cores in each of 12
# processes on 16 cores, 577 tests were done in the time of 2,080.
gpu_tests() {
  local one_thread=() workers=()
  if "$python" -c 'import xdist' 2> /dev/null; then
    one_thread=(env OMP_NUM_THREADS=1)
    workers=(-n "$(nproc)")
  fi
  "${one_thread[@]}" "$python" -m pytest tests -m gpu -q -rs "${workers[@]}" --ignore tests/cuda/test_gpu_counters.py
}

# Seconds to expect of a step on an H100 with 16 cores. Build, environment and sanitizers were seen to take about that;
# gpu-tests and counters nearly came to their end in less; lab, host, compare and paths have never run, and the others
# end at a limit.
about() { # STEP
  case $1 in
    build) echo 80 ;;
    environment) echo 6 ;;
    gpu-tests) echo 170 ;;
    counters) echo 45 ;;
    memcheck | racecheck | initcheck | synccheck) echo 30 ;;
    lab) echo 20 ;;
    host) echo $((${BEFORE:+4 *} 20)) ;;
    compare) echo 80 ;;
    paths) echo 180 ;;
    report) echo 480 ;;
    *) echo 540 ;;
  esac
}

# The kernels of two checkouts, in turn: before, after, before, after; the second of each counts.
compare() { # BEFORE
  local pass
  for pass in 1 2; do
    PYTHONPATH=$1 "$python" "$root/bench/kernel_times.py" --output "$output/kernels-before.json" || return
    PYTHONPATH=$root "$python" "$root/bench/kernel_times.py" --output "$output/kernels-after.json" || return
  done
  "$python" bench/kernel_times.py --compare "$output/kernels-before.json" "$output/kernels-after.json"
}

# The kernels with each newer path of a launch, between two runs of the measured ones, of which the second counts. The
# residual tail is none of what is timed.
paths() {
  local path list
  list=$(GC_CUDA_PATHS=all "$python" -c '
import gc_cuda._C as c
print(*(path for path in c.chosen_paths().split(",") if path != "tail"))') || return
  for path in none $list all none; do
    GC_CUDA_PATHS=$path "$python" bench/kernel_times.py --output "$output/kernels-$path.json" || return
  done
  for path in $list all; do
    printf '\n%s\n' "$path"
    "$python" bench/kernel_times.py --compare "$output/kernels-none.json" "$output/kernels-$path.json"
  done
}

# What a call takes the host; where there is another checkout, of both in turn, and the second of each counts.
host() {
  local pass
  if [[ -z ${BEFORE:-} ]]; then
    "$python" bench/host_times.py --samples 100 --output "$output/host.json"
    return
  fi
  for pass in 1 2; do
    PYTHONPATH=$BEFORE "$python" "$root/bench/host_times.py" --samples 100 --output "$output/host-before.json" || return
    PYTHONPATH=$root "$python" "$root/bench/host_times.py" --samples 100 --output "$output/host.json" || return
  done
  "$python" bench/host_times.py --compare "$output/host-before.json" "$output/host.json"
}

# The full grid, as far as it fits into a call of ten minutes; the benchmark names what it leaves out.
latency() { # DTYPE FOLDER
  "$python" bench/latency.py --full --device cuda --dtype "$1" --seconds 0.3 --limit 540 --output "$2"
}

run() { # STEP
  case $1 in
    build) "$python" setup.py -q build_ext --inplace ;;
    environment)
      "$python" -m gc_cuda || return
      command -v nvidia-smi > /dev/null || return 0
      nvidia-smi --query-gpu=name,driver_version,memory.total,clocks.max.sm,clocks.max.mem --format=csv
      ;;
    gpu-tests) # which would all be skipped without the CUDA kernels
      "$python" -c 'from gc_cuda import _extension as e; e.require_cuda()' && gpu_tests
      ;;
    counters) "$python" -m pytest tests/cuda/test_gpu_counters.py -q -rs ;; # alone: it reads how much memory is free
    lab)
      local capability
      capability=$("$python" -c 'import torch; print("sm_%d%d" % torch.cuda.get_device_capability())')
      bench/lab.sh "$work/lab" "$capability" && "$work/lab" --json "$output/lab.json"
      ;;
    compare) compare "${BEFORE:?names the folder of the other checkout}" ;;
    paths) paths ;;
    host) host ;;
    bench) latency float32 "$output/latency" ;;
    bench-half) latency float16 "$output/latency-float16" ;;
    bench-bfloat16) latency bfloat16 "$output/latency-bfloat16" ;;
    memcheck | racecheck | initcheck | synccheck) sanitizer "$1" ;;
    tests) "$python" -m pytest tests -m "not gpu" -q -rs ;;
    report) "$python" bench/report.py --device cuda --limit 480 --output "$output/report" --commit "$commit" ;;
    *)
      echo "no such step: $1"
      return 2
      ;;
  esac
}

# The last line that says something, for the summary.
last_line() { grep -v '^[[:space:]]*$' "$1" | tail -n 1 | tr -d '|\r' | cut -c 1-150; }

section() { # TITLE FILE [LINES]
  printf '\n## %s\n\n```\n' "$1"
  tail -n "${3:-1000000}" "$2"
  printf '```\n'
}

write_result() {
  {
    printf '# %s\n\ncommit %s, %s\n\n' "$gpu" "$commit" "$(date -u '+%Y-%m-%d %H:%M UTC')"
    printf '| step | result | seconds | last line |\n|---|---|---|---|\n'
    cat "$work/rows"
    for step in environment lab host compare paths bench bench-half bench-bfloat16 report; do
      [[ ! -s $work/$step.out ]] || section "$step" "$work/$step.out"
    done
    for step in "${failed[@]}"; do
      section "$step failed: its last lines" "$work/$step.all" 60
    done
  } > "$result"
}

for step in "${steps[@]}"; do
  printf '==> %s (about %d s on an H100)\n' "$step" "$(about "$step")"
  start=$SECONDS
  run "$step" > "$work/$step.out" 2> "$work/$step.err"
  status=$?
  cat "$work/$step.err" "$work/$step.out" > "$work/$step.all"
  case $status in
    0) word=passed ;;
    77) word=skipped ;;
    *)
      word="FAILED ($status)"
      failed+=("$step")
      tail -n 30 "$work/$step.all"
      ;;
  esac
  { printf '\n==> %s: %s\n' "$step" "$word" && cat "$work/$step.all"; } >> "$log"
  printf '| %s | %s | %d | %s |\n' "$step" "$word" $((SECONDS - start)) "$(last_line "$work/$step.all")" >> "$work/rows"
  write_result
  printf '    %s in %d s\n' "$word" $((SECONDS - start))
done
printf '==> result: %s\n' "$result"
((${#failed[@]} == 0))
