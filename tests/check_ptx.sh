#!/bin/sh
# Kernels that need no instruction of sm_90a alone carry PTX for newer cards beside their code for Hopper; those that do carry none.
# usage: tests/check_ptx.sh [FOLDER]
set -eu
folder=${1:-${TROUPE_BUILD:-build}/kernels/cuda}
tool=$(command -v cuobjdump || ls "${CUDA_HOME:-/usr/local/cuda}/bin/cuobjdump" 2>/dev/null || true)
[ -n "$tool" ] && ls "$folder"/*.o >/dev/null 2>&1 || { echo "SKIP: no cuobjdump, or no kernels compiled by nvcc"; exit 0; }
failed=0
count=0
for object in "$folder"/*.o; do
    name=$(basename "$object" .o)
    [ -f "kernels/cuda/$name.cu" ] && grep -q __global__ "kernels/cuda/$name.cu" || continue
    ptx=$("$tool" -lptx "$object" 2>/dev/null | grep -c 'sm_90\.ptx' || true)
    code=$("$tool" -lelf "$object" 2>/dev/null | grep -c 'sm_90a\.cubin' || true)
    wanted=1
    grep -q 'kernels/cuda/\(ptx\|mla\|tensor_map\)\.cuh' "kernels/cuda/$name.cu" && wanted=0
    if [ "$ptx" -ne "$wanted" ] || [ "$code" -lt 1 ]; then
        echo "$name: $ptx PTX (expected $wanted), $code for sm_90a"
        failed=1
    fi
    count=$((count + 1))
done
echo "$count objects of kernels read"
exit "$failed"
