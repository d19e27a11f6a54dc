#!/usr/bin/env bash
# LoRA adapters in and out, and PEFT's opinion of them.
#
# usage: tests/interop/adapters.sh PROGRAM [VENV]
#
# PROGRAM is panacea-patch. VENV is made if it is not there, with requirements.txt: PyTorch, transformers and PEFT, from the network. The adapter
# of testdata/peft/tiny-chat is patched and merged, which adapter_check.py judges, and a low-rank perturbation of testdata/tiny-chat is written
# as an adapter, which peft_check.py judges. Takes a minute, and writes nothing outside of VENV and $TMPDIR.
set -euo pipefail

[ $# -ge 1 ] || { echo "usage: $0 PROGRAM [VENV]" >&2; exit 2; }
root=$(cd "$(dirname "$0")/../.." && pwd)
program=$(cd "$(dirname "$1")" && pwd)/$(basename "$1")
venv=${2:-${CARGO_TARGET_DIR:-$root/target}/families}
base=$root/testdata/tiny-chat
adapter=$root/testdata/peft/tiny-chat

if [ ! -x "$venv/bin/python" ]; then
    python3 -m venv "$venv"
    "$venv/bin/pip" install --quiet --disable-pip-version-check -r "$root/tests/interop/requirements.txt"
fi
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

"$program" optimize "$adapter" --base "$base" --method panacea --harmful "$root/testdata/tiny-chat-data/harmful.jsonl" \
    -o "$work/p.safetensors" --quiet >/dev/null
"$program" apply "$adapter" --perturbation "$work/p.safetensors" -o "$work/patched" --quiet >/dev/null
"$program" apply "$adapter" --base "$base" --perturbation "$work/p.safetensors" --merge --rounding nearest -o "$work/merged" \
    --quiet >/dev/null
"$venv/bin/python" "$root/tests/interop/adapter_check.py" "$adapter" --base "$base" \
    --patched "$work/patched" --merged "$work/merged" --perturbation "$work/p.safetensors"
"$venv/bin/python" "$root/tests/interop/peft_check.py" "$program" "$base"
