#!/bin/sh
# Prometheus' own tool on what troupe gives it: the metrics of a gateway that has worked, and the alerting rules with what they are to fire
# on. Needs promtool (Debian: prometheus); not part of `make test`. vLLM's names have a colon, of which promtool complains: nothing else may.
set -eu
build=${TROUPE_BUILD:-build}
work=$(mktemp -d)
serve=
trap 'kill $serve 2>/dev/null || true; wait 2>/dev/null || true; rm -rf "$work"' EXIT
fail() {
    echo "FAILED: $1"
    cat "$work"/rules "$work"/log "$work"/complaints 2>/dev/null
    exit 1
}
promtool check rules config/grafana/alerts.yaml >"$work/rules" 2>&1 || fail "the alerting rules"
promtool test rules tests/data/alerts_test.yaml >"$work/rules" 2>&1 || fail "what the alerting rules fire on"
"$build"/troupe serve --model models/demo --port 0 --experts 2 --threads 1 --audit-share 0.5 --run-dir "$work/run" >"$work/log" 2>&1 &
serve=$!
for _ in $(seq 300); do
    grep -q '^serving' "$work/log" && break
    sleep 0.1
done
url=$(sed -n 's/^serving .* at \(http[^ ]*\).*/\1/p' "$work/log")
[ -n "$url" ] || fail "the troupe did not start"
curl -sf "$url/v1/completions" -d '{"prompt": "Once", "max_tokens": 60}' >"$work/answer" || fail "no answer"
kill -9 "$(cat "$work/run/expert-1.pid")"
curl -sf "$url/v1/completions" -d '{"prompt": "Once", "max_tokens": 60}' >"$work/answer" || fail "no answer after a loss"
sleep 1
curl -sf "$url/metrics" >"$work/metrics" || fail "no metrics"
promtool check metrics <"$work/metrics" >"$work/said" 2>&1 || true
grep -v "^vllm:[a-z0-9_]* metric names should not contain ':'\$" "$work/said" >"$work/complaints" && fail "promtool complains"
grep -q '^troupe_actors_lost_total.* 1$' "$work/metrics" || fail "the loss is not counted"
echo "promtool: $(grep -c '^# TYPE' "$work/metrics") families of metrics, $(grep -c 'alert:' config/grafana/alerts.yaml) alerting rules: good"
