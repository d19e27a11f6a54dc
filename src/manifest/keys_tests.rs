use super::*;

macro_rules! key {
    ($name:literal) => {
        include_str!(concat!("../../testdata/keys/", $name))
    };
}

/// r and s of RFC 6979 A.2.5, SHA-256, message "sample".
const P256_SAMPLE: (&str, &str) = (
    "efd48b2aacb6a8fd1140dd9cd45e81d69d2c877b56aaf991c34d0ea84eaf3716",
    "f7cb1c942d657c41d436c7a1b6e29f65f3e900dbb9aff4064dc4ab2f843acda8",
);

/// r and s of RFC 6979 A.2.6, SHA-384, message "sample".
const P384_SAMPLE: (&str, &str) = (
    "94edbb92a5ecb8aad4736e56c691916b3f88140666ce9fa73d64c4ea95ad133c81a648152e44acf96e36dd1e80fabe46",
    "99ef4aeb15f178cea1fe40db2603138f130e740a19624526203b6351d0a3a94fa329c145786e679e7b82c71a38628ac8",
);

/// SEQUENCE { INTEGER r, INTEGER s } of two integers whose top bit is set, so that each has a zero byte before it.
fn der((r, s): (&str, &str)) -> Vec<u8> {
    let integer = |text: &str| {
        let digits = hex::decode(text).unwrap();
        assert!(digits[0] >= 0x80 && digits.len() < 0x7f);
        let mut bytes = vec![2, u8::try_from(digits.len() + 1).unwrap(), 0];
        bytes.extend(digits);
        bytes
    };
    let body = [integer(r), integer(s)].concat();
    let mut bytes = vec![0x30, u8::try_from(body.len()).unwrap()];
    bytes.extend(body);
    bytes
}

#[test]
fn signs_what_rfc_6979_prints() {
    for (pem, expected) in [
        (key!("p256.pkcs8.pem"), der(P256_SAMPLE)),
        (key!("p256.sec1.pem"), der(P256_SAMPLE)),
        (key!("p256.with-parameters.pem"), der(P256_SAMPLE)),
        (key!("p384.pkcs8.pem"), der(P384_SAMPLE)),
        (key!("p384.sec1.pem"), der(P384_SAMPLE)),
    ] {
        let key = PrivateKey::from_pem(pem).unwrap();
        assert_eq!(hex::encode(key.sign(b"sample")), hex::encode(&expected));
        assert!(key.public_key().verifies(b"sample", &expected));
        assert!(!key.public_key().verifies(b"samplf", &expected));
    }
}

#[test]
fn no_flipped_bit_of_a_signature_verifies() {
    let key = PublicKey::from_pem(key!("p256.pub.pem")).unwrap();
    let signature = der(P256_SAMPLE);
    assert!(key.verifies(b"sample", &signature));
    for bit in 0..signature.len() * 8 {
        let mut flipped = signature.clone();
        flipped[bit / 8] ^= 1 << (bit % 8);
        assert!(!key.verifies(b"sample", &flipped), "bit {bit}");
    }
}

#[test]
fn a_key_of_the_other_curve_verifies_nothing() {
    let key = PublicKey::from_pem(key!("p384.pub.pem")).unwrap();
    assert!(!key.verifies(b"sample", &der(P256_SAMPLE)));
}

#[test]
fn equal_keys_have_one_hint_however_they_were_written() {
    let plain = PublicKey::from_pem(key!("p256.pub.pem")).unwrap();
    let compressed = PublicKey::from_pem(key!("p256.compressed.pub.pem")).unwrap();
    let private = PrivateKey::from_pem(key!("p256.sec1.pem")).unwrap();
    let with_crlf = key!("p256.pub.pem").replace('\n', "\r\n");
    let with_crlf = PublicKey::from_pem(&format!("release key\r\n{with_crlf}")).unwrap();
    // OpenSSL wrote this file: it is the independent spelling of what the hint is the digest of.
    assert_eq!(plain.to_pem(), key!("p256.pub.pem"));
    assert_eq!(plain.hint(), Sha256::of(key!("p256.pub.pem").as_bytes()));
    for other in [compressed, private.public_key(), with_crlf] {
        assert_eq!(other.hint(), plain.hint());
        assert_eq!(other, plain);
    }
}

#[test]
fn refuses_other_keys_by_name() {
    for (pem, named) in [
        (key!("encrypted.pkcs8.pem"), "an encrypted private key"),
        (key!("encrypted.sec1.pem"), "an encrypted private key"),
        (key!("secp256k1.pem"), "secp256k1"),
        (key!("p521.sec1.pem"), "P-521"),
        (key!("ed25519.pem"), "Ed25519"),
        (key!("rsa.pem"), "an RSA key"),
        (key!("rsa.pkcs1.pem"), "an RSA key"),
        (key!("p256.pub.pem"), "a public key, where the private one"),
        ("", "no PEM block"),
        (
            "-----BEGIN CERTIFICATE-----\n-----END CERTIFICATE-----\n",
            "a certificate",
        ),
    ] {
        let error = PrivateKey::from_pem(pem).unwrap_err();
        assert!(matches!(error, KeyError::Refused { .. }), "{error}");
        assert!(error.to_string().contains(named), "{error}");
    }
    for (pem, named) in [
        (key!("ed25519.pub.pem"), "Ed25519"),
        (
            key!("p256.pkcs8.pem"),
            "a private key, where the public one",
        ),
        (
            key!("encrypted.pkcs8.pem"),
            "a private key, where the public one",
        ),
    ] {
        let error = PublicKey::from_pem(pem).unwrap_err();
        assert!(error.to_string().contains(named), "{error}");
    }
}

#[test]
fn damaged_keys_are_malformed() {
    let pem = key!("p256.pkcs8.pem");
    let cut = pem.replace("-----END PRIVATE KEY-----", "");
    // Another scalar, which the public key beside it does not belong to.
    let garbled = pem.replacen("ya+p2", "ya+p3", 1);
    assert_ne!(garbled, pem);
    for text in [cut, garbled] {
        let error = PrivateKey::from_pem(&text).unwrap_err();
        assert!(matches!(error, KeyError::Malformed { .. }), "{error}");
    }
    // The scalar is zero: no key at all.
    let sec1 = "-----BEGIN EC PRIVATE KEY-----\n\
        MDECAQEEIAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAoAoGCCqG\n\
        SM49AwEH\n-----END EC PRIVATE KEY-----\n";
    let error = PrivateKey::from_pem(sec1).unwrap_err();
    assert!(matches!(error, KeyError::Malformed { .. }), "{error}");
}

#[test]
fn a_written_pair_reads_back_and_is_never_overwritten() {
    for curve in [Curve::P256, Curve::P384] {
        let directory = tempfile::tempdir().unwrap();
        let paths = KeyPairPaths::named(&directory.path().join("release"));
        let key = PrivateKey::generate(curve).unwrap();
        key.write_pair(&paths).unwrap();
        let private = fs::read(&paths.private).unwrap();

        let read = PrivateKey::read(&paths.private).unwrap();
        let public = PublicKey::read(&paths.public).unwrap();
        assert_eq!(read.curve(), curve);
        assert_eq!(read.public_key(), public);
        assert!(public.verifies(b"m", &key.sign(b"m")));

        let again = PrivateKey::generate(curve).unwrap().write_pair(&paths);
        assert!(matches!(again, Err(KeyError::Exists { path }) if path == paths.private));
        assert_eq!(fs::read(&paths.private).unwrap(), private);

        // With only the public file in the way, no lone private key is left behind.
        fs::remove_file(&paths.private).unwrap();
        let again = PrivateKey::generate(curve).unwrap().write_pair(&paths);
        assert!(matches!(again, Err(KeyError::Exists { path }) if path == paths.public));
        assert!(!paths.private.exists());
    }
}

#[cfg(unix)]
#[test]
fn only_the_owner_can_read_a_private_key() {
    use std::os::unix::fs::PermissionsExt;
    let directory = tempfile::tempdir().unwrap();
    let paths = KeyPairPaths::named(&directory.path().join("release.pem"));
    PrivateKey::generate(Curve::P256)
        .unwrap()
        .write_pair(&paths)
        .unwrap();
    let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o777;
    assert_eq!(mode(&paths.private), 0o600);
    assert_eq!(mode(&paths.public) & !0o644, 0);
    assert!(paths.private.ends_with("release.pem"));
    assert!(paths.public.ends_with("release.pub.pem"));
}

#[test]
fn debug_does_not_show_the_secret() {
    let key = PrivateKey::from_pem(key!("p256.pkcs8.pem")).unwrap();
    assert_eq!(format!("{key:?}"), "PrivateKey(P-256, ..)");
}

#[test]
fn a_file_that_is_no_key_is_refused_before_it_fills_memory() {
    let file = tempfile::NamedTempFile::new().unwrap();
    fs::write(file.path(), vec![b'a'; LONGEST_FILE + 1]).unwrap();
    let error = PrivateKey::read(file.path()).unwrap_err();
    assert!(error.to_string().contains("too long"), "{error}");
    fs::write(file.path(), [0xff]).unwrap();
    let error = PrivateKey::read(file.path()).unwrap_err();
    assert!(error.to_string().contains("not text"), "{error}");
}
