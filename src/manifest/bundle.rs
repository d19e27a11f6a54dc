//! The envelope of a signature: DSSE, in a Sigstore bundle.
//!
//! In: a payload and a key. Out: one line of JSON that holds the payload, its ECDSA signature and the digest of the public key's
//! PEM text. The way back gives the payload up only against a key: [`Bundle::open`] is the one place where bytes of a
//! signature file turn into something that may be believed.
//!
//! Sources: <https://github.com/secure-systems-lab/dsse/blob/v1.0.2/protocol.md>, Sigstore's `sigstore_bundle.proto` (v0.3), and
//! what model-signing 1.1.1 reads and writes.

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use panacea_formats::json::JsonError;
use panacea_formats::{Sha256, shown};
use serde::{Deserialize, Serialize};
use thiserror::Error;

use super::json;
use super::keys::{PrivateKey, PublicKey};

/// A payload and a signature over it, not verified yet.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Bundle {
    payload: Vec<u8>,
    /// ASN.1 DER.
    signature: Vec<u8>,
    /// The key that is said to have signed; bundles of early signers leave it out.
    hint: Option<Sha256>,
}

impl Bundle {
    /// Signs `payload` with `key`; the same payload and key give the same bundle.
    pub(super) fn seal(payload: Vec<u8>, key: &PrivateKey) -> Self {
        Self {
            signature: key.sign(&signed_bytes(&payload)),
            hint: Some(key.public_key().hint()),
            payload,
        }
    }

    /// The payload, if `key` verifies it.
    ///
    /// # Errors
    /// [`OpenError::ForeignKey`] when the bundle names another key, [`OpenError::Invalid`] when it does not but the signature is
    /// not this key's over this payload.
    pub(super) fn open(&self, key: &PublicKey) -> Result<&[u8], OpenError> {
        let given = key.hint();
        if let Some(named) = self.hint
            && named != given
        {
            return Err(OpenError::ForeignKey { named, given });
        }
        if !key.verifies(&signed_bytes(&self.payload), &self.signature) {
            return Err(OpenError::Invalid { given });
        }
        Ok(&self.payload)
    }

    /// The bundle on one line, without a newline.
    pub(super) fn to_json(&self) -> String {
        let text = BundleText {
            media_type: MEDIA_TYPE.to_owned(),
            verification_material: MaterialText {
                public_key: Some(PublicKeyText {
                    hint: self.hint.map(|hint| hint.to_string()),
                }),
                tlog_entries: Some(Vec::new()),
            },
            dsse_envelope: EnvelopeText {
                payload: BASE64.encode(&self.payload),
                payload_type: PAYLOAD_TYPE.to_owned(),
                signatures: vec![SignatureText {
                    sig: BASE64.encode(&self.signature),
                    keyid: Some(String::new()),
                }],
            },
        };
        serde_json::to_string(&text).expect("strings and lists of strings are always JSON")
    }

    /// Reads a bundle.
    ///
    /// # Errors
    /// [`BundleError`] saying what is not as model-signing's bundles made with a key have it.
    pub(super) fn parse(bytes: &[u8]) -> Result<Self, BundleError> {
        let not_json = |source| BundleError::Json { source };
        let text = json::Text::parse(bytes).map_err(not_json)?;
        let media_type = text.value.get("mediaType").and_then(|found| found.as_str());
        if media_type != Some(MEDIA_TYPE) {
            return Err(BundleError::MediaType {
                found: media_type.unwrap_or("none").to_owned(),
            });
        }
        let text: BundleText = text.decode().map_err(not_json)?;
        let key = text
            .verification_material
            .public_key
            .ok_or(BundleError::NoPublicKey)?;
        let envelope = text.dsse_envelope;
        if envelope.payload_type != PAYLOAD_TYPE {
            return Err(BundleError::PayloadType {
                found: envelope.payload_type,
            });
        }
        let [signature] = envelope.signatures.as_slice() else {
            return Err(BundleError::Signatures {
                found: envelope.signatures.len(),
            });
        };
        let decode = |field, text: &str| {
            BASE64
                .decode(text)
                .map_err(|source| BundleError::Base64 { field, source })
        };
        Ok(Self {
            payload: decode("payload", &envelope.payload)?,
            signature: decode("sig", &signature.sig)?,
            hint: match key.hint.as_deref() {
                None | Some("") => None,
                Some(hint) => Some(hint.parse().map_err(|_| BundleError::Hint {
                    found: hint.to_owned(),
                })?),
            },
        })
    }
}

/// Why a bundle's payload may not be believed.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum OpenError {
    /// It names another key than the one given.
    ForeignKey { named: Sha256, given: Sha256 },
    /// The signature does not verify with the key given.
    Invalid { given: Sha256 },
}

/// Why a file is not a signature that this program understands.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum BundleError {
    /// It is not JSON, names a key twice, or a field is missing or of the wrong kind.
    #[error("it is not the JSON of a signature bundle")]
    Json {
        /// What is wrong, and where.
        #[source]
        source: JsonError,
    },
    /// It is no bundle, or one of another version.
    #[error(
        "its media type is `{}`, and only `{MEDIA_TYPE}` is understood",
        shown(found)
    )]
    MediaType {
        /// What it says.
        found: String,
    },
    /// It was made with a certificate or through a transparency log.
    #[error("it names no public key: signatures by certificate or identity are not supported")]
    NoPublicKey,
    /// What is signed is no in-toto statement.
    #[error(
        "its payload type is `{}`, and only `{PAYLOAD_TYPE}` is understood",
        shown(found)
    )]
    PayloadType {
        /// What it says.
        found: String,
    },
    /// It holds no signature, or several, of which a reader could check the wrong one.
    #[error("it holds {found} signatures, and there must be exactly one")]
    Signatures {
        /// How many.
        found: usize,
    },
    /// A binary field cannot be decoded.
    #[error("its field `{field}` is not base64")]
    Base64 {
        /// The field.
        field: &'static str,
        /// What is wrong with it.
        #[source]
        source: base64::DecodeError,
    },
    /// The key is named by something else than a SHA-256 digest.
    #[error("its key hint `{}` is not a SHA-256 digest", shown(found))]
    Hint {
        /// What it says.
        found: String,
    },
}

/// DSSE's pre-authentication encoding: what is signed in place of the payload, so that its type is signed too.
fn signed_bytes(payload: &[u8]) -> Vec<u8> {
    let type_length = PAYLOAD_TYPE.len();
    let payload_length = payload.len();
    let mut bytes = format!("DSSEv1 {type_length} {PAYLOAD_TYPE} {payload_length} ").into_bytes();
    bytes.extend_from_slice(payload);
    bytes
}

#[derive(Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
struct BundleText {
    media_type: String,
    verification_material: MaterialText,
    dsse_envelope: EnvelopeText,
}

#[derive(Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
struct MaterialText {
    public_key: Option<PublicKeyText>,
    /// Empty where a key signs: nothing was logged. What a log says would not be checked, and is not believed.
    tlog_entries: Option<Vec<serde_json::Value>>,
}

#[derive(Serialize, Deserialize)]
struct PublicKeyText {
    hint: Option<String>,
}

#[derive(Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
struct EnvelopeText {
    payload: String,
    payload_type: String,
    signatures: Vec<SignatureText>,
}

#[derive(Serialize, Deserialize)]
struct SignatureText {
    sig: String,
    keyid: Option<String>,
}

const MEDIA_TYPE: &str = "application/vnd.dev.sigstore.bundle.v0.3+json";

const PAYLOAD_TYPE: &str = "application/vnd.in-toto+json";

#[cfg(test)]
mod tests {
    use super::*;

    fn key() -> PrivateKey {
        PrivateKey::from_pem(include_str!("../../testdata/keys/p256.pkcs8.pem")).unwrap()
    }

    #[test]
    fn signs_the_encoding_that_dsse_prints() {
        // The protocol's own example, with our payload type in place of "http://example.com/HelloWorld".
        assert_eq!(
            signed_bytes(b"hello world"),
            b"DSSEv1 28 application/vnd.in-toto+json 11 hello world"
        );
    }

    #[test]
    fn opens_what_it_sealed_and_nothing_else() {
        let key = key();
        let bundle = Bundle::seal(b"{}".to_vec(), &key);
        let read = Bundle::parse(bundle.to_json().as_bytes()).unwrap();
        assert_eq!(read, bundle);
        assert_eq!(read.open(&key.public_key()).unwrap(), b"{}");
        assert_eq!(
            Bundle::seal(b"{}".to_vec(), &key).to_json(),
            bundle.to_json()
        );

        let other = PrivateKey::generate(super::super::Curve::P256).unwrap();
        assert!(matches!(
            read.open(&other.public_key()),
            Err(OpenError::ForeignKey { .. })
        ));
        let unnamed = Bundle {
            hint: None,
            ..read.clone()
        };
        assert_eq!(unnamed.open(&key.public_key()).unwrap(), b"{}");
        assert!(matches!(
            unnamed.open(&other.public_key()),
            Err(OpenError::Invalid { .. })
        ));
        let changed = Bundle {
            payload: b"[]".to_vec(),
            ..read
        };
        assert!(matches!(
            changed.open(&key.public_key()),
            Err(OpenError::Invalid { .. })
        ));
    }

    #[test]
    fn a_hint_left_out_or_empty_leaves_the_verdict_to_the_signature() {
        let key = key();
        let good = Bundle::seal(b"{}".to_vec(), &key).to_json();
        let hint = format!("{{\"hint\":\"{}\"}}", key.public_key().hint());
        for other in ["{}", "{\"hint\":\"\"}", "{\"hint\":null}"] {
            let text = good.replace(&hint, other);
            assert_ne!(text, good);
            let bundle = Bundle::parse(text.as_bytes()).unwrap();
            assert_eq!(bundle.open(&key.public_key()).unwrap(), b"{}");
        }
    }

    #[test]
    fn refuses_other_bundles_by_what_they_are() {
        let good = Bundle::seal(b"{}".to_vec(), &key()).to_json();
        let refusal = |was: &str, is: &str| {
            let text = good.replacen(was, is, 1);
            assert_ne!(text, good, "{was}");
            Bundle::parse(text.as_bytes()).unwrap_err()
        };
        use BundleError as E;
        assert!(matches!(
            refusal("v0.3+json", "v0.2+json"),
            E::MediaType { .. }
        ));
        assert!(matches!(refusal("mediaType", "kind"), E::MediaType { .. }));
        assert!(matches!(
            refusal("in-toto+json", "other"),
            E::PayloadType { .. }
        ));
        assert!(matches!(
            refusal("publicKey", "x509CertificateChain"),
            E::NoPublicKey
        ));
        assert!(matches!(
            refusal("[{\"sig\"", "[{\"sig\":\"\"},{\"sig\""),
            E::Signatures { found: 2 }
        ));
        assert!(matches!(
            refusal("\"signatures\":[", "\"signatures\":[],\"x\":["),
            E::Signatures { found: 0 }
        ));
        assert!(matches!(
            refusal("\"sig\":\"", "\"sig\":\"-"),
            E::Base64 { field: "sig", .. }
        ));
        assert!(matches!(
            refusal("\"hint\":\"", "\"hint\":\"0"),
            E::Hint { .. }
        ));
        let twice = refusal("\"keyid\":\"\"", "\"keyid\":\"\",\"keyid\":\"\"");
        assert!(matches!(twice, E::Json { .. }));
        assert!(matches!(
            refusal("\"dsseEnvelope\"", "\"messageSignature\""),
            E::Json { .. }
        ));
    }
}
