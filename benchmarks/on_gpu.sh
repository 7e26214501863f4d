#!/bin/bash
# Reproduces the figures of RESULTS.md for one GPU in ten minutes, after comparing with float32.
#
#   benchmarks/on_gpu.sh FOLDER [PYTHON_OF_TRL]
#
# The output of each command is kept in FOLDER, and a line of JSON for each run in FOLDER/steps.jsonl.
# A command that fails does not stop the others; the exit status is the number that failed.
set -u -o pipefail
folder=$(mkdir -p "$1" && cd "$1" && pwd) || exit
trl=${2-}
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit
export XLA_PYTHON_CLIENT_MEM_FRACTION=0.93 PYTHONUNBUFFERED=1
failed=0

keep() { # NAME COMMAND...
  local name=$1 start=$SECONDS
  shift
  "$@" 2>&1 | tee "$folder/$name.txt" || { failed=$((failed + 1)); echo "FAILED: $name"; }
  echo "$name: $((SECONDS - start)) s"
}

keep accuracy python3 -m benchmarks.accuracy
if [ -n "$trl" ]; then
  keep trl "$trl" -m benchmarks.peers.run_trl --workload qwen2.5-1.5b --micro 8 --steps 2 --warmup 1 \
    --record "$folder/steps.jsonl"
fi
keep decode-1.5b python3 -m benchmarks.decode --workload=qwen2.5-1.5b --profile=20
keep step-1.5b python3 -m benchmarks.step --workload=qwen2.5-1.5b --steps=2 --warmup=1 \
  --record="$folder/steps.jsonl"
keep decode-7b python3 -m benchmarks.decode --workload=qwen2.5-7b --repeats=2
keep step-7b-6-layers python3 -m benchmarks.step --workload=qwen2.5-7b --set=layers=6 --steps=2 \
  --warmup=1 --record="$folder/steps.jsonl"
exit "$failed"
