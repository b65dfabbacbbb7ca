#!/usr/bin/env bash
# tools/test_full.sh PYTHON: what is too slow for every change. Each stage runs whatever the others did.
set -uo pipefail
cd "$(dirname "$0")/.."
python=$1
failed=()
stage() {  # stage NAME COMMAND...
  local name=$1
  shift
  echo "=== $name"
  "$@" || failed+=("$name")
}

stage "tests" tools/test.sh "$python"
stage "sanitizer drivers, every width" "$python" -m pytest tests/test_native.py --full
# Bytes of 0x7f, which are huge numbers or NaN: outputs come from the allocator, past what torch would fill.
stage "new memory filled" env MALLOC_PERTURB_=128 "$python" -m pytest tests --deterministic --ignore tests/test_native.py
stage "long property runs" "$python" -m pytest tests -m hypothesis --hypothesis-profile=long
stage "extension under AddressSanitizer" tools/test_asan.sh "$python"

if ((${#failed[@]})); then
  printf 'failed: %s\n' "${failed[@]}"
  exit 1
fi
echo "test-full: ok"
