#!/usr/bin/env bash
# Several processes that share a search, over Open MPI.
#
# usage: tests/interop/ranks.sh PROGRAM
#
# PROGRAM is panacea-patch without the feature `mpi`; one with it is built here. Needs cargo, python3, an MPI library with its headers and mpirun, and
# libclang, as have_mpi.sh finds or installs them. What is checked, ranks_check.py says. Takes a minute after
# the build, and writes nothing outside of the target folder and $TMPDIR.
set -euo pipefail

[ $# -eq 1 ] || { echo "usage: $0 PROGRAM" >&2; exit 2; }
root=$(cd "$(dirname "$0")/../.." && pwd)
alone=$(cd "$(dirname "$1")" && pwd)/$(basename "$1")
target=${CARGO_TARGET_DIR:-$root/target}

"$root/tests/interop/have_mpi.sh"
# In a folder of its own: $target/debug has the program that other tests look at.
cargo build --quiet --locked --features mpi --manifest-path "$root/Cargo.toml" --target-dir "$target/mpi"
python3 "$root/tests/interop/ranks_check.py" --program "$target/mpi/debug/panacea-patch" --alone "$alone"
