#!/bin/sh
# Actors started one by one, as Slurm or Kubernetes would, joining a coordinator over TCP; the data plane over TCP as well.
set -u
troupe=${TROUPE_BUILD:-build}/troupe
scratch=$(mktemp -d /tmp/troupe-live-XXXXXX)
pids=""

finish() {
    for pid in $pids; do kill -KILL "$pid" 2>/dev/null; done
    sleep 0.2
    rm -rf "$scratch"
}
trap finish EXIT

fail() {
    echo "FAILED: $*" >&2
    tail -n 20 "$scratch"/*.log >&2
    exit 1
}

eventually() {
    tries=0
    until "$@" >/dev/null 2>&1; do
        tries=$((tries + 1))
        [ $tries -lt 200 ] || fail "never came true: $*"
        sleep 0.1
    done
}

start() {
    name=$1
    shift
    "$troupe" "$@" --name "$name" --model models/demo >"$scratch/$name.log" 2>&1 &
    pids="$pids $!"
    eval "pid_$(echo "$name" | tr - _)=$!"
}

echo a-token-of-this-test >"$scratch/token"
start coordinator coordinator --bind 'tcp://127.0.0.1:*' --expected-experts 2 --admin "$scratch/admin.sock" --admin-token-file "$scratch/token"
eventually grep -q 'listening at tcp' "$scratch/coordinator.log"
address=$(sed -n 's/.*listening at \(tcp:[^ ]*\).*/\1/p' "$scratch/coordinator.log")
join="--coordinator $address --bind tcp://127.0.0.1:*"
# shellcheck disable=SC2086
start gateway gateway $join --port 0 --served-model-name far
for name in attention-0 expert-0 expert-1 sampler-0; do
    # shellcheck disable=SC2086
    start $name ${name%-*} $join --bind-data 'tcp://127.0.0.1:*' --transport zmq
done
eventually grep -q 'HTTP on port' "$scratch/gateway.log"
url=http://127.0.0.1:$(sed -n 's/.*HTTP on port \([0-9]*\).*/\1/p' "$scratch/gateway.log")
eventually curl -sf "$url/ready"
"$troupe" ctl status --address "$scratch/admin.sock" --admin-token-file "$scratch/token" >"$scratch/status.log" || fail "ctl status"
"$troupe" ctl status --address "$scratch/admin.sock" >"$scratch/stranger.log" 2>&1 && fail "ctl was answered without the token"
grep -q 'sampler-0 .*ready' "$scratch/status.log" && ! grep -qE '(sampler|attention)-0 .* 0 MB' "$scratch/status.log" || fail "status: $(cat "$scratch/status.log")"

ask() { curl -sf "$url/v1/completions" -d '{"prompt": "And it came to pass", "max_tokens": 32, "temperature": 0}' | sed 's/.*"text":"\([^"]*\)".*/\1/'; }
far=$(ask)
near=$("$troupe" generate --prompt "And it came to pass" --max-tokens 32 | tr '\n' ' ')
[ -n "$far" ] || fail "no answer"
case "$near" in "And it came to pass$far"*) ;; *) fail "over TCP '$far', in one process '$near'" ;; esac

# An actor that would compute something else is refused, and says why.
# shellcheck disable=SC2086
if timeout 20 "$troupe" attention $join --gate-top-p 0.5 --name stranger >"$scratch/stranger.log" 2>&1; then
    fail "an attention actor with another gate was let in"
fi
grep -q 'computes in bf16, found bf16-p0.5' "$scratch/stranger.log" || fail "why was the stranger refused?"

# Without a supervisor a dead process is noticed by its missing heartbeats, and a new one of its name takes its place at once.
kill -KILL "$pid_expert_1"
# shellcheck disable=SC2086
start expert-1 expert $join --bind-data 'tcp://127.0.0.1:*' --transport zmq
eventually grep -q 'joined as actor' "$scratch/expert-1.log"
[ "$(ask)" = "$far" ] || fail "another text after expert-1 was started again"

# SIGTERM ends each on its own.
for pid in $pids; do kill -TERM "$pid" 2>/dev/null; done
for pid in $pids; do wait "$pid" 2>/dev/null; done
pids=""
grep -l 'Sanitizer\|runtime error' "$scratch"/*.log && fail "a sanitizer has found something"
echo "live_tcp: all is well"
