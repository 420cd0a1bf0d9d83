#!/bin/sh
# bench/gpu/peers.py without a card: what build/bench-gpu prints is read, times of peers are set beside it, absent peers are named, and
# text that is not its output is refused. The numbers below were made up for this test.
set -eu
command -v python3 >/dev/null || { echo "SKIP: no python3"; exit 0; }
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
cat >"$scratch/ours" <<'TEXT'
H100, 132 multiprocessors
measured limits: 3000 GB/s (copy of 2 GiB), 700 TFLOPS (BF16 8192^3 by cuBLASLt); FP8 is counted against twice that

matrix products (ratio: cuBLASLt's time / ours, over 1 is better)
                                                   us   cublas    ratio   TFLOPS             GB/s        
fp8  dense  M     1 N  2112 K  7168               8.0     10.0     1.25        4     0 %     1890    63 %
bf16 dense  M    64 N  4096 K  7168              30.0        -        -      125    18 %     2000    67 %
fp8  masked 32 x 8 rows N  4096 K  7168         400.0        -        -       38     3 %     2350    78 %
mla absorbed rows 16 heads 128 positions 4096    90.0        -        -      203    29 %      880    29 %
mla absorbed e4m3 rows 16 heads 128 positions 4096     80.0        -        -      203    29 %      560    19 %
TEXT
cat >"$scratch/results" <<'JSON'
{"absent": {"flash_mla": "No module named 'flash_mla'"},
 "us": {"fp8  dense  M     1 N  2112 K  7168": {"deep_gemm": 7.2}, "fp8  masked 32 x 8 rows N  4096 K  7168": {"deep_gemm": 420.0}}}
JSON
python3 bench/gpu/peers.py --ours "$scratch/ours" --results "$scratch/results" --save "$scratch/saved" >"$scratch/table"
expect() {
    grep -qE -- "$1" "$scratch/table" || { echo "expected /$1/ in:"; cat "$scratch/table"; exit 1; }
}
expect "^measured limits: 3000 GB/s"
expect "^flash_mla is absent: No module named 'flash_mla'"
expect "^fp8  dense  M     1 N  2112 K  7168 +8\.0 +10\.0 +1\.25 +7\.2 +0\.90 +- +- +0 % +63 %"
expect "^fp8  masked 32 x 8 rows N  4096 K  7168 +400\.0 +- +- +420\.0 +1\.05 +- +-"
expect "^mla absorbed e4m3 rows 16"
expect "^deep_gemm: 2 shapes, median ratio 0\.9[78], least 0\.90; within 10 % or ahead on 2"
grep -q '"deep_gemm": 7.2' "$scratch/saved"
# Without a card peers are absent, and said to be.
python3 bench/gpu/peers.py --ours "$scratch/ours" >"$scratch/table" 2>/dev/null
if ! python3 -c 'import torch; assert torch.cuda.is_available()' 2>/dev/null; then
    expect "^deep_gemm is absent: torch: "
fi
echo nothing >"$scratch/other"
if python3 bench/gpu/peers.py --ours "$scratch/other" 2>/dev/null; then
    echo "text of something else was accepted"
    exit 1
fi
python3 - <<'PYTHON'
import importlib.util
spec = importlib.util.spec_from_file_location("peers", "bench/gpu/peers.py")
peers = importlib.util.module_from_spec(spec)
spec.loader.exec_module(peers)
assert peers.shape_of("fp8  dense  M     1 N  2112 K  7168") == ("dense", ["fp8", 1, 2112, 7168])
assert peers.shape_of("bf16 masked 64 x 8 rows N  2816 K  2048") == ("masked", ["bf16", 64, 8, 2816, 2048])
assert peers.shape_of("mla absorbed e4m3 rows 16 heads 128 positions 4096") == ("absorbed", [" e4m3", 16, 128, 4096])
assert peers.shape_of("mla expanded rows 256 heads 128") == (None, [])
PYTHON
echo "bench/gpu/peers.py: table, absences and refusals as expected"
