#!/bin/sh
# Each deliberate bug of tests/mutants still fits the code, so that `make sim-mutants` (which takes a quarter of an hour) has all of them.
set -u
failed=0
count=0
for patch in tests/mutants/*.patch; do
    count=$((count + 1))
    patch -p1 -s -F1 --dry-run <"$patch" >/dev/null 2>&1 || { echo "FAILED: $patch does not apply any more" >&2; failed=1; }
done
echo "check_mutants: $count patches"
exit $failed
