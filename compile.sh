#!/usr/bin/env bash
# The one door to gc_cuda: makes an environment if none is active, installs what is missing, builds, and then
#
#   ./compile.sh               prints the environment report
#   ./compile.sh bench [ARG…]  runs the benchmark (bench/latency.py; try --help), and without ARG or with --quick that of
#                              the end of a bottleneck (bench/tail.py)
#   ./compile.sh report [ARG…] measures everything and writes a page with pictures (bench/report.py; try --help)
#   ./compile.sh test [ARG…]   runs the tests; the arguments go to pytest
#   ./compile.sh cuda          compiles the CUDA kernels in an environment of their own, .venv-cuda, and tests the models
#                              of timm and torchvision there, on the CPU; needs nvcc, no GPU
#
# An active virtual or conda environment is used as it is: a torch >= 2.4 that is there stays. Without one, .venv is made
# with the interpreter $PYTHON (default: python3). FORCE_CUDA=1 demands CUDA kernels, FORCE_CUDA=0 refuses them;
# TORCH_CUDA_ARCH_LIST, CUDA_HOME and MAX_JOBS mean what they mean to torch.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
root=$PWD
torch_version=2.13.0
build_needs=(ninja numpy pybind11 setuptools wheel)
bench_needs=(matplotlib tqdm)
# None of these brings a torch: fuzzing, ONNX, the example, and the form of result files.
test_needs=(pytest hypothesis onnx onnxscript onnxruntime scikit-learn jsonschema matplotlib tqdm)
# For the comparison with mmcv, mmdetection and mmsegmentation, which wants this mmcv. Installed without dependencies,
# which would bring a second OpenCV and perhaps a torch.
mmcv_needs=(mmcv-lite==2.1.0 mmengine==0.10.7 addict pyyaml rich termcolor yapf packaging opencv-python-headless
  markdown-it-py mdurl pygments platformdirs Pillow mmdet==3.3.0 mmsegmentation==1.2.2 pycocotools scipy shapely
  terminaltables prettytable wcwidth six ftfy regex)

# This torchvision wants exactly that torch, so that no other comes with it.
model_needs=(timm==1.0.31 torchvision==0.28.0)

say() { printf '==> %s\n' "$*"; }
die() {
  printf 'compile.sh: %s\n' "$*" >&2
  exit 1
}
usage() { sed -n '2,/^set/{/^set/!s/^# \{0,1\}//p}' compile.sh; }

make_environment() { # DIRECTORY
  local base=${PYTHON:-python3}
  "$base" -c 'import sys; sys.exit(sys.version_info < (3, 9))' || die "needs Python >= 3.9; name one in \$PYTHON"
  if ! "$1/bin/python" -m pip --version > /dev/null 2>&1; then
    say "making the environment $1"
    "$base" -m venv --clear "$1" || die "$base cannot make an environment (on Debian: apt-get install python3-venv)"
  fi
  python=$1/bin/python
}

# Sets $python: that of the active environment, or of .venv.
use_environment() {
  if [[ -n ${VIRTUAL_ENV:-${CONDA_PREFIX:-}} ]]; then
    python=${VIRTUAL_ENV:-$CONDA_PREFIX}/bin/python
    [[ -x $python ]] || die "the active environment has no $python"
  else
    make_environment "$root/.venv"
  fi
  say "environment: $python"
}

pip_install() { "$python" -m pip install --quiet --disable-pip-version-check "$@"; }

# Installs those of the packages that the environment lacks: need [--no-deps] NAME[==VERSION]…
need() {
  local options=(--) lacking
  if [[ $1 == --no-deps ]]; then
    options=(--no-deps --)
    shift
  fi
  lacking=$("$python" - "$@" << 'END'
import sys
from importlib.metadata import PackageNotFoundError, version

for requirement in sys.argv[1:]:
    name, _, wanted = requirement.partition("==")
    try:
        if wanted in ("", version(name)):
            continue
    except PackageNotFoundError:
        pass
    print(requirement, end=" ")
END
  )
  [[ -n $lacking ]] || return 0
  say "installing $lacking"
  # shellcheck disable=SC2086 # one word for each package
  pip_install "${options[@]}" $lacking
}

need_torch() {
  local found
  found=$("$python" -c 'import importlib.metadata as m; print(m.version("torch"))' 2> /dev/null || true)
  if [[ -z $found ]]; then
    say "installing torch $torch_version (a large download)"
    pip_install "torch==$torch_version"
  elif [[ $(printf '%s\n' 2.4 "$found" | sort -V | head -n 1) != 2.4 ]]; then
    die "torch $found is here, and gc_cuda needs 2.4 or newer: upgrade it, or leave the environment to get a new one"
  fi
}

# Builds in place, and makes gc_cuda importable from everywhere in the environment.
build() {
  use_environment
  need_torch
  need "${build_needs[@]}"
  say "building gc_cuda (minutes the first time, then only what has changed)"
  "$python" setup.py -q build_ext --inplace
  if ! (cd / && "$python" -c 'import importlib.util as u, sys
spec = u.find_spec("gc_cuda")
sys.exit(spec is None or spec.origin != sys.argv[1])' "$root/gc_cuda/__init__.py"); then
    say "entering gc_cuda in the environment"
    pip_install --no-build-isolation --no-deps --editable .
  fi
  "$python" -m gc_cuda
}

# The real CUDA extension, for every architecture or those of TORCH_CUDA_ARCH_LIST, checked without a GPU. It is
# installed from a wheel, apart from the build in the source folder, and any GPU is hidden so that the result is the
# same everywhere.
check_cuda() {
  make_environment "$root/.venv-cuda"
  say "environment: $python"
  if ! "$python" -c 'import sys, torch; sys.exit(torch.version.cuda is None)' 2> /dev/null; then
    say "installing torch $torch_version with CUDA (2.7 GB)"
    pip_install "torch===$torch_version" # three equals signs: no other local version, such as +cpu
  fi
  need "${build_needs[@]}"
  export FORCE_CUDA=1 CUDA_VISIBLE_DEVICES=
  rm -rf build/wheel-cuda
  say "building gc_cuda with CUDA"
  "$python" -m pip wheel --verbose --no-build-isolation --no-index --no-deps --wheel-dir build/wheel-cuda .
  pip_install --no-index --no-deps --force-reinstall build/wheel-cuda/*.whl
  say "checking it from outside the source folder"
  (cd / && "$python" "$root/tests/install/cuda_build_check.py")
  need "${test_needs[@]}" "${model_needs[@]}"
  say "testing the models of timm and torchvision"
  (cd / && "$python" -m pytest -q -c "$root/pyproject.toml" -p no:cacheprovider \
    "$root"/tests/{integrations/test_{timm,timm_recognized,torchvision},docs/test_readme,models/test_old_files,blocks/test_parts}.py)
}

verb=${1:-build}
(($# == 0)) || shift
case $verb in
  build)
    (($# == 0)) || die "build takes no arguments"
    build
    ;;
  bench)
    build
    need "${bench_needs[@]}"
    "$python" bench/latency.py "$@"
    # Where no cases were chosen, the whole tail of a bottleneck too.
    if (($# == 0)) || [[ $* == --quick ]]; then
      "$python" bench/tail.py "$@"
    fi
    ;;
  report)
    build
    need "${bench_needs[@]}"
    "$python" bench/report.py "$@"
    ;;
  test)
    build
    need "${test_needs[@]}"
    need --no-deps "${mmcv_needs[@]}"
    "$python" -m pytest "$@"
    ;;
  cuda)
    (($# == 0)) || die "cuda takes no arguments"
    check_cuda
    ;;
  help | -h | --help) usage ;;
  *)
    printf 'compile.sh: unknown verb %s\n\n' "$verb" >&2
    usage >&2
    exit 2
    ;;
esac
