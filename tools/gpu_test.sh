#!/usr/bin/env bash
# What only a GPU can show, on the machine that has one: tools/gpu_test.sh [BUILD_DIRECTORY]
# The registry checks and the PyTorch goldens on CUDA, kills and resumes of whole runs, then the
# registry once more under compute-sanitizer (memcheck, racecheck, initcheck), one op a process.
# LIMIT is the most seconds an op may take under a sanitizer (default 600). The last line counts.
set -uo pipefail
cd "$(dirname "$0")/.."
build=${1:-build}
limit=${LIMIT:-600}
jobs=${JOBS:-$(nproc)}
logs=$(mktemp -d)
trap 'rm -rf "$logs"' EXIT
ops=$(grep -oP '^NIBBLE_OP\(\K\w+' engine/ops.def)
passed=0 failed=0

"$build/tools/nibble" devices
run() {  # run NAME COMMAND...
  local name=$1
  shift
  if "$@" >"$logs/$name" 2>&1; then
    echo "ok       $name"
    passed=$((passed + 1))
  else
    echo "FAILED   $name"
    grep -E "ERROR|FAILED|=========" "$logs/$name" | head -n 8
    failed=$((failed + 1))
  fi
}
run registry-cuda "$build/tests/test-registry-cuda"
grep "largest error" "$logs/registry-cuda"
run golden-cuda "$build/tests/test-golden-cuda"
run faults-cuda "$build/tests/test-faults-cuda"
run resume tests/program/resume_test.sh "$build/tools/nibble"

sanitize() {  # sanitize TOOL OP
  local status=0
  [ "$1" = racecheck ] && export NIBBLE_RACECHECK=1  # what it cannot follow is left out
  timeout "$limit" compute-sanitizer --tool "$1" --error-exitcode 9 --kernel-regex kns=nibble \
    "$build/tests/test-registry-cuda" -tc="kernel: $2" >"$logs/$1-$2" 2>&1 || status=$?
  echo "$status $1 $2"
}
export -f sanitize
export build limit logs
if command -v compute-sanitizer >/dev/null; then
  for tool in memcheck initcheck racecheck; do
    # shellcheck disable=SC2016
    results=$(for op in $ops; do echo "$op"; done |
      xargs -P "$jobs" -I{} bash -c 'sanitize "$0" {}' "$tool")
    clean=$(grep -c "^0 " <<<"$results")
    bad=$(grep -vE "^(0|124) " <<<"$results" || true)
    late=$(grep "^124 " <<<"$results" | awk '{print $3}' | paste -sd ' ' || true)
    echo "$tool: $clean ops clean${late:+; not finished in $limit s: $late}${bad:+; FAILED: $bad}"
    passed=$((passed + clean))
    failed=$((failed + $(grep -cvE "^(0|124) " <<<"$results")))
  done
else
  echo "skipped: compute-sanitizer is not installed"
fi
echo "$passed passed, $failed failed"
[ "$failed" = 0 ]
