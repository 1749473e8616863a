#!/usr/bin/env bash
# Builds the laboratory, a program that needs a GPU and its driver and nothing else:  bench/lab.sh OUTPUT [ARCH]
#
# ARCH is sm_90 unless it is named. The compiler is that of the toolkit which the package would be built with; $PYTHON
# (default: python3) is asked for it and needs no packages.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
(($# >= 1 && $# <= 2)) || {
  echo "usage: bench/lab.sh OUTPUT [ARCH]" >&2
  exit 2
}
# By its path: the package itself wants torch.
home=$("${PYTHON:-python3}" - "$root/gc_cuda/_toolkit.py" << 'END'
import importlib.util
import sys

spec = importlib.util.spec_from_file_location("_toolkit", sys.argv[1])
toolkit = importlib.util.module_from_spec(spec)
sys.modules[spec.name] = toolkit
spec.loader.exec_module(toolkit)
try:
    print(toolkit.find_toolkit().home)
except toolkit.ToolkitError as error:
    sys.exit(f"bench/lab.sh: {error}")
END
)
mkdir -p "$(dirname "$1")"
exec "$home/bin/nvcc" -std=c++17 -O3 -arch="${2:-sm_90}" -Xcompiler -static-libstdc++,-static-libgcc \
  -I"$root/csrc" -I"$root/bench" "$root/bench/lab.cu" -o "$1"
