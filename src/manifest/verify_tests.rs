use super::*;

fn files(list: &[(&str, &str)]) -> Vec<FileDigest> {
    list.iter()
        .map(|&(name, content)| FileDigest {
            name: fixed(name),
            digest: Sha256::of(content.as_bytes()),
        })
        .collect()
}

#[test]
fn every_difference_is_listed_by_name() {
    let expected = files(&[
        ("b", "1"),
        ("a", "1"),
        ("same", "1"),
        ("y", "1"),
        ("x", "1"),
    ]);
    let found = files(&[
        ("a", "2"),
        ("b", "2"),
        ("same", "1"),
        ("new/z", ""),
        ("new", ""),
    ]);
    let differences = Differences::between(&expected, &found);
    assert_eq!(
        differences.to_string(),
        "changed: `a`, `b`; missing: `x`, `y`; extra: `new`, `new/z`"
    );
    assert_eq!(differences.changed[0].expected, Sha256::of(b"1"));
    assert_eq!(differences.changed[0].found, Sha256::of(b"2"));
    assert!(differences.or_refuse(Against::Signature).is_err());
}

#[test]
fn equal_lists_in_any_order_do_not_differ() {
    let differences = Differences::between(
        &files(&[("b", "1"), ("a", "2")]),
        &files(&[("a", "2"), ("b", "1")]),
    );
    assert_eq!(differences, Differences::default());
    assert!(differences.or_refuse(Against::Manifest).is_ok());
}

/// A directory whose signature says what `change` makes of its text, signed by a key that is trusted.
fn forged(change: impl Fn(&str) -> String) -> (tempfile::TempDir, PublicKey) {
    let key =
        super::super::PrivateKey::from_pem(include_str!("../../testdata/keys/p256.pkcs8.pem"))
            .unwrap();
    let directory = tempfile::tempdir().unwrap();
    let root = directory.path();
    fs::write(root.join("a"), "a").unwrap();
    fs::create_dir(root.join("sub")).unwrap();
    fs::write(root.join("sub/b"), "b").unwrap();
    let path = signature_path(root);
    let honest = super::super::Signature::of(root, &path, &key).unwrap();
    let bundle = Bundle::parse(honest.to_json().as_bytes()).unwrap();
    let text = std::str::from_utf8(bundle.open(&key.public_key()).unwrap()).unwrap();
    let forged = Bundle::seal(change(text).into_bytes(), &key);
    fs::write(path, forged.to_json()).unwrap();
    (directory, key.public_key())
}

#[test]
fn a_trusted_key_does_not_make_a_refused_statement_good() {
    let (directory, key) = forged(str::to_owned);
    assert!(verify(directory.path(), None, &key).is_ok());
    for (was, is) in [
        (r#""ignore_paths":["#, r#""ignore_paths":["sub","#),
        (r#""name":"sub/b""#, r#""name":"sub/../sub/b""#),
        (r#""name":"sub/b""#, r#""name":"a""#),
        ("in-toto.io", "example.com"),
        ("{", r#"{"_type":"","#),
    ] {
        let (directory, key) = forged(|text| text.replacen(was, is, 1));
        match verify(directory.path(), None, &key) {
            Err(VerifyError::MalformedClaim { .. }) => {}
            other => panic!("{is}: {other:?}"),
        }
    }
}

#[test]
fn a_signed_name_that_is_not_there_is_missing_and_the_file_that_is_extra() {
    let (directory, key) =
        forged(|text| text.replacen(r#""name":"sub/b""#, r#""name":"sub/c""#, 1));
    match verify(directory.path(), None, &key) {
        Err(VerifyError::FilesDiffer { differences, .. }) => {
            assert_eq!(differences.to_string(), "missing: `sub/c`; extra: `sub/b`");
        }
        other => panic!("{other:?}"),
    }
}

#[test]
fn reads_up_to_the_longest_file_and_no_further() {
    let file = tempfile::NamedTempFile::new().unwrap();
    for (length, is_read) in [(LONGEST_FILE, true), (LONGEST_FILE + 1, false)] {
        file.as_file().set_len(length).unwrap();
        match read_bounded(file.path()) {
            Ok(Some(bytes)) => assert!(is_read && bytes.len() as u64 == length),
            Err(VerifyError::TooLong { .. }) => assert!(!is_read),
            other => panic!("{other:?}"),
        }
    }
    let nowhere = file.path().with_extension("none");
    assert!(matches!(read_bounded(&nowhere), Ok(None)));
}
