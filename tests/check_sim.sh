#!/bin/sh
# The command `troupe sim`: what its exit status says, what a failure prints, and that what --shrink leaves fails as well.
set -u
troupe=${TROUPE_BUILD:-build}/troupe
scratch=$(mktemp -d /tmp/troupe-check-sim-XXXXXX)
trap 'rm -rf "$scratch"' EXIT

fail() {
    echo "FAILED: $*" >&2
    tail -n 20 "$scratch/out" >&2
    exit 1
}
expect() { # STATUS ARGUMENTS
    wanted=$1
    shift
    "$troupe" sim "$@" >"$scratch/out" 2>&1
    status=$?
    [ $status -eq "$wanted" ] || fail "troupe sim $*: status $wanted expected, found $status"
}
says() {
    grep -q "$1" "$scratch/out" || fail "it does not say '$1'"
}

expect 0 --seed 17 --trace "$scratch/trace"
says '^seed 17: good'
[ "$(wc -l <"$scratch/trace")" -gt 100 ] || fail "the trace is short"
expect 0 --seeds 1..8 --jobs 2
says '^8 seeds in .*: 8 good'
says 'at least [5-9] in each seed'
expect 2 --seeds 8..1
expect 2 --scenario "$scratch/none"
echo 'at noon crash expert 0 for 1s' >"$scratch/wrong"
expect 2 --scenario "$scratch/wrong"

# Nobody looks whether rows are right, and one process lies: answers differ. Of the faults, that one is what it takes.
cat >"$scratch/safety" <<'END'
seed 4
attention 1
experts 2
samplers 1
network quiet
knob audit_share 0
at 10ms delay from expert 1 for 20ms by 1ms
at 40ms pause sampler 0 for 10ms
at 1ms lie expert 0 for 20s share 1
at 1ms lie expert 1 for 20s share 1
at 60ms hang-up client 0
at 90ms crash sampler 0 for 20ms
END
expect 3 --scenario "$scratch/safety" --shrink
says '^seed 4, commit .*: safety: '
says '^--- last steps ---'
sed -n '/^--- scenario, shrunk/,/^$/p' "$scratch/out" | sed 1d >"$scratch/shrunk"
[ "$(grep -c '^at ' "$scratch/shrunk")" -eq 1 ] || fail "one fault expected: $(cat "$scratch/shrunk")"
grep -q '^at 1ms lie' "$scratch/shrunk" || fail "the lie is not what is left: $(cat "$scratch/shrunk")"
expect 3 --scenario "$scratch/shrunk"

# The only expert process never comes back.
printf 'seed 4\nattention 1\nexperts 1\nsamplers 1\nat 1ms crash expert 0 for good\n' >"$scratch/liveness"
expect 4 --scenario "$scratch/liveness"
says ': liveness: '

# The process that runs the seeds is ended from outside: the seed that it was at has crashed.
(ulimit -t 1 && exec "$troupe" sim --seeds 1..400 --jobs 1 --first) >"$scratch/out" 2>&1
[ $? -eq 6 ] || fail "status 6 expected of a crash"
says ': crash: ended by signal'
echo "check_sim: all is well"
