#!/usr/bin/env bash
# tools/test_asan.sh PYTHON: the extension compiled with AddressSanitizer and UBSan, in a copy of the tree, under the stock
# torch. The sanitizer's library has to be loaded first, and libstdc++ with it so that exceptions are intercepted;
# leaks are not looked for, since Python and torch keep memory until the end.
set -euo pipefail
cd "$(dirname "$0")/.."
python=$(realpath -s "$1")
tree=build/asan
mkdir -p "$tree"
git ls-files -z --cached --others --exclude-standard | tar -c --null -T - --ignore-failed-read | tar -x -C "$tree"
cd "$tree"
export PYPERF_CUDA=0
CXX="$(realpath ../../tools)/sanitizing_cxx.sh" "$python" setup.py build_ext --inplace
runtime=$(c++ -print-file-name=libasan.so)
export LD_PRELOAD="$(realpath "$runtime"):$(realpath "$(c++ -print-file-name=libstdc++.so.6)")"
export ASAN_OPTIONS=detect_leaks=0:abort_on_error=0 UBSAN_OPTIONS=print_stacktrace=1:halt_on_error=1
export PYTHONPATH=$PWD
"$python" -m pyperf_dl.check --backend native
"$python" -m pytest tests -q -p no:cacheprovider --ignore tests/test_native.py --ignore tests/test_package.py -k "not compile and not export"
