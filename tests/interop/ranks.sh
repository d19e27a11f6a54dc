#!/usr/bin/env bash
# Several processes that share a search, over Open MPI.
#
# usage: tests/interop/ranks.sh PROGRAM
#
# PROGRAM is panacea-patch without the feature `mpi`; one with it is built here. Needs cargo, python3, an MPI library with its headers and mpirun, and
# libclang; where they are missing, Debian's are installed if this runs as root. What is checked, ranks_check.py says. Takes a minute after
# the build, and writes nothing outside of the target folder and $TMPDIR.
set -euo pipefail

[ $# -eq 1 ] || { echo "usage: $0 PROGRAM" >&2; exit 2; }
root=$(cd "$(dirname "$0")/../.." && pwd)
alone=$(cd "$(dirname "$1")" && pwd)/$(basename "$1")
target=${CARGO_TARGET_DIR:-$root/target}

# What bindgen looks for, beside mpirun and mpicc.
has_clang() { [ -n "${LIBCLANG_PATH:-}" ] || compgen -G '/usr/lib/llvm-*/lib/libclang*.so*' >/dev/null || compgen -G '/usr/lib/*/libclang*.so*' >/dev/null; }
if ! command -v mpirun >/dev/null || ! command -v mpicc >/dev/null || ! has_clang; then
    if [ "$(id -u)" != 0 ] || ! command -v apt-get >/dev/null; then
        echo "$0: needs Open MPI and libclang, and can install them only as root on Debian" >&2
        exit 1
    fi
    apt-get update -qq
    DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends libopenmpi-dev openmpi-bin libclang-dev >/dev/null
fi
# In a folder of its own: $target/debug has the program that other tests look at.
cargo build --quiet --locked --features mpi --manifest-path "$root/Cargo.toml" --target-dir "$target/mpi"
python3 "$root/tests/interop/ranks_check.py" --program "$target/mpi/debug/panacea-patch" --alone "$alone"
