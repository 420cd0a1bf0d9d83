#!/bin/sh
# Installs the Debian packages that troupe needs and that are missing. The table of reasons is in README.md.
set -eu
packages="gcc g++ make pkg-config libc6-dev libzmq3-dev libprotobuf-c-dev protobuf-c-compiler libmicrohttpd-dev libjansson-dev
libyaml-dev libpcre2-dev libhwloc-dev libncurses-dev libsqlite3-dev libcmocka-dev curl $*" # and what is asked for: make test-web
missing=""
for package in $packages; do
    dpkg-query -W -f='${Status}' "$package" 2>/dev/null | grep -q 'install ok installed' || missing="$missing $package"
done
[ -z "$missing" ] && exit 0
echo "installing:$missing"
sudo=""
if [ "$(id -u)" -ne 0 ]; then
    command -v sudo >/dev/null || { echo "not root and no sudo: install$missing by hand" >&2; exit 1; }
    sudo="sudo"
fi
export DEBIAN_FRONTEND=noninteractive
# shellcheck disable=SC2086
$sudo apt-get install -y --no-install-recommends $missing >/dev/null 2>&1 || {
    $sudo apt-get update
    $sudo apt-get install -y --no-install-recommends $missing
}
