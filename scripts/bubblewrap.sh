#!/bin/sh
# Install bubblewrap if no working bwrap is available. First its package is unpacked into FOLDER/bubblewrap, which needs
# no root; if that fails and we are root, it is installed. Otherwise a message says that the sandbox tests are skipped.
#
#   sh scripts/bubblewrap.sh FOLDER
set -u
place=$(cd "$1" && pwd)/bubblewrap
PATH=$place/usr/bin:$PATH
export DEBIAN_FRONTEND=noninteractive
quick="-o Acquire::Retries=1 -o Acquire::http::Timeout=30 -o Acquire::https::Timeout=30"

runs() { bwrap --version >/dev/null 2>&1; }

unpack() {
    rm -rf "$place" && mkdir -p "$place" && cd "$place" &&
        apt-get $quick download bubblewrap && dpkg-deb -x bubblewrap_*.deb . && runs
}

root() { [ "$(id -u)" = 0 ]; }

runs && exit 0
[ "$(uname)" = Linux ] || exit 0
if command -v apt-get >/dev/null; then
    (unpack) >/dev/null 2>&1 && exit 0
    rm -rf "$place"
    if root; then
        apt-get $quick update >/dev/null 2>&1
        apt-get $quick install -y bubblewrap >/dev/null 2>&1
    fi
elif root; then
    for install in "dnf install -y" "pacman -S --noconfirm" "zypper --non-interactive install" "apk add"; do
        command -v "${install%% *}" >/dev/null && $install bubblewrap >/dev/null 2>&1
    done
fi
runs || echo "bubblewrap is missing and could not be installed: the sandbox tests are skipped (see docs/sandbox.md)."
exit 0
