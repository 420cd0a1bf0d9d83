#!/bin/sh
# Runs every test program and every test script, shows what fails, ends with one line "N passed, N failed".
# usage: tests/run.sh BUILD
set -u
build=$1
passed=0
failed=0
log=$build/test-logs
mkdir -p "$log"
run() {
    name=$1
    shift
    start=$(date +%s)
    if "$@" >"$log/$name.log" 2>&1; then
        grep -E '^\[  (PASSED|SKIPPED)|^SKIP|^identity:|^golden:' "$log/$name.log"
        passed=$((passed + 1))
        echo "ok      $name ($(($(date +%s) - start)) s)"
    else
        failed=$((failed + 1))
        tail -n 60 "$log/$name.log"
        echo "FAILED  $name (whole log: $log/$name.log)"
    fi
}
export TROUPE_BUILD="$build"
for test in "$build"/tests/test_*; do
    [ -x "$test" ] && [ ! -d "$test" ] || continue
    case "$test" in *.o | *.d) continue ;; esac
    run "$(basename "$test")" timeout 900 "$test"
done
for script in tests/check_*.sh tests/live_*.sh; do
    [ -f "$script" ] && run "$(basename "$script" .sh)" timeout 900 sh "$script"
done
echo "$passed passed, $failed failed"
[ "$failed" -eq 0 ]
