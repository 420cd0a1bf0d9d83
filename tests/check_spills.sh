#!/bin/sh
# No kernel may spill registers, or keep an array in local memory, unless the table below says how much and why. Reads what ptxas
# said when the kernels were compiled (build/kernels/cuda/*.ptxas); without nvcc there is nothing to read.
# usage: tests/check_spills.sh [FOLDER]
set -eu
folder=${1:-${TROUPE_BUILD:-build}/kernels/cuda}

# kernel (a part of its mangled name), most bytes of stack frame, of spill stores and of spill loads; why
exceptions() {
    cat <<'TABLE'
TABLE
}

check() {
    exceptions >"$scratch/exceptions"
    awk '
        FNR == NR { if (NF > 0) { name[++count] = $1; stack[count] = $2; store[count] = $3; load[count] = $4 } ; next }
        /Compiling entry function/ { split($0, part, "\047"); kernel = part[2]; kernels++ }
        /Function properties for/ { kernel = $NF }
        /bytes stack frame/ {
            most_stack = most_store = most_load = 0
            for (i = 1; i <= count; i++)
                if (index(kernel, name[i])) { most_stack = stack[i]; most_store = store[i]; most_load = load[i] }
            if ($1 > most_stack || $5 > most_store || $9 > most_load) {
                printf "%s: %d bytes of stack, %d stored, %d loaded; allowed: %d, %d, %d\n", kernel, $1, $5, $9, most_stack, most_store, most_load
                bad++
            }
        }
        END { printf "%d kernels read, %d with unexpected spills\n", kernels, bad; exit bad > 0 || kernels == 0 }
    ' "$scratch/exceptions" "$@"
}

scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
set -- "$folder"/*.ptxas
[ -f "$1" ] || { echo "SKIP: no kernel was compiled here (no nvcc)"; exit 0; }

# The check can fail.
cat >"$scratch/spilling.ptxas" <<'SAMPLE'
ptxas info    : Compiling entry function '_Z3badPf' for 'sm_90a'
ptxas info    : Function properties for _Z3badPf
    0 bytes stack frame, 8 bytes spill stores, 12 bytes spill loads
SAMPLE
if check "$scratch/spilling.ptxas" >/dev/null; then
    echo "a kernel that spills was not noticed"
    exit 1
fi
check "$@"
