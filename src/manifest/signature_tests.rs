use super::*;

fn name(text: &str) -> FileName {
    text.parse().unwrap()
}

fn file(text: &str) -> FileDigest {
    FileDigest {
        name: name(text),
        digest: Sha256::of(text.as_bytes()),
    }
}

fn directory() -> Claim {
    Claim {
        name: "model".to_owned(),
        contents: Contents::Directory {
            files: vec![file("a"), file("sub/b"), file("sub.txt")],
            ignored: usual(),
        },
    }
}

fn usual() -> Vec<FileName> {
    ignored_by_default(Some(name(SIGNATURE_NAME)))
}

/// The refusal of `claim`'s text with the first `was` in it replaced by `is`.
fn refusal(claim: &Claim, was: &str, is: &str) -> ClaimError {
    let text = claim.to_json();
    let changed = text.replacen(was, is, 1);
    assert_ne!(changed, text, "{was}");
    Claim::parse(changed.as_bytes(), &usual()).unwrap_err()
}

#[test]
fn reads_back_what_it_writes() {
    for contents in [
        directory().contents,
        Contents::File {
            digest: Sha256::of(b"weights"),
            manifest: None,
        },
        Contents::File {
            digest: Sha256::of(b"weights"),
            manifest: Some(Sha256::of(b"manifest")),
        },
    ] {
        let claim = Claim {
            contents,
            ..directory()
        };
        let read = Claim::parse(claim.to_json().as_bytes(), &usual()).unwrap();
        assert_eq!(read, claim);
    }
}

#[test]
fn the_root_is_the_digest_of_the_raw_digests_in_order() {
    // From Python's hashlib: sha256(sha256(b"a").digest() + sha256(b"sub/b").digest() + sha256(b"sub.txt").digest()).
    let root = "801cc8d86925679134cf3a91f4bb3d437d133e0d3d4b13b43c300f85d236de4b";
    assert!(directory().to_json().contains(&format!(
        r#""subject":[{{"name":"model","digest":{{"sha256":"{root}"}}}}]"#
    )));
}

#[test]
fn signs_the_same_text_whatever_the_order_files_come_in() {
    let key = PrivateKey::from_pem(include_str!("../../testdata/keys/p256.pkcs8.pem")).unwrap();
    let sign = |files| Signature::of_directory("model", files, usual(), &key).map(|s| s.to_json());
    let forward = sign(vec![file("a"), file("sub/b"), file("sub.txt")]).unwrap();
    let backward = sign(vec![file("sub.txt"), file("sub/b"), file("a")]).unwrap();
    assert_eq!(forward, backward);
    assert!(matches!(sign(Vec::new()), Err(SignError::NoFiles { .. })));
    assert!(matches!(
        sign(vec![file("a"), file("a")]),
        Err(SignError::DuplicateName { .. })
    ));
}

#[test]
fn refuses_names_that_leave_the_directory() {
    for bad in ["../a", "/a", "a/../../b", "a\\\\b", "", "..", "./a", "a//b"] {
        let error = refusal(&directory(), r#""name":"a""#, &format!(r#""name":"{bad}""#));
        assert!(matches!(error, ClaimError::Name { .. }), "{bad:?}: {error}");
    }
    // The name of a single file is none among several.
    let error = refusal(&directory(), r#""name":"a""#, r#""name":".""#);
    assert!(matches!(error, ClaimError::Name { .. }), "{error}");
    let error = refusal(&directory(), r#""name":"a""#, r#""name":"sub/b""#);
    assert!(matches!(error, ClaimError::DuplicateName { .. }), "{error}");
}

#[test]
fn refuses_to_leave_out_more_than_is_usual() {
    for wide in [
        "sub",
        "model.safetensors",
        ".",
        "..",
        "",
        "*",
        "/",
        ".git/",
        "./model.sig",
    ] {
        let error = refusal(&directory(), r#"".github""#, &format!(r#""{wide}""#));
        assert!(
            matches!(&error, ClaimError::Ignored { name } if name == wide),
            "{wide:?}: {error}"
        );
    }
    let own = "other.sig";
    let text = directory().to_json().replace("model.sig", own);
    assert!(Claim::parse(text.as_bytes(), &usual()).is_err());
    let mut may_ignore = usual();
    may_ignore.push(name(own));
    assert!(Claim::parse(text.as_bytes(), &may_ignore).is_ok());
}

#[test]
fn refuses_other_statements_by_what_they_are() {
    use ClaimError as E;
    let claim = directory();
    let refusal = |was, is| refusal(&claim, was, is);
    assert!(matches!(
        refusal("Statement/v1", "Statement/v0.1"),
        E::Type { field: "_type", .. }
    ));
    // The predicate of model-signing before 1.0, whose files no root binds.
    assert!(matches!(
        refusal("model_signing/signature/v1.0", "model_signing/Digests/v0.1"),
        E::Type {
            field: "predicateType",
            ..
        }
    ));
    assert!(matches!(
        refusal(r#""subject":["#, r#""subject":[],"x":["#),
        E::Subjects { found: 0 }
    ));
    let second = format!(
        r#""subject":[{{"name":"x","digest":{{"sha256":"{}"}}}},"#,
        Sha256::of(b"")
    );
    assert!(matches!(
        refusal(r#""subject":["#, &second),
        E::Subjects { found: 2 }
    ));
    assert!(matches!(
        refusal(r#""method":"files""#, r#""method":"shards""#),
        E::Method {
            field: "method",
            ..
        }
    ));
    assert!(matches!(
        refusal(r#""hash_type":"sha256""#, r#""hash_type":"blake3""#),
        E::Method {
            field: "hash_type",
            ..
        }
    ));
    assert!(matches!(
        refusal(r#""algorithm":"sha256""#, r#""algorithm":"md5""#),
        E::Method {
            field: "algorithm",
            ..
        }
    ));
    assert!(matches!(
        refusal(r#""allow_symlinks":false"#, r#""allow_symlinks":true"#),
        E::Symlinks
    ));
    let [a, b] = [b"a", b"b"].map(|bytes| Sha256::of(bytes).to_string());
    assert!(matches!(refusal(&a, &b), E::Root { .. }));
    assert!(matches!(refusal(&a, &a[1..]), E::Json { .. }));
    assert!(matches!(
        refusal(r#""name":"a""#, r#""name":"z","name":"a""#),
        E::Json { .. }
    ));
}

#[test]
fn refuses_a_statement_of_no_file() {
    let text = Claim {
        contents: Contents::Directory {
            files: Vec::new(),
            ignored: usual(),
        },
        ..directory()
    }
    .to_json();
    assert!(matches!(
        Claim::parse(text.as_bytes(), &usual()),
        Err(ClaimError::NoResource)
    ));
}

#[test]
fn a_signature_knows_its_own_name_before_it_is_written() {
    let directory = tempfile::tempdir().unwrap();
    let root = directory.path().join("model");
    fs::create_dir_all(root.join("sub")).unwrap();
    let inside = |path: PathBuf| name_inside(&root, &path).map(|name| name.to_string());
    assert_eq!(inside(root.join("model.sig")).as_deref(), Some("model.sig"));
    assert_eq!(
        inside(root.join("sub/../sub/x.sig")).as_deref(),
        Some("sub/x.sig")
    );
    assert_eq!(inside(directory.path().join("model.sig")), None);
    assert_eq!(inside(root.join("../model.sig")), None);
}
