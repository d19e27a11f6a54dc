#!/bin/sh
# Writes testdata/keys: usage `testdata/gen/keys.sh`, from the repository root, with OpenSSL 3 and xxd.
#
# The P-256 and P-384 keys are those of RFC 6979, appendices A.2.5 and A.2.6, so their private halves are public knowledge.
# The others are of kinds that must be refused; they are new at each run, and no test depends on their values.
set -eu
cd testdata/keys

# SEC1 without the public key: SEQUENCE { 1, OCTET STRING scalar, [0] { OID curve } }; OpenSSL adds the rest.
sec1() { # name, length of the sequence, scalar, curve identifier
    printf '30%s020101%s%s' "$2" "$3" "$4" | xxd -r -p | openssl ec -inform DER -out "$1.sec1.pem" 2>/dev/null
    openssl pkcs8 -topk8 -nocrypt -in "$1.sec1.pem" -out "$1.pkcs8.pem"
    openssl ec -in "$1.sec1.pem" -pubout -out "$1.pub.pem" 2>/dev/null
}
sec1 p256 31 0420C9AFA9D845BA75166B5C215767B1D6934E50C3DB36E89B127B8A622B120F6721 A00A06082A8648CE3D030107
sec1 p384 3e 04306B9D3DAD2E1B8C1C05B19875B6659F4DE23C3B667BF297BA9AA47740787137D896D5724E4C70A825F872C9EA60D2EDF5 A00706052B81040022

{ openssl ecparam -name prime256v1; cat p256.sec1.pem; } >p256.with-parameters.pem
openssl ec -in p256.sec1.pem -pubout -conv_form compressed -out p256.compressed.pub.pem 2>/dev/null

openssl ec -in p256.sec1.pem -aes256 -passout pass:test -out encrypted.sec1.pem 2>/dev/null
openssl pkcs8 -topk8 -in p256.sec1.pem -passout pass:test -out encrypted.pkcs8.pem
openssl ecparam -name secp256k1 -genkey -noout | openssl pkcs8 -topk8 -nocrypt -out secp256k1.pem
openssl ecparam -name secp521r1 -genkey -noout -out p521.sec1.pem
openssl genpkey -algorithm ed25519 -out ed25519.pem
openssl pkey -in ed25519.pem -pubout -out ed25519.pub.pem
openssl genpkey -algorithm rsa -pkeyopt rsa_keygen_bits:1024 -out rsa.pem 2>/dev/null
openssl rsa -in rsa.pem -traditional -out rsa.pkcs1.pem 2>/dev/null
