//! Signed checkpoints: what was signed once verifies for ever, and nothing else does.
//!
//! The fixtures in `testdata/manifest-v1` are frozen. A reader that refuses them has broken its users' signatures; a writer that
//! no longer makes the same bytes from the same files has changed the format.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

use std::fs;
use std::path::{Path, PathBuf};

use panacea_patch::manifest::{
    Against, Differences, MANIFEST_NAME, PrivateKey, PublicKey, SIGNATURE_NAME, SignError,
    Signature, VerifyError, check_manifest, hash_directory, ignored_by_default, signature_path,
    verify,
};

#[test]
fn frozen_signatures_verify() {
    for (target, signature, key) in [
        ("toy-model", None, "p256"),
        ("toy.safetensors", None, "p384"),
        (
            "toy-model",
            Some("model-signing-1.1.1/toy-model.sig"),
            "p384",
        ),
    ] {
        let signature = signature.map(fixture);
        let verified = verify(&fixture(target), signature.as_deref(), &public(key)).unwrap();
        assert_eq!(verified.key(), public(key).hint());
        assert_eq!(verified.name(), target);
        let manifest = verified.manifest().expect("the signature covers it");
        assert_eq!(manifest.provenance().external_parameters["rho"], 0.25);
        assert!(verified.beyond_manifest().is_empty());
        assert!(!verified.has_unsigned_manifest());
    }
}

#[test]
fn a_file_signed_by_model_signing_verifies_but_its_manifest_is_not_covered() {
    let signature = fixture("model-signing-1.1.1/toy.safetensors.sig");
    let target = fixture("toy.safetensors");
    let verified = verify(&target, Some(&signature), &public("p256")).unwrap();
    assert!(verified.manifest().is_none());
    assert!(verified.has_unsigned_manifest());
    assert_eq!(verified.files()[0].name.as_str(), "toy.safetensors");
}

#[test]
fn the_same_files_and_key_give_the_frozen_bytes() {
    for (target, key) in [("toy-model", "p256"), ("toy.safetensors", "p384")] {
        let target = fixture(target);
        let path = signature_path(&target);
        let signature = Signature::of(&target, &path, &private(key)).unwrap();
        assert_eq!(signature.to_json(), fs::read_to_string(&path).unwrap());
    }
    // From digests known already, as after writing: no file is read again.
    let target = fixture("toy-model");
    let ignored = ignored_by_default(Some(SIGNATURE_NAME.parse().unwrap()));
    let files = hash_directory(&target, &ignored).unwrap();
    let signature = Signature::of_directory("toy-model", files, ignored, &private("p256")).unwrap();
    let frozen = fs::read_to_string(target.join(SIGNATURE_NAME)).unwrap();
    assert_eq!(signature.to_json(), frozen);
}

#[test]
fn a_flipped_bit_in_any_signed_file_is_found_and_named() {
    let copy = Copy::of("toy-model");
    for name in [
        "config.json",
        "model.safetensors",
        "tokenizer/vocab.json",
        MANIFEST_NAME,
    ] {
        let length = fs::read(copy.path.join(name)).unwrap().len();
        // Every byte: in the safetensors file that is its length field, its header, the padding after it, and its data.
        for byte in 0..length {
            copy.flip(name, byte * 8 + byte % 8);
            let differences = copy.differences(Against::Signature);
            assert_eq!(differences.to_string(), format!("changed: `{name}`"));
            copy.flip(name, byte * 8 + byte % 8);
        }
    }
    copy.verify("p256").unwrap();
}

#[test]
fn a_flipped_bit_in_any_field_of_the_signature_is_refused() {
    let copy = Copy::of("toy-model");
    let text = fs::read_to_string(copy.path.join(SIGNATURE_NAME)).unwrap();
    for field in ["mediaType", "hint", "payload", "payloadType", "sig"] {
        let start = text.find(&format!("\"{field}\":\"")).unwrap() + field.len() + 4;
        let length = text[start..].find('"').unwrap();
        assert!(length > 20, "{field}");
        for byte in start..start + length {
            let bit = byte * 8 + byte % 8;
            copy.flip(SIGNATURE_NAME, bit);
            match (field, copy.verify("p256").unwrap_err()) {
                (_, VerifyError::MalformedSignature { .. })
                | ("hint", VerifyError::ForeignKey { .. })
                | ("payload" | "sig", VerifyError::InvalidSignature { .. }) => {}
                (_, other) => panic!("{field}, byte {byte}: {other:?}"),
            }
            copy.flip(SIGNATURE_NAME, bit);
        }
    }
    copy.verify("p256").unwrap();
}

#[test]
fn every_file_that_differs_is_listed() {
    let copy = Copy::of("toy-model");
    copy.flip("model.safetensors", 100);
    copy.flip("tokenizer/vocab.json", 1);
    fs::remove_file(copy.path.join("config.json")).unwrap();
    fs::write(copy.path.join("modeling_toy.py"), "import os\n").unwrap();
    fs::write(copy.path.join("tokenizer/extra.json"), "{}").unwrap();
    assert_eq!(
        copy.differences(Against::Signature).to_string(),
        "changed: `model.safetensors`, `tokenizer/vocab.json`; missing: `config.json`; \
         extra: `modeling_toy.py`, `tokenizer/extra.json`"
    );
    // The manifest alone finds the same, though anyone could have written it.
    match check_manifest(&copy.path) {
        Err(VerifyError::FilesDiffer {
            against: Against::Manifest,
            differences,
        }) => assert_eq!(differences, copy.differences(Against::Signature)),
        other => panic!("{other:?}"),
    }
}

#[test]
fn another_key_is_told_from_a_bad_signature() {
    let copy = Copy::of("toy-model");
    assert!(matches!(
        copy.verify("p384"),
        Err(VerifyError::ForeignKey { named, given, .. })
            if named == public("p256").hint() && given == public("p384").hint()
    ));
}

#[test]
fn an_attacker_with_a_key_of_their_own_does_not_pass() {
    let copy = Copy::of("toy-model");
    fs::write(copy.path.join("config.json"), "{}").unwrap();
    fs::remove_file(copy.path.join(MANIFEST_NAME)).unwrap();
    copy.sign("p384").unwrap();
    copy.verify("p384").unwrap();
    assert!(matches!(
        copy.verify("p256"),
        Err(VerifyError::ForeignKey { .. })
    ));
    // Nor by claiming to be the other key.
    let path = copy.path.join(SIGNATURE_NAME);
    let [own, other] = ["p384", "p256"].map(|key| public(key).hint().to_string());
    let text = fs::read_to_string(&path).unwrap().replace(&own, &other);
    fs::write(&path, text).unwrap();
    assert!(matches!(
        copy.verify("p256"),
        Err(VerifyError::InvalidSignature { .. })
    ));
}

#[test]
fn two_signatures_or_a_repeated_key_are_refused() {
    let copy = Copy::of("toy-model");
    let path = copy.path.join(SIGNATURE_NAME);
    let good = fs::read_to_string(&path).unwrap();
    let start = good.find("[{\"sig\"").unwrap() + 1;
    let end = good.find("}]").unwrap() + 1;
    let signature = &good[start..end];
    for changed in [
        good.replace(signature, &format!("{signature},{signature}")),
        good.replace("\"payload\":", "\"payload\":\"e30=\",\"payload\":"),
    ] {
        assert_ne!(changed, good);
        fs::write(&path, changed).unwrap();
        assert!(matches!(
            copy.verify("p256"),
            Err(VerifyError::MalformedSignature { .. })
        ));
    }
}

#[test]
fn what_the_hub_adds_does_not_break_a_signature() {
    let copy = Copy::of("toy-model");
    fs::write(copy.path.join(".gitattributes"), "*.bin filter=lfs\n").unwrap();
    fs::create_dir(copy.path.join(".git")).unwrap();
    fs::write(copy.path.join(".git/HEAD"), "ref: refs/heads/main\n").unwrap();
    copy.verify("p256").unwrap();
    check_manifest(&copy.path).unwrap();
    // In a directory below, the same names are files like any other.
    fs::write(copy.path.join("tokenizer/.gitattributes"), "").unwrap();
    assert_eq!(
        copy.differences(Against::Signature).to_string(),
        "extra: `tokenizer/.gitattributes`"
    );
}

#[cfg(unix)]
#[test]
fn symbolic_links_are_refused_even_to_the_right_bytes() {
    let copy = Copy::of("toy-model");
    let elsewhere = copy.path.with_extension("elsewhere");
    fs::rename(copy.path.join("model.safetensors"), &elsewhere).unwrap();
    std::os::unix::fs::symlink(&elsewhere, copy.path.join("model.safetensors")).unwrap();
    assert!(matches!(copy.verify("p256"), Err(VerifyError::Tree(_))));
    assert!(matches!(copy.sign("p256"), Err(SignError::Tree(_))));
    assert!(matches!(
        check_manifest(&copy.path),
        Err(VerifyError::Tree(_))
    ));
}

#[test]
fn a_renamed_checkpoint_still_verifies() {
    let copy = Copy::of("toy-model");
    let renamed = copy.path.with_file_name("other");
    fs::rename(&copy.path, &renamed).unwrap();
    let verified = verify(&renamed, None, &public("p256")).unwrap();
    assert_eq!(verified.name(), "toy-model");

    let copy = Copy::of("toy.safetensors");
    let renamed = copy.path.with_file_name("other.safetensors");
    for suffix in ["", ".sig", ".manifest.json"] {
        fs::rename(with(&copy.path, suffix), with(&renamed, suffix)).unwrap();
    }
    let verified = verify(&renamed, None, &public("p384")).unwrap();
    assert!(verified.manifest().is_some());
    check_manifest(&renamed).unwrap();
}

#[test]
fn a_single_file_is_bound_to_its_manifest() {
    let copy = Copy::of("toy.safetensors");
    let manifest = with(&copy.path, ".manifest.json");
    let good = fs::read(&manifest).unwrap();

    fs::remove_file(&manifest).unwrap();
    let differs = |against| match verify(&copy.path, None, &public("p384")) {
        Err(VerifyError::FilesDiffer {
            against: found,
            differences,
        }) => {
            assert_eq!(found, against);
            differences.to_string()
        }
        other => panic!("{other:?}"),
    };
    assert_eq!(
        differs(Against::Signature),
        "missing: `toy.safetensors.manifest.json`"
    );
    let text = String::from_utf8(good.clone()).unwrap();
    fs::write(&manifest, text.replace("0.25", "0.5")).unwrap();
    assert_eq!(
        differs(Against::Signature),
        "changed: `toy.safetensors.manifest.json`"
    );
    fs::write(&manifest, good).unwrap();
    let mut weights = fs::read(&copy.path).unwrap();
    *weights.last_mut().unwrap() ^= 1;
    fs::write(&copy.path, weights).unwrap();
    assert_eq!(differs(Against::Signature), "changed: `toy.safetensors`");

    // A signature that covers the file alone does not excuse a manifest that contradicts it.
    let signature = fixture("model-signing-1.1.1/toy.safetensors.sig");
    fs::copy(fixture("toy.safetensors"), &copy.path).unwrap();
    let stale = text.replace("\"sha256\": \"7", "\"sha256\": \"8");
    assert_ne!(stale, text);
    fs::write(&manifest, stale).unwrap();
    assert!(matches!(
        verify(&copy.path, Some(&signature), &public("p256")),
        Err(VerifyError::FilesDiffer {
            against: Against::Manifest,
            ..
        })
    ));
}

#[test]
fn a_signature_of_a_file_is_none_of_a_directory() {
    let file = fixture("toy.safetensors.sig");
    let directory = fixture("toy-model").join(SIGNATURE_NAME);
    for (target, signature, key) in [
        ("toy-model", file, "p384"),
        ("toy.safetensors", directory, "p256"),
    ] {
        assert!(matches!(
            verify(&fixture(target), Some(&signature), &public(key)),
            Err(VerifyError::OtherKind { .. })
        ));
    }
}

#[test]
fn what_is_signed_contradicts_no_manifest() {
    let copy = Copy::of("toy-model");
    fs::write(copy.path.join("config.json"), "{}").unwrap();
    assert!(matches!(
        copy.sign("p256"),
        Err(SignError::Manifest(VerifyError::FilesDiffer {
            against: Against::Manifest,
            ..
        }))
    ));
    // A file that the manifest does not name may be added before signing, and the verifier learns of it.
    fs::copy(
        fixture("toy-model").join("config.json"),
        copy.path.join("config.json"),
    )
    .unwrap();
    fs::write(copy.path.join("README.md"), "# toy\n").unwrap();
    copy.sign("p256").unwrap();
    let verified = copy.verify("p256").unwrap();
    let beyond: Vec<_> = verified.beyond_manifest();
    assert_eq!(beyond.len(), 1);
    assert_eq!(beyond[0].as_str(), "README.md");
    // With no signature it could be anything.
    assert!(matches!(
        check_manifest(&copy.path),
        Err(VerifyError::FilesDiffer { .. })
    ));
}

#[test]
fn a_manifest_that_contradicts_the_signed_files_is_refused() {
    // Signed by other software, which does not read manifests.
    let copy = Copy::of("toy-model");
    let path = copy.path.join(MANIFEST_NAME);
    let text = fs::read_to_string(&path).unwrap();
    fs::write(&path, text.replace("config.json", "config.yaml")).unwrap();
    copy.sign_without_reading_the_manifest("p256");
    match copy.verify("p256") {
        Err(VerifyError::FilesDiffer {
            against: Against::Manifest,
            differences,
        }) => assert_eq!(differences.to_string(), "missing: `config.yaml`"),
        other => panic!("{other:?}"),
    }
    fs::write(&path, "{}").unwrap();
    copy.sign_without_reading_the_manifest("p256");
    assert!(matches!(
        copy.verify("p256"),
        Err(VerifyError::MalformedManifest { .. })
    ));
}

#[test]
fn nothing_is_verified_where_something_is_missing() {
    let copy = Copy::of("toy-model");
    fs::remove_file(copy.path.join(SIGNATURE_NAME)).unwrap();
    assert!(matches!(
        copy.verify("p256"),
        Err(VerifyError::NoSignature { path }) if path.ends_with(SIGNATURE_NAME)
    ));
    check_manifest(&copy.path).unwrap();
    fs::remove_file(copy.path.join(MANIFEST_NAME)).unwrap();
    assert!(matches!(
        check_manifest(&copy.path),
        Err(VerifyError::NoManifest { path }) if path.ends_with(MANIFEST_NAME)
    ));
    let nowhere = copy.path.with_file_name("nowhere");
    assert!(matches!(
        verify(&nowhere, None, &public("p256")),
        Err(VerifyError::Io { .. })
    ));
    assert!(matches!(
        Signature::of(&nowhere, &signature_path(&nowhere), &private("p256")),
        Err(SignError::Tree(_))
    ));
    fs::create_dir(&nowhere).unwrap();
    assert!(matches!(
        Signature::of(&nowhere, &signature_path(&nowhere), &private("p256")),
        Err(SignError::NoFiles { .. })
    ));
}

/// A fixture of one's own to damage.
struct Copy {
    path: PathBuf,
    _directory: tempfile::TempDir,
}

impl Copy {
    fn of(name: &str) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join(name);
        let source = fixture(name);
        if source.is_dir() {
            for file in hash_directory(&source, &[]).unwrap() {
                let target = path.join(file.name.as_str());
                fs::create_dir_all(target.parent().unwrap()).unwrap();
                fs::copy(source.join(file.name.as_str()), target).unwrap();
            }
        } else {
            for suffix in ["", ".sig", ".manifest.json"] {
                fs::copy(with(&source, suffix), with(&path, suffix)).unwrap();
            }
        }
        Self {
            path,
            _directory: directory,
        }
    }

    fn flip(&self, name: &str, bit: usize) {
        let path = self.path.join(name);
        let mut bytes = fs::read(&path).unwrap();
        bytes[bit / 8] ^= 1 << (bit % 8);
        fs::write(path, bytes).unwrap();
    }

    fn verify(&self, key: &str) -> Result<panacea_patch::manifest::Verified, VerifyError> {
        verify(&self.path, None, &public(key))
    }

    fn differences(&self, expected: Against) -> Differences {
        match self.verify("p256") {
            Err(VerifyError::FilesDiffer {
                against,
                differences,
            }) => {
                assert_eq!(against, expected);
                differences
            }
            other => panic!("{other:?}"),
        }
    }

    fn sign(&self, key: &str) -> Result<(), SignError> {
        let path = signature_path(&self.path);
        let signature = Signature::of(&self.path, &path, &private(key))?;
        fs::write(path, signature.to_json()).unwrap();
        Ok(())
    }

    fn sign_without_reading_the_manifest(&self, key: &str) {
        let ignored = ignored_by_default(Some(SIGNATURE_NAME.parse().unwrap()));
        let files = hash_directory(&self.path, &ignored).unwrap();
        let signature = Signature::of_directory("toy", files, ignored, &private(key)).unwrap();
        fs::write(self.path.join(SIGNATURE_NAME), signature.to_json()).unwrap();
    }
}

fn testdata() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("testdata")
}

fn fixture(name: &str) -> PathBuf {
    testdata().join("manifest-v1").join(name)
}

fn public(curve: &str) -> PublicKey {
    PublicKey::read(&testdata().join(format!("keys/{curve}.pub.pem"))).unwrap()
}

fn private(curve: &str) -> PrivateKey {
    PrivateKey::read(&testdata().join(format!("keys/{curve}.pkcs8.pem"))).unwrap()
}

fn with(path: &Path, suffix: &str) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(suffix);
    name.into()
}
