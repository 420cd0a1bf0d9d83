#!/bin/sh
# Two hosts: processes in two network namespaces joined by a virtual cable, everything over TCP. The cable is cut, in both directions and in
# one, while a stream runs: it goes on unchanged, whoever was cut off is fenced, and a process that comes back is welcome.
set -u
troupe=${TROUPE_BUILD:-build}/troupe
here=troupe-a-$$
there=troupe-b-$$
cut=troupe-$$
cut_there=troupf-$$
if ! command -v ip >/dev/null 2>&1 || ! ip netns add "$here" 2>/dev/null; then
    echo "SKIP: network namespaces are not allowed here"
    exit 0
fi
scratch=$(mktemp -d /tmp/troupe-live-XXXXXX)
pids=""

finish() {
    for pid in $pids; do kill -KILL "$pid" 2>/dev/null; done
    sleep 0.2
    ip netns del "$here" 2>/dev/null
    ip netns del "$there" 2>/dev/null
    rm -rf "$scratch"
}
trap finish EXIT

if ! { ip netns add "$there" && ip link add "$cut" netns "$here" type veth peer name "$cut_there" netns "$there" &&
    ip -n "$here" addr add 10.213.0.1/24 dev "$cut" && ip -n "$there" addr add 10.213.0.2/24 dev "$cut_there" &&
    ip -n "$here" link set "$cut" up && ip -n "$there" link set "$cut_there" up &&
    ip -n "$here" link set lo up && ip -n "$there" link set lo up; } 2>"$scratch/ip.txt"; then
    echo "SKIP: no virtual network can be made here: $(head -1 "$scratch/ip.txt")"
    exit 0
fi

fail() {
    echo "FAILED: $*" >&2
    tail -n 20 "$scratch"/*.log >&2
    exit 1
}

eventually() {
    tries=0
    until "$@" >/dev/null 2>&1; do
        tries=$((tries + 1))
        [ $tries -lt 600 ] || fail "never came true: $*"
        sleep 0.1
    done
}

start() { # HOST NAME ARGUMENTS
    host=$1
    name=$2
    shift 2
    ip netns exec "$host" "$troupe" "$@" --name "$name" --model models/demo --heartbeat-ms 100 --heartbeat-misses 10 --replicas 2 \
        >>"$scratch/$name.log" 2>&1 &
    pids="$pids $!"
}

join_there() {
    start "$there" expert-1 expert --coordinator "$address" --bind 'tcp://10.213.0.2:*' --bind-data 'tcp://10.213.0.2:*' --transport zmq
    expert_1=$!
}

start "$here" coordinator coordinator --bind 'tcp://10.213.0.1:*' --expected-experts 2
eventually grep -q 'listening at tcp' "$scratch/coordinator.log"
address=$(sed -n 's/.*listening at \(tcp:[^ ]*\).*/\1/p' "$scratch/coordinator.log")
start "$here" gateway gateway --coordinator "$address" --bind 'tcp://10.213.0.1:*' --port 0
for name in attention-0 expert-0 sampler-0; do
    start "$here" $name ${name%-*} --coordinator "$address" --bind 'tcp://10.213.0.1:*' --bind-data 'tcp://10.213.0.1:*' --transport zmq
done
join_there
eventually grep -q 'HTTP on port' "$scratch/gateway.log"
url=http://127.0.0.1:$(sed -n 's/.*HTTP on port \([0-9]*\).*/\1/p' "$scratch/gateway.log")
eventually ip netns exec "$here" curl -sf "$url/ready"

ask() {
    ip netns exec "$here" curl -sfN -m 60 "$url/v1/completions" \
        -d '{"prompt": "And it came to pass", "max_tokens": 160, "temperature": 0, "ignore_eos": true, "stream": true}' |
        sed -n 's/.*"text":"\([^"]*\)".*/\1/p' | tr -d '\n'
}
calm=$(ask)
[ -n "$calm" ] || fail "no answer"

# Cut while a stream runs, for longer than it takes to be given up.
ask >"$scratch/cut.txt" &
stream=$!
sleep 0.3
ip -n "$here" link set "$cut" down
eventually grep -q 'removed expert-1' "$scratch/coordinator.log"
wait $stream
[ "$(cat "$scratch/cut.txt")" = "$calm" ] || fail "another text while the other host was cut off"
grep -q 'removed attention-0\|removed sampler-0' "$scratch/coordinator.log" && fail "somebody on this side was given up"
# When the cable is back, the process of the other side hears that it is a member no more, and ends.
ip -n "$here" link set "$cut" up
eventually grep -q 'refused expert-1' "$scratch/expert-1.log"
wait $expert_1 && fail "expert-1 was refused and ended as if all were well"
join_there
eventually sh -c "grep -c 'joined as actor' '$scratch/expert-1.log' | grep -q 2"
[ "$(ask)" = "$calm" ] || fail "another text after expert-1 has come back"

# One way only: it hears everything and nobody hears it.
ask >"$scratch/one-way.txt" &
stream=$!
sleep 0.3
ip -n "$there" route add blackhole 10.213.0.1/32
eventually sh -c "grep -c 'removed expert-1' '$scratch/coordinator.log' | grep -q 2"
wait $stream
[ "$(cat "$scratch/one-way.txt")" = "$calm" ] || fail "another text while the other host was not heard"
ip -n "$there" route del blackhole 10.213.0.1/32
[ "$(ask)" = "$calm" ] || fail "another text in the end"
echo "live_netns: all is well"
