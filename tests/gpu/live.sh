#!/bin/sh
# A troupe of separate processes, all on one GPU, rows between them over NCCL: one answer, then the same with an expert process killed
# half way. Every process is another host to NCCL, which else refuses two ranks on one device.
# usage: tests/gpu/live.sh [BUILD [NUMERICS [GPU]]]      NUMERICS: bf16-sm90 (default), fp8-sm90, bf16; GPU: 0 (default), none: CPU, to try this script
set -eu
build=${1:-build}
numerics=${2:-bf16-sm90}
gpu=${3:-0}
run=$(mktemp -d)
pids=""
trap 'kill $pids 2>/dev/null || true; wait || true; rm -rf "$run"' EXIT
device=""
[ "$gpu" = none ] || device="--gpu $gpu"
start() { # role, name, more
    role=$1 name=$2
    shift 2
    NCCL_HOSTID=$name "$build/troupe" "$role" --run-dir "$run" --model models/demo --numerics "$numerics" --name "$name" --log "$run/$name.log" --verbose "$@" 2>/dev/null &
    pids="$pids $!"
}
start coordinator coordinator --expected-experts 2 --replicas 2
# shellcheck disable=SC2086
for name in expert-0 expert-1; do start expert $name $device; eval "$(echo $name | tr - _)=$!"; done
# shellcheck disable=SC2086
start attention attention-0 $device
# shellcheck disable=SC2086
start sampler sampler-0 $device
start gateway gateway --port 0
port=""
for _ in $(seq 1 300); do
    port=$(sed -n 's/.*HTTP on port \([0-9]*\).*/\1/p' "$run/gateway.log" 2>/dev/null | head -1)
    [ -n "$port" ] && curl -sf "http://127.0.0.1:$port/health" >/dev/null && break
    sleep 0.2
done
ask() {
    curl -s --max-time 120 "http://127.0.0.1:$port/v1/completions" -H 'Content-Type: application/json' \
        -d '{"prompt": "In the beginning", "max_tokens": 300, "temperature": 1, "seed": 7}' | sed -n 's/.*"text": *"\(.*\)", *"[a-z_]*":.*/\1/p'
}
sleep 3 # edges between GPUs come up beside the others
calm=$(ask)
(sleep 0.3; kill -9 "$expert_0") &
hurt=$(ask)
# shellcheck disable=SC2086
kill $pids 2>/dev/null || true
wait || true
for name in attention-0 expert-1 sampler-0; do grep -h "nccl:" "$run/$name.log" || true; done
printf 'calm:   %.100s...\nkilled: %.100s...\n' "$calm" "$hurt"
[ "$calm" = "$hurt" ] && [ ${#calm} -gt 200 ] && echo "the same tokens, ${#calm} characters"
