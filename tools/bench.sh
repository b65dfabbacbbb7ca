#!/usr/bin/env bash
# tools/bench.sh PYTHON --quick|--full OUT.json: times only what has just been found right.
set -euo pipefail
cd "$(dirname "$0")/.."
python=$1 size=$2 out=$3
mkdir -p "$(dirname "$out")"
"$python" -m pyperf_dl.check $([[ $size == --quick ]] && echo --quick)
"$python" bench/run.py "$size" --out "$out"
