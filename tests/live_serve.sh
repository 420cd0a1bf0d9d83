#!/bin/sh
# troupe serve with real processes: ready, answers, a killed process comes back, bad starts say why, nothing is left at the end.
set -u
troupe=${TROUPE_BUILD:-build}/troupe
scratch=$(mktemp -d /tmp/troupe-live-XXXXXX)
run=$scratch/run
pid=""

finish() {
    [ -n "$pid" ] && kill -KILL "$pid" 2>/dev/null
    sleep 0.2
    rm -rf "$scratch"
}
trap finish EXIT

fail() {
    echo "FAILED: $*" >&2
    [ -f "$scratch/log" ] && cat "$scratch/log" >&2
    exit 1
}

# Waits at most 20 s for a command to succeed.
eventually() {
    tries=0
    until "$@" >/dev/null 2>&1; do
        tries=$((tries + 1))
        [ $tries -lt 200 ] || fail "never came true: $*"
        sleep 0.1
    done
}

ready() { curl -sf "$url/ready"; }
segments() { ls /dev/shm | grep -c "^troupe-$run_id-"; }
# "pid command line" of every process of this troupe whose command line begins with the given words.
troupe_processes() {
    for file in /proc/[0-9]*/cmdline; do
        words=$(tr '\0' ' ' 2>/dev/null <"$file")
        case "$words" in "$1"*"--run-dir $run "*) echo "$(basename "$(dirname "$file")") $words" ;; esac
    done 2>/dev/null
}
processes() { troupe_processes "troupe " | wc -l; }
is_up() { # read once: the file goes and comes
    new=$(cat "$run/expert-1.pid" 2>/dev/null)
    [ -n "$new" ] && [ "$new" != "$1" ]
}
gone() { ! kill -0 "$1" 2>/dev/null; }
complete() {
    curl -sf "$url/v1/completions" -d '{"prompt": "And it came to pass", "max_tokens": 24, "temperature": 0}' |
        sed 's/.*"text":"\([^"]*\)".*/\1/'
}

# A port for it: any free one, which the log names.
"$troupe" serve --model models/demo --port 0 --run-dir "$run" --experts 3 >"$scratch/log" 2>&1 &
pid=$!
eventually grep -q '^serving' "$scratch/log"
url=$(sed -n 's/^serving .* at \(http[^ ]*\).*/\1/p' "$scratch/log")
port=${url##*:}
ready >/dev/null || fail "announced, but not ready"

# The printed line works as it stands.
line=$(grep -A1 '^try:' "$scratch/log" | tail -n 1)
sh -c "$line" | grep -q '"chat.completion"' || fail "the printed line gives no answer: $line"

# The live view is named, and there; top says what it needs where it cannot draw.
page=$(sed -n 's/^live view: open \(http[^ ]*\) .*/\1/p' "$scratch/log")
curl -sf "$page" | grep -q '<title>troupe</title>' || fail "the named page is not there: $page"
"$troupe" top --url "$url" >"$scratch/top" 2>&1 </dev/null && fail "top drew on a file"
grep -q 'once prints plain text' "$scratch/top" || fail "top does not say what to do: $(cat "$scratch/top")"
"$troupe" top --once --url "$url" | grep -q '^attention-0 .* ready ' || fail "top --once"

# Each actor is a process of its own whose command line says what it is.
for role in coordinator gateway attention expert sampler; do
    [ -n "$(troupe_processes "troupe $role ")" ] || fail "no process 'troupe $role'"
done
"$troupe" ctl status --run-dir "$run" >"$scratch/status" || fail "ctl status"
"$troupe" ctl fault "kill expert 1" --run-dir "$run" >"$scratch/refused" 2>&1 && fail "a fault, though nobody has allowed any"
grep -q 'start the troupe with --allow-faults' "$scratch/refused" || fail "no reason why there are no faults: $(cat "$scratch/refused")"
[ -z "$(find "$run" -name '*.control' -newer "$scratch/status")" ] || fail "ctl has left its socket"
grep -q 'expert-2 .*ready' "$scratch/status" || fail "ctl status does not show expert-2: $(cat "$scratch/status")"
run_id=$(ls /dev/shm | sed -n "s/^troupe-\([0-9a-f]*\)-$(cat "$run/expert-0.pid")-.*/\1/p" | head -n 1)
[ -n "$run_id" ] || fail "no shared memory of expert-0"

first=$(complete)
[ -n "$first" ] || fail "no completion"
curl -sfN "$url/v1/chat/completions" -d '{"messages": [{"role": "user", "content": "What is a river?"}], "stream": true, "max_tokens": 16}' >"$scratch/stream"
grep -q '^data: {' "$scratch/stream" && grep -q '^data: \[DONE\]' "$scratch/stream" || fail "chat stream: $(cat "$scratch/stream")"

# A killed expert comes back, and the same request gives the same text meanwhile and afterwards.
old=$(cat "$run/expert-1.pid")
kill -KILL "$old"
[ "$(complete)" = "$first" ] || fail "another text while expert-1 is away"
eventually is_up "$old"
eventually ready
[ "$(complete)" = "$first" ] || fail "another text after expert-1 came back"
grep -q "expert-1 (process $old) was ended by signal 9" "$scratch/log" || fail "the exit is not in the log"

# So does the gateway, on the same port.
old=$(cat "$run/gateway.pid")
kill -KILL "$old"
eventually ready
[ "$(complete)" = "$first" ] || fail "another text after the gateway came back"

# The coordinator too: serving goes on meanwhile, and everybody joins it again.
old=$(cat "$run/coordinator.pid")
kill -KILL "$old"
[ "$(complete)" = "$first" ] || fail "another text while the coordinator is away"
all_joined() {
    "$troupe" ctl status --run-dir "$run" >"$scratch/status" && [ "$(grep -c ' ready ' "$scratch/status")" -eq 6 ] &&
        grep -q '^epoch .*, serving,' "$scratch/status"
}
eventually all_joined
old=$(cat "$run/expert-1.pid")
kill -KILL "$old"
eventually is_up "$old"
eventually all_joined
[ "$(complete)" = "$first" ] || fail "another text after the coordinator came back"

# A second troupe may not take the port or the run directory; each says so.
"$troupe" serve --model models/demo --port "$port" >"$scratch/second" 2>&1 && fail "two troupes on one port"
grep -q "port $port .*in use" "$scratch/second" || fail "port in use: $(cat "$scratch/second")"
"$troupe" serve --model models/demo --port 0 --run-dir "$run" >"$scratch/second" 2>&1 && fail "two troupes in one run directory"
grep -q "$run is the run directory of a running troupe" "$scratch/second" || fail "run directory in use: $(cat "$scratch/second")"
"$troupe" serve --model no-such-directory >"$scratch/second" 2>&1 && fail "served no model"
grep -q "no-such-directory" "$scratch/second" || fail "no model: $(cat "$scratch/second")"
ready >/dev/null || fail "a failed second start has hurt the first"

# An actor with other numerics is refused, with the reason.
timeout 10 "$troupe" sampler --run-dir "$run" --name odd --numerics f32 >"$scratch/second" 2>&1 && fail "f32 joined bf16"
grep -q "bf16" "$scratch/second" || fail "refusal without reason: $(cat "$scratch/second")"

# SIGTERM leaves nothing.
kill -TERM "$pid"
eventually gone "$pid"
wait "$pid" || fail "serve ended with code $?"
pid=""
[ "$(processes)" -eq 0 ] || fail "processes are left: $(troupe_processes "troupe ")"
[ "$(segments)" -eq 0 ] || fail "shared memory is left: $(ls /dev/shm | grep "$run_id")"
[ ! -e "$run" ] || fail "the run directory is left: $(ls -l "$run")"

grep -q 'Sanitizer\|runtime error' "$scratch/log" && fail "a sanitizer has found something"

# Nor does SIGKILL of the supervisor leave processes or shared memory: the kernel tells its children.
"$troupe" serve --model models/demo --port 0 --run-dir "$run" --experts 2 >"$scratch/log" 2>&1 &
pid=$!
eventually grep -q '^serving' "$scratch/log"
kill -KILL "$pid"
wait "$pid" 2>/dev/null
pid=""
none_left() { [ "$(processes)" -eq 0 ] && [ "$(segments)" -eq 0 ]; }
eventually none_left

# The directory that is left can be used again; an actor that dies again and again ends the troupe with a reason.
"$troupe" serve --model models/demo --port 0 --run-dir "$run" --experts 2 --restart-limit 2 --restart-window-s 600 >"$scratch/log" 2>&1 &
pid=$!
eventually grep -q '^serving' "$scratch/log"
up_or_over() { grep -q 'giving up' "$scratch/log" || is_up "$1"; }
for _ in 1 2 3; do
    old=$(cat "$run/expert-1.pid")
    kill -KILL "$old"
    eventually up_or_over "$old"
done
eventually gone "$pid"
wait "$pid" && fail "serve gave up with code 0"
pid=""
grep -q 'more than 2 restarts of expert-1' "$scratch/log" || fail "no reason for giving up"
[ "$(processes)" -eq 0 ] || fail "processes are left after giving up"
[ "$(segments)" -eq 0 ] || fail "shared memory is left after giving up"
echo "live_serve: all is well"
