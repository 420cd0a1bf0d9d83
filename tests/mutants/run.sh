#!/bin/sh
# Introduces each deliberate bug of tests/mutants/*.patch alone into a copy of the tree, builds it, and lets the simulator look for it.
# Fails if a patch does not apply or build any more, or if a bug is not caught.
# usage: tests/mutants/run.sh BUILD SEEDS JOBS [NAME...]
set -u
build=$1
seeds=$2
jobs=$3
shift 3
tree=$build/mutants/tree
here=$PWD
rm -rf "$tree"
mkdir -p "$tree"
git ls-files -co --exclude-standard | grep -Ev '^(models|tests|docs)/' |
    tar -cf - -T - | tar -xf - -C "$tree"
compile() {
    ${MAKE:-make} --no-print-directory -C "$tree" BUILD=build CC="${CC:-gcc}" build/troupe >"$build/mutants/make.log" 2>&1
}
compile || { tail -20 "$build/mutants/make.log"; exit 1; }
missed=0
count=0
[ $# -gt 0 ] || set -- tests/mutants/*.patch
for patch in "$@"; do
    name=$(basename "$patch" .patch)
    patch=tests/mutants/$name.patch
    count=$((count + 1))
    if ! patch -d "$tree" -p1 -s -F1 --no-backup-if-mismatch <"$here/$patch"; then
        echo "ERROR   $name: the patch does not apply any more"
        exit 1
    fi
    if ! compile; then
        tail -20 "$build/mutants/make.log"
        echo "ERROR   $name: it does not compile any more"
        exit 1
    fi
    out=$build/mutants/$name.txt
    timeout 600 "$tree/build/troupe" sim --seeds "$seeds" --jobs "$jobs" --first >"$out" 2>&1
    status=$?
    found=$(grep -m1 -E '^seed [0-9]+: (safety|liveness|non-determinism|crash)' "$out")
    if [ $status -ge 3 ] && [ $status -le 6 ] && [ -n "$found" ]; then
        echo "caught  $name by $(echo "$found" | cut -c1-150)"
    else
        echo "MISSED  $name: $(tail -n 1 "$out" | cut -c1-150) (status $status)"
        missed=$((missed + 1))
    fi
    patch -d "$tree" -p1 -s -R -F1 --no-backup-if-mismatch <"$here/$patch" || exit 1
done
echo "$count mutants, $missed missed"
[ $missed -eq 0 ]
