#!/usr/bin/env bash
# Installs what is missing, builds with warnings as errors, runs every test, then runs them again
# under the address and undefined-behaviour sanitizers. The last line counts test programs.
set -euo pipefail
cd "$(dirname "$0")/.."
. tools/setup.sh
install_packages

passed=0 failed=0
suite() {  # suite DIRECTORY MESON_TEST_OPTION...
  local directory=$1 log
  shift
  log="$directory/meson-logs/testlog.txt"
  ninja -C "$directory" >"$directory/build.log" 2>&1 || {
    tail -n 60 "$directory/build.log"
    echo "the build in $directory failed"
    exit 1
  }
  meson test -C "$directory" --no-rebuild --print-errorlogs "$@" || true
  grep -h "skipped:" "$log" | sort -u || true
  passed=$((passed + $(grep -oP '^Ok:\s+\K[0-9]+' "$log" | tail -n 1)))
  failed=$((failed + $(grep -oP '^(Fail|Unexpected Pass|Timeout):\s+\K[0-9]+' "$log" | awk '{n += $1} END {print n + 0}')))
}

configure build -Dwerror=true
suite build
if [ "${1:-}" != --quick ]; then
  # Without -Werror: GCC's warnings see ghosts in instrumented code (its own manual says so).
  configure build-sanitize -Dcuda=disabled -Doptimization=1 -Ddebug=true -Db_ndebug=false \
    -Db_sanitize=address,undefined -Db_lundef=false
  UBSAN_OPTIONS=halt_on_error=1:print_stacktrace=1 ASAN_OPTIONS=detect_leaks=1 \
    suite build-sanitize --no-suite bits
fi
echo "$passed passed, $failed failed"
[ "$failed" = 0 ]
