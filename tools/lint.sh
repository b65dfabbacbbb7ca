#!/usr/bin/env bash
# tools/lint.sh BIN_FOLDER check|fix
set -uo pipefail
cd "$(dirname "$0")/.."
bin=$1 mode=$2
mapfile -t sources < <(git ls-files --cached --others --exclude-standard '*.h' '*.cuh' '*.cpp' '*.cu')
status=0
if [[ $mode == fix ]]; then
  "$bin/ruff" format . || status=1
  "$bin/ruff" check --fix . || status=1
  "$bin/clang-format" -i "${sources[@]}" || status=1
else
  "$bin/ruff" format --check . || status=1
  "$bin/ruff" check . || status=1
  "$bin/clang-format" --dry-run -Werror "${sources[@]}" || status=1
fi
[[ $status == 0 ]] && echo "lint: ok"
exit $status
