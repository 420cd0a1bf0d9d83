#!/bin/sh
# Builds the peer: llama.cpp as llama-cpp-python 0.3.36 carries it, natively, with its own benchmark programs; and a Python environment
# for to_gguf.py. Once, some minutes on all processors. usage: build.sh DIRECTORY
set -eu
VERSION=0.3.36
OUT=$1
SOURCE=$OUT/llama_cpp_python-$VERSION/vendor/llama.cpp
for tool in cmake c++ python3; do
    command -v "$tool" > /dev/null || { echo "build.sh: $tool is needed" >&2; exit 1; }
done
mkdir -p "$OUT"
if [ ! -x "$OUT/venv/bin/python" ]; then
    python3 -m venv "$OUT/venv"
    "$OUT/venv/bin/pip" install -q numpy pyyaml tqdm
fi
if [ ! -d "$SOURCE" ]; then
    "$OUT/venv/bin/pip" download -q --no-deps --no-binary :all: -d "$OUT" "llama-cpp-python==$VERSION"
    tar -xzf "$OUT/llama_cpp_python-$VERSION.tar.gz" -C "$OUT"
fi
if [ ! -x "$OUT/llama/bin/llama-bench" ]; then
    cmake -S "$SOURCE" -B "$OUT/llama" -DCMAKE_BUILD_TYPE=Release -DGGML_NATIVE=ON -DBUILD_SHARED_LIBS=ON \
        -DLLAMA_BUILD_TESTS=OFF -DLLAMA_BUILD_EXAMPLES=OFF > "$OUT/cmake.log"
    nice cmake --build "$OUT/llama" --target llama-bench llama-batched-bench -j "$(nproc)" > "$OUT/build.log"
fi
