#!/bin/sh
# Our signatures against PyPI's model-signing, both ways.
#
# usage: tests/interop/model_signing.sh PROGRAM [VENV]
#
# PROGRAM is panacea-patch: `keygen NAME`, `sign TARGET --key PEM` and `verify TARGET --key PEM` are what is run of it. VENV is made
# if it is not there, with requirements-signing.txt (95 MB, from the network).
#
# model_signing exits 1 for a rejected signature and for a broken installation alike. So a refusal counts only with its own
# words, and each is preceded by the same command accepting the untouched files.
set -eu

[ $# -ge 1 ] || { echo "usage: $0 PROGRAM [VENV]" >&2; exit 2; }
here=$(cd "$(dirname "$0")" && pwd)
program=$(cd "$(dirname "$1")" && pwd)/$(basename "$1")
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
venv=${2:-$work/venv}
if [ ! -x "$venv/bin/model_signing" ]; then
    python3 -m venv "$venv"
    "$venv/bin/pip" install --quiet --disable-pip-version-check -r "$here/requirements-signing.txt"
fi
venv=$(cd "$venv" && pwd)
cd "$work"
checks=0

fail() {
    echo "FAILED: $*" >&2
    [ ! -s output ] || cat output >&2
    exit 1
}
accepts() { # what, command...
    what=$1
    shift
    "$@" >output 2>&1 || fail "$what"
    checks=$((checks + 1))
}
refuses() { # what, words of the refusal, command...
    what=$1
    words=$2
    shift 2
    code=0
    "$@" >output 2>&1 || code=$?
    [ "$code" -eq 1 ] || fail "$what: exit code $code, not 1"
    grep -q "$words" output || fail "$what: it does not say '$words'"
    checks=$((checks + 1))
}
theirs() { "$venv/bin/model_signing" "$@"; }
they_verify() { theirs verify key "$1" --signature "$2" --public_key "$3"; }
they_say="Verification failed with error:"

fresh() {
    rm -rf model one.safetensors one.safetensors.sig
    mkdir -p model/sub model/.git
    printf 'weights\n' >model/model.safetensors
    printf '{}\n' >model/sub/config.json
    # Sorts before sub/config.json as a string and after it as a path.
    printf 'x\n' >model/sub.txt
    printf 'ref\n' >model/.git/HEAD
    printf 'weights\n' >one.safetensors
}

# Keys: ours on the default curve, OpenSSL's on both, in both encodings.
"$program" keygen ours >/dev/null
openssl ecparam -name prime256v1 -genkey -noout -out sec1.pem
openssl ecparam -name secp384r1 -genkey -noout | openssl pkcs8 -topk8 -nocrypt -out p384.pem
for key in sec1 p384; do openssl pkey -in "$key.pem" -pubout -out "$key.pub.pem"; done

for key in ours sec1 p384; do
    other=ours
    [ "$key" != ours ] || other=sec1

    fresh
    accepts "we sign a directory ($key)" "$program" sign model --key "$key.pem"
    accepts "they verify our directory ($key)" they_verify model model/model.sig "$key.pub.pem"
    refuses "they refuse another key ($key)" "$they_say" they_verify model model/model.sig "$other.pub.pem"
    printf 'x' >>model/sub.txt
    refuses "they refuse our changed directory ($key)" "$they_say" they_verify model model/model.sig "$key.pub.pem"

    fresh
    accepts "we sign a file ($key)" "$program" sign one.safetensors --key "$key.pem"
    accepts "they verify our file ($key)" they_verify one.safetensors one.safetensors.sig "$key.pub.pem"
    printf 'x' >>one.safetensors
    refuses "they refuse our changed file ($key)" "$they_say" they_verify one.safetensors one.safetensors.sig "$key.pub.pem"

    fresh
    accepts "they sign a directory ($key)" theirs sign key model --private_key "$key.pem" --signature model/model.sig
    accepts "we verify their directory ($key)" "$program" verify model --key "$key.pub.pem"
    refuses "we refuse another key ($key)" "error:" "$program" verify model --key "$other.pub.pem"
    printf 'x' >model/new.py
    refuses "we refuse their directory with one more file ($key)" 'new.py' "$program" verify model --key "$key.pub.pem"

    fresh
    accepts "they sign a file ($key)" theirs sign key one.safetensors --private_key "$key.pem" --signature one.safetensors.sig
    accepts "we verify their file ($key)" "$program" verify one.safetensors --key "$key.pub.pem"
    printf 'x' >>one.safetensors
    refuses "we refuse their changed file ($key)" 'one.safetensors' "$program" verify one.safetensors --key "$key.pub.pem"
done

# With a manifest: our frozen fixtures, whose file signature carries a field that theirs does not know.
fixtures=$here/../../testdata
accepts "they verify the frozen directory" they_verify "$fixtures/manifest-v1/toy-model" \
    "$fixtures/manifest-v1/toy-model/model.sig" "$fixtures/keys/p256.pub.pem"
accepts "they verify the frozen file" they_verify "$fixtures/manifest-v1/toy.safetensors" \
    "$fixtures/manifest-v1/toy.safetensors.sig" "$fixtures/keys/p384.pub.pem"

# What they would leave out without a word, we refuse.
fresh
accepts "they sign a directory but for one file" theirs sign key model --private_key sec1.pem \
    --ignore-paths model/sub.txt --signature model/model.sig
accepts "they verify it" they_verify model model/model.sig sec1.pub.pem
refuses "we refuse a signature that leaves a file out" 'sub.txt' "$program" verify model --key sec1.pub.pem

echo "model-signing agrees: $checks checks"
