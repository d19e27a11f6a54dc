#!/usr/bin/env bash
# A report's page in headless Chromium: accessibility, keyboard, narrow screens, print, and that it asks the network for nothing.
#
# usage: tests/interop/report.sh [PAGE.html ...]
#
# Without an argument, the page in testdata/report, which the unit tests hold to what the program writes. Needs node with npm, and the
# network for two packages of npm's, which go into the target folder. Chromium is $CHROMIUM, or what PATH has; where there is none, Debian's is
# installed if this runs as root. What is checked, report_check.mjs says. Leaves pictures of each page in the target folder, in report/shots.
# Takes half a minute; fails when anything is missing.
set -euo pipefail

packages="axe-core@4.14.1 playwright-core@1.65.1"

root=$(cd "$(dirname "$0")/../.." && pwd)
work=${CARGO_TARGET_DIR:-$root/target}/report
mkdir -p "$work/shots"
work=$(cd "$work" && pwd)
[ $# -gt 0 ] || set -- "$root/testdata/report/page.html"

for needed in node npm; do
    command -v "$needed" >/dev/null || { echo "$0: needs $needed" >&2; exit 1; }
done
chromium=${CHROMIUM:-$(command -v chromium || command -v chromium-browser || command -v google-chrome || true)}
if [ -z "$chromium" ]; then
    if [ "$(id -u)" != 0 ] || ! command -v apt-get >/dev/null; then
        echo "$0: needs chromium, and can install it only as root on Debian" >&2
        exit 1
    fi
    apt-get update -qq
    DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends chromium fonts-dejavu-core >/dev/null
    chromium=$(command -v chromium)
fi
if [ "$(cat "$work/installed" 2>/dev/null)" != "$packages" ]; then
    # shellcheck disable=SC2086 # a list
    npm install --prefix "$work" --silent --no-audit --no-fund --ignore-scripts $packages
    echo "$packages" >"$work/installed"
fi
node "$root/tests/interop/report_check.mjs" "$work" "$chromium" "$@"
