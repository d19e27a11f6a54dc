#!/usr/bin/env bash
# Makes sure that the feature `mpi` can be built and run: usage `tests/interop/have_mpi.sh`.
#
# Looks for an MPI library with its headers and mpirun, and for libclang; where they are missing, Debian's are installed if this runs as root.
set -euo pipefail

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
