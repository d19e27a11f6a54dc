#!/bin/sh
# Writes the signatures of testdata/manifest-v1: usage `testdata/gen/signatures.sh MODEL_SIGNING`, from the repository root, after
# manifest.py, with the path of the program model_signing 1.1.1.
#
# Ours come out the same each time, as ECDSA with RFC 6979 is deterministic; model-signing's do not, and those committed stay.
set -eu
model_signing=$1
cd testdata/manifest-v1
sign() { cargo run --quiet --example signature -- sign "$@"; }
sign toy-model --key ../keys/p256.pkcs8.pem
sign toy.safetensors --key ../keys/p384.pkcs8.pem
mkdir -p model-signing-1.1.1
"$model_signing" sign key toy-model --private_key ../keys/p384.sec1.pem \
    --ignore-paths toy-model/model.sig --signature model-signing-1.1.1/toy-model.sig
"$model_signing" sign key toy.safetensors --private_key ../keys/p256.sec1.pem \
    --signature model-signing-1.1.1/toy.safetensors.sig
