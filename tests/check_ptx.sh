#!/bin/sh
# Kernels that need no instruction of sm_90a alone carry PTX for newer cards beside their code for Hopper; those that do carry none.
# Reads the fat binaries in the objects that nvcc made: entries of kind 1 are PTX, of kind 2 code.
# usage: tests/check_ptx.sh [FOLDER]
set -eu
folder=${1:-${TROUPE_BUILD:-build}/kernels/cuda}
command -v python3 >/dev/null && command -v objcopy >/dev/null && ls "$folder"/gemm.o >/dev/null 2>&1 ||
    { echo "SKIP: no python3 or objcopy, or no kernels compiled by nvcc"; exit 0; }
python3 - "$folder" <<'PYTHON'
import glob, os, struct, subprocess, sys, tempfile

def entries(path):
    """(kind, architecture) of each entry of the object's fat binaries."""
    with tempfile.NamedTemporaryFile() as out:
        subprocess.run(["objcopy", "-O", "binary", "--only-section=.nv_fatbin", path, out.name], check=True)
        data = open(out.name, "rb").read()
    found, at = [], 0
    while at + 16 <= len(data):
        magic, version, head, size = struct.unpack_from("<IHHQ", data, at)
        if magic != 0xBA55ED50:
            at += 8
            continue
        entry, end = at + head, at + head + size
        while entry < end:
            kind, _, entry_head, entry_size = struct.unpack_from("<HHIQ", data, entry)
            found.append((kind, struct.unpack_from("<I", data, entry + 28)[0]))
            entry += entry_head + entry_size
        at = end
    return found

failed = count = 0
for path in sorted(glob.glob(sys.argv[1] + "/*.o")):
    source = "kernels/cuda/" + os.path.basename(path)[:-2] + ".cu"
    if not os.path.exists(source) or "__global__" not in open(source).read():
        continue
    hopper_only = any('"kernels/cuda/%s.cuh"' % name in open(source).read() for name in ("ptx", "mla", "tensor_map"))
    found = entries(path)
    ptx, code = (sum(kind == wanted for kind, _ in found) for wanted in (1, 2))
    if (ptx > 0) == hopper_only or code == 0 or any(arch != 90 for _, arch in found):
        print("%s: expected code for 90 and %s PTX, found (kind, architecture) %s" % (source, "no" if hopper_only else "some", found))
        failed = 1
    count += 1
print("%d objects of kernels read" % count)
sys.exit(failed)
PYTHON
