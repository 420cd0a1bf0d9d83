#!/bin/sh
# make bench-peers: one model beside llama.cpp, on the same weights, in turns, with the targets of bench/peers/targets.json.
# usage: run.sh TROUPE MODEL_DIR [bf16|q8_0] [ARGUMENTS OF compare.py]
# The peer is built once, and its file of weights written once, in build/peers. A MODEL_DIR named bench-1b or bench-1b-fp8 that is not
# there is made (2.4 and 1.2 GB). FP8 weights are measured against Q8_0 unless told otherwise, all others, and the demo, against BF16.
set -eu
troupe=$1 model=$2 peer=$3
shift 3
name=$(basename "$model")
case $name in
bench-1b-fp8) peer=${peer:-q8_0} ;;
*) peer=${peer:-bf16} ;;
esac
case $name in
bench-1b*) serve="--experts 1 --threads 2 --batch-tokens 512 --prefill-chunk 512" ;; # the fastest of what was tried on 2 processors
*) serve= ;;
esac
if [ ! -d "$model" ]; then
    case $name in
    bench-1b | bench-1b-fp8) "$troupe" synth --shape "config/shapes/$name.json" "$model" ;;
    *) echo "run.sh: there is no $model" >&2; exit 1 ;;
    esac
fi
sh bench/peers/build.sh build/peers
gguf=build/peers/$name-$peer.gguf
if [ ! -f "$gguf" ] || [ "$model/config.json" -nt "$gguf" ]; then
    build/peers/venv/bin/python bench/peers/to_gguf.py build/peers/llama_cpp_python-0.3.36/vendor/llama.cpp "$model" "$peer" "$gguf.new"
    mv "$gguf.new" "$gguf"
fi
[ "$peer" = q8_0 ] && options=--no-repack || options=
# shellcheck disable=SC2086
exec python3 bench/peers/compare.py --troupe "$troupe" --model "$model" --gguf "$gguf" --peer "$peer" --peer-options="$options" \
    --json "build/peers/$name-$peer.json" "$@" -- $serve
