#!/usr/bin/env bash
# GGUF files of this program against those of llama.cpp's own: the same keys and values, and the same bytes of every tensor.
#
# usage: tests/interop/convert.sh PROGRAM LLAMA_CPP [PYTHON [QUANTIZE [MODEL ...]]]
#
# PROGRAM is panacea-patch. LLAMA_CPP is llama.cpp's source tree, such as `vendor/llama.cpp` in the source distribution of
# llama-cpp-python 0.3.36. PYTHON has torch, transformers (as in requirements.txt), sentencepiece and PyYAML. QUANTIZE is its program
# llama-quantize; without it, or given `-`, the types that it writes are left out. Each MODEL is a Hugging Face directory to be converted
# too, whole, with its tokenizer. Prints a line for each comparison; exit code 1 when one differs.
set -euo pipefail

[ $# -ge 2 ] || { echo "usage: $0 PROGRAM LLAMA_CPP [PYTHON [QUANTIZE [MODEL ...]]]" >&2; exit 2; }
here=$(cd "$(dirname "$0")" && pwd)
program=$1 llama=$2 python=${3:-python3} quantize=${4:--}
shift "$(($# < 4 ? $# : 4))"
exec "$python" "$here/convert_check.py" --program "$program" --llama-cpp "$llama" --quantize "$quantize" "$@"
