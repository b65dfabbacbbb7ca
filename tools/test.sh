#!/usr/bin/env bash
# tools/test.sh PYTHON [pytest options]: the test suite, then the Triton kernels in Triton's interpreter, which has to be
# chosen before they are imported and so needs a process of its own.
set -uo pipefail
cd "$(dirname "$0")/.."
python=$1
shift
status=0
"$python" -m pytest tests "$@" || status=$?
if [[ -f tests/test_triton.py ]]; then
  TRITON_INTERPRET=1 "$python" -m pytest tests/test_triton*.py "$@" || status=$?
fi
exit $status
