#!/bin/sh
# The admin address of a real troupe: its page, what it passes on, faults, and the journal, which is then replayed.
set -eu
build=${TROUPE_BUILD:-build}
work=$(mktemp -d)
serve= replay=
trap 'kill $serve $replay 2>/dev/null || true; wait 2>/dev/null || true; rm -rf "$work"' EXIT
fail() {
    echo "FAILED: $1"
    cat "$work"/*.log
    exit 1
}
wait_for() { # FILE TEXT
    for _ in $(seq 300); do
        grep -q "$2" "$1" 2>/dev/null && return 0
        sleep 0.1
    done
    fail "no '$2' in $1"
}
says() { # TEXT CURL-ARGUMENTS
    text=$1
    shift
    answer=$(curl -s -m 20 "$@" || true)
    case $answer in *"$text"*) ;; *) fail "'$text' expected of $*, found: $answer" ;; esac
}
status() { # STATUS CURL-ARGUMENTS
    wanted=$1
    shift
    found=$(curl -s -m 20 -o /dev/null -w '%{http_code}' "$@" || true)
    [ "$found" = "$wanted" ] || fail "status $wanted expected of $*, found $found"
}

port=$(python3 -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])' 2>/dev/null || echo 18977)
admin=http://127.0.0.1:$port
"$build"/troupe serve --model models/demo --port 0 --experts 2 --threads 1 --view off --run-dir "$work/run" --allow-faults \
    --admin "127.0.0.1:$port" --journal "$work/journal" >"$work/serve.log" 2>&1 &
serve=$!
wait_for "$work/serve.log" '^Ctrl-C'
public=$(sed -n 's/^serving .* at \(http[^ ]*\) .*/\1/p' "$work/serve.log")
token=$(sed -n 's/^admin at .*token=\([0-9a-f]*\) .*/\1/p' "$work/serve.log")
[ ${#token} -eq 32 ] || fail "a token of 32 characters expected in the log"
bearer="Authorization: Bearer $token"

says '<title>troupe</title>' $admin/
status 401 $admin/troupe/events
status 401 -X POST -d '{"fault":"kill expert 1"}' $admin/fault
says '"admin":true,"faults":true' -m 1 -N -H "$bearer" $admin/troupe/events
status 404 $public/
status 404 $public/troupe/events
status 404 -X POST -d '{"fault":"kill expert 1"}' $public/fault
status 404 -X POST -d '{"stop":true}' $public/troupe/journal
status 404 -X POST -d '{"role":"experts","count":3}' $public/scale
says '"text_completion"' -H "$bearer" -d '{"prompt":[5,6,7],"max_tokens":3}' $admin/v1/completions
# Headers that just fill what the relay has room for; a stream with ids, gone on with.
for size in $(seq 8120 8130); do
    says '"object"' -H "$bearer" -H "X-Request-Id: $(printf "%0${size}d" 7)" -d '{"prompt":[5,6,7],"max_tokens":1}' $admin/v1/completions
done
ids() { curl -s -m 20 -H "$bearer" -H 'X-Request-Id: gone-on' -H 'X-Stream-Resume: 1' -d '{"prompt":[5,6,7],"max_tokens":6,"ignore_eos":true,"stream":true}' "$@" $admin/v1/completions; }
last=$(ids | sed -n 's/^id: //p' | sed -n 2p)
[ -n "$last" ] || fail "no ids in a stream over the admin address"
[ "$(ids -H "Last-Event-ID: $last" | grep -c '^id: ')" -lt "$(ids | grep -c '^id: ')" ] || fail "a stream went on as if nothing had been seen"
says 'is no statement' -H "$bearer" -d '{"fault":"hurt expert 1"}' $admin/fault
says 'say which expert' -H "$bearer" -d '{"fault":"kill expert all"}' $admin/fault
"$build"/troupe ctl fault "slow expert 0 for 1s by 5ms" --run-dir "$work/run" || fail "ctl fault"
wait_for "$work/run/expert-0.log" 'injected fault: slow'
"$build"/troupe ctl fault "hurt expert 0" --run-dir "$work/run" 2>/dev/null && fail "ctl fault took what is none"
says 'inflicted' -H "$bearer" -d '{"fault":"kill expert 1"}' $admin/fault
says '"text_completion"' -H "$bearer" -H 'X-Request-Id: after-the-fault' -d '{"prompt":[5,6,7],"max_tokens":8}' $admin/v1/completions
says '"experts_ms"' -H "$bearer" $admin/troupe/requests/after-the-fault
says '"kind":"lost"' -m 1 -N -H "$bearer" $admin/troupe/events
says 'being written already' -H "$bearer" -d '{"file":"/tmp/another"}' $admin/troupe/journal
kill -9 "$(cat "$work/run/gateway.pid")" # the next one goes on with the journal
sleep 0.5
says '"text_completion"' --retry 20 --retry-all-errors --retry-delay 1 -H "$bearer" -d '{"prompt":[5,6,7],"max_tokens":3}' $admin/v1/completions
sleep 0.5
"$build"/troupe ctl journal stop --run-dir "$work/run" >"$work/ctl.log" 2>&1 || fail "ctl journal stop"
"$build"/troupe ctl journal start "$work/second" --run-dir "$work/run" >"$work/ctl.log" 2>&1 || fail "ctl journal start"
"$build"/troupe ctl journal start "$work/third" --run-dir "$work/run" >"$work/ctl.log" 2>&1 && fail "a second journal was begun"
kill $serve
wait $serve || fail "serve ended with an error"
serve=
[ -e "$work/run" ] && fail "the run directory is still there"
[ -s "$work/second" ] || fail "the second journal is empty"

"$build"/troupe replay "$work/journal" --port 0 >"$work/replay.log" 2>&1 &
replay=$!
wait_for "$work/replay.log" 'http'
url=$(sed -n 's/.* at \(http[^ ]*\)/\1/p' "$work/replay.log")
says '<title>troupe</title>' "${url}"
says 'event: replay' -m 1 -N "${url}troupe/events"
says '"kind":"lost"' -m 1 -N "${url}troupe/events?at=99999999999999&speed=0"
[ "$(curl -s -m 8 -N "${url}troupe/events?speed=1000" | grep -o '"gateway":"[0-9a-f]*"' | sort -u | wc -l)" = 2 ] || fail "the second gateway's beginning is not replayed"
says 'replay_end' -m 5 -N "${url}troupe/events?speed=1000"
status 404 "${url}metrics"
kill $replay
wait $replay || fail "replay ended with an error"
replay=
"$build"/troupe replay tests/live_console.sh >"$work/replay.log" 2>&1 && fail "a text was replayed"
grep -q 'no SQLite file' "$work/replay.log" || fail "no reason for refusing a text"
echo "the admin address, the journal and its replay: good"
