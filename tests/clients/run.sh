#!/bin/sh
# Real clients against a real troupe of the demo model: the official openai client, many streams and disconnects at once, lm-eval, and
# guidellm. Installs them into a virtual environment of its own (network needed the first time). Not part of `make test`.
#
# usage: tests/clients/run.sh [openai] [load] [lm-eval] [guidellm]      default: all four
#   TROUPE=build/troupe            the program
#   VENV=build/clients             the virtual environment
#   URL=http://host:port           a troupe that runs already, instead of starting one
set -eu
here=$(cd "$(dirname "$0")" && pwd)
cd "$here/../.."
troupe=${TROUPE:-build/troupe}
venv=${VENV:-build/clients}
what=${*:-openai load lm-eval guidellm}
[ -x "$venv/bin/python" ] || python3 -m venv "$venv"
venv=$(cd "$venv" && pwd)
work=$(mktemp -d)
server=

install() { # install PROGRAM-OR-MODULE PACKAGES...
    probe=$1
    shift
    "$venv/bin/python" -c "import $probe" 2>/dev/null || "$venv/bin/pip" -q install "$@"
}

stop() {
    [ -z "$server" ] || { kill -INT "$server" 2>/dev/null || true; wait "$server" 2>/dev/null || true; }
    rm -rf "$work"
}
trap stop EXIT
trap 'exit 130' INT TERM

for client in $what; do
    case $client in
    openai) install openai openai ;;
    load) install aiohttp aiohttp ;;
    lm-eval) install lm_eval "lm-eval[api]" ;;
    guidellm) install guidellm guidellm ;;
    *) echo "unknown client $client: expected openai, load, lm-eval or guidellm" >&2; exit 2 ;;
    esac
done

url=${URL:-}
if [ -z "$url" ]; then
    "$troupe" serve --model models/demo --port 0 --run-dir "$work/run" >"$work/serve.log" 2>&1 &
    server=$!
    for _ in $(seq 300); do
        url=$(sed -n 's/.* at \(http:[^ ]*\) .*/\1/p' "$work/serve.log" | head -n 1)
        [ -n "$url" ] && "$venv/bin/python" -c "import urllib.request as u; u.urlopen('$url/health')" 2>/dev/null && break
        kill -0 "$server" 2>/dev/null || { cat "$work/serve.log" >&2; exit 1; }
        sleep 0.2
    done
    [ -n "$url" ] || { echo "the troupe did not come up within a minute" >&2; cat "$work/serve.log" >&2; exit 1; }
fi
model=$("$venv/bin/python" -c "import json, urllib.request as u; print(json.load(u.urlopen('$url/v1/models'))['data'][0]['id'])")
echo "clients against $model at $url"

run_lm_eval() {
    (cd "$here/lm_eval_task" && HF_HOME="$work/hf" HF_DATASETS_OFFLINE=1 "$venv/bin/lm-eval" run \
        --model local-completions --include_path . --tasks troupe_verses,troupe_text,troupe_write --batch_size 4 \
        --model_args "base_url=$url/v1/completions,model=$model,tokenizer_backend=remote,num_concurrent=4,max_retries=1,max_length=1024" \
        --output_path "$work/lm-eval") >"$work/lm-eval.log" 2>&1 || { cat "$work/lm-eval.log"; return 1; }
    "$venv/bin/python" - "$work/lm-eval" <<'PYTHON'
import json, pathlib, sys
results = json.loads(next(pathlib.Path(sys.argv[1]).rglob("results_*.json")).read_text())["results"]
accuracy = results["troupe_verses"]["acc,none"]
bits = results["troupe_text"]["bits_per_byte,none"]
print(f"lm-eval: verses right {accuracy:.3f}, bits per byte {bits:.3f}")
sys.exit(0 if accuracy >= 0.75 and bits < 3 else "FAILED the demo model knows these verses better than that")
PYTHON
}

run_guidellm() {
    # guidellm 0.8; earlier ones spelt their options differently
    (cd "$work" && HF_HOME="$work/hf" HF_HUB_OFFLINE=1 "$venv/bin/guidellm" run --disable-progress \
        --backend "kind=openai_http,target=$url,model=$model" --profile kind=concurrent,streams=8 \
        --constraint kind=max_requests,count=40 --tokenizer "kind=huggingface_auto,model=$here/../../models/demo" \
        --data kind=synthetic_text,prompt_tokens=64,output_tokens=32 \
        --output "kind=json,path=$work/guidellm.json") >"$work/guidellm.log" 2>&1 ||
        { tail -n 60 "$work/guidellm.log"; return 1; }
    "$venv/bin/python" - "$work/guidellm.json" <<'PYTHON'
import json, sys
benchmark = json.load(open(sys.argv[1]))["benchmarks"][0]
totals = benchmark["metrics"]["request_totals"]
print(f"guidellm: {totals}")
sys.exit(0 if totals["successful"] >= 40 and not totals["errored"] else "FAILED requests of guidellm failed")
PYTHON
}

for client in $what; do
    echo "== $client"
    case $client in
    openai) "$venv/bin/python" "$here/check_openai.py" "$url" ;;
    load) "$venv/bin/python" "$here/check_load.py" "$url" ;;
    lm-eval) run_lm_eval ;;
    guidellm) run_guidellm ;;
    esac
done
echo "all clients are content"
