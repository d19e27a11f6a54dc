#!/usr/bin/env bash
# A real GGUF model through the program, and llama.cpp's opinion of what comes out.
#
# usage: tests/interop/llama.sh PROGRAM [VENV [PART ...]]
#
# PROGRAM is panacea-patch, with examples/generate and examples/ask compiled beside it ($PANACEA_GENERATE and $PANACEA_ASK name others). VENV is made if it is
# not there, with requirements-llama.txt (150 MB, from the network); the model (98 MB) is kept in the target folder. PARTs are those of llama.py, which says
# what is checked; all of them if none is given. Takes some minutes on two cores, and writes nothing outside of VENV, the target folder and
# $TMPDIR, where it needs 1 GB.
set -euo pipefail

[ $# -ge 1 ] || { echo "usage: $0 PROGRAM [VENV [PART ...]]" >&2; exit 2; }
root=$(cd "$(dirname "$0")/../.." && pwd)
program=$(cd "$(dirname "$1")" && pwd)/$(basename "$1")
target=${CARGO_TARGET_DIR:-$root/target}
venv=${2:-$target/llama}
shift "$(($# < 2 ? $# : 2))"

if [ ! -x "$venv/bin/python" ]; then
    python3 -m venv "$venv"
    "$venv/bin/pip" install --quiet --disable-pip-version-check -r "$root/tests/interop/requirements-llama.txt"
fi
"$root/tests/interop/real_model.sh" "$target/real-model" "$venv/bin/python"
"$venv/bin/python" "$root/tests/interop/llama.py" --program "$program" \
    --generate "${PANACEA_GENERATE:-$(dirname "$program")/examples/generate}" \
    --ask "${PANACEA_ASK:-$(dirname "$program")/examples/ask}" --model "$target/real-model/smollm2.gguf" "$@"
