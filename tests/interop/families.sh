#!/usr/bin/env bash
# A tiny checkpoint of every model family through the program, and transformers' opinion of what comes out.
#
# usage: tests/interop/families.sh PROGRAM [VENV [CASE ...]]
#
# PROGRAM is panacea-patch. VENV is made if it is not there, with requirements.txt: PyTorch and transformers, from the network. CASEs are
# names of testdata/gen/oracle.py, all of them if none is given. Compiles examples/logits.rs, in release; $PANACEA_LOGITS names one that is
# compiled already. What is checked, families_check.py says; it takes a few minutes on two cores and writes nothing outside of VENV, the
# target folder and $TMPDIR.
set -euo pipefail

[ $# -ge 1 ] || { echo "usage: $0 PROGRAM [VENV [CASE ...]]" >&2; exit 2; }
root=$(cd "$(dirname "$0")/../.." && pwd)
program=$(cd "$(dirname "$1")" && pwd)/$(basename "$1")
venv=${2:-${CARGO_TARGET_DIR:-$root/target}/families}
shift "$(($# < 2 ? $# : 2))"

if [ ! -x "$venv/bin/python" ]; then
    python3 -m venv "$venv"
    "$venv/bin/pip" install --quiet --disable-pip-version-check -r "$root/tests/interop/requirements.txt"
fi
logits=${PANACEA_LOGITS:-}
if [ -z "$logits" ]; then
    cargo build --release --locked --manifest-path "$root/Cargo.toml" --example logits
    logits=${CARGO_TARGET_DIR:-$root/target}/release/examples/logits
fi
"$venv/bin/python" "$root/tests/interop/families_check.py" --program "$program" --logits "$logits" "$@"
