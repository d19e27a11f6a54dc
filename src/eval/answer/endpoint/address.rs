//! Where a server is, and what it knows its user by.

use std::fmt;
use std::net::IpAddr;
use std::str::FromStr;

use thiserror::Error;
use ureq::http::{HeaderValue, Uri};

/// The address below which a server answers, such as `http://127.0.0.1:8080/v1`: without a slash at its end, and without anything secret.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Address(Uri);

impl Address {
    /// The address of what is called `name` there.
    pub(super) fn join(&self, name: &str) -> String {
        format!("{self}/{name}")
    }

    /// Whether the server is on this machine, where no proxy leads.
    pub(super) fn is_here(&self) -> bool {
        let host = self.0.host().unwrap_or_default();
        let plain = host.trim_start_matches('[').trim_end_matches(']');
        host.eq_ignore_ascii_case("localhost")
            || plain.parse().is_ok_and(|it: IpAddr| it.is_loopback())
    }

    /// Whether nobody on the way can read along.
    pub(super) fn is_encrypted(&self) -> bool {
        self.0.scheme_str() == Some("https")
    }
}

/// An address without a path is given the path `/v1`, below which servers of this kind answer.
impl FromStr for Address {
    type Err = AddressError;

    fn from_str(text: &str) -> Result<Self, AddressError> {
        // The parser would drop what follows `#`.
        if text.contains(['?', '#']) {
            return Err(AddressError::Query);
        }
        let uri: Uri = text.parse().map_err(AddressError::Malformed)?;
        let (Some(scheme), Some(authority)) = (uri.scheme_str(), uri.authority()) else {
            return Err(AddressError::Relative);
        };
        if !["http", "https"].contains(&scheme) {
            return Err(AddressError::Scheme {
                scheme: scheme.to_owned(),
            });
        }
        if authority.as_str().contains('@') {
            return Err(AddressError::Credentials);
        }
        if authority.host().is_empty() {
            return Err(AddressError::Relative);
        }
        let path = match uri.path().trim_end_matches('/') {
            "" => "/v1",
            path => path,
        };
        let whole = format!("{scheme}://{authority}{path}");
        whole.parse().map(Self).map_err(AddressError::Malformed)
    }
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// Why a text is not the address of a server.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum AddressError {
    /// A name and password, which would be written wherever the address is.
    #[error("it carries a name or a password, which would be written wherever the address is")]
    Credentials,
    /// Not an address at all.
    #[error("it is not an address")]
    Malformed(#[source] ureq::http::uri::InvalidUri),
    /// A query or a fragment, after which no path can follow.
    #[error("it has a `?` or `#`, after which no path can follow")]
    Query,
    /// An address that does not say which protocol is spoken, or by whom.
    #[error("it does not begin with `http://` or `https://` and a host")]
    Relative,
    /// A protocol that is not spoken here.
    #[error("its protocol is `{scheme}`, which is neither `http` nor `https`")]
    Scheme {
        /// The one that it names.
        scheme: String,
    },
}

/// A secret that a server knows its user by. Not shown in `Debug`, and not written anywhere.
#[derive(Clone, PartialEq, Eq)]
pub struct ApiKey {
    text: String,
    header: HeaderValue,
}

impl ApiKey {
    /// What is sent with each request.
    pub(super) fn header(&self) -> HeaderValue {
        self.header.clone()
    }

    /// `said`, but for this key, as it is or as JSON has it: a server may repeat what it was given.
    pub(super) fn hidden_in(&self, said: &str) -> String {
        let quoted = serde_json::Value::from(self.text.as_str()).to_string();
        let in_json = quoted.trim_matches('"');
        said.replace(&self.text, "[API key]")
            .replace(in_json, "[API key]")
    }
}

impl FromStr for ApiKey {
    type Err = MalformedApiKey;

    fn from_str(text: &str) -> Result<Self, MalformedApiKey> {
        // A file or a variable may end with a line's end.
        let text = text.trim();
        if text.is_empty() || !text.bytes().all(|byte| byte.is_ascii_graphic()) {
            return Err(MalformedApiKey);
        }
        let mut header =
            HeaderValue::from_str(&format!("Bearer {text}")).map_err(|_| MalformedApiKey)?;
        header.set_sensitive(true);
        Ok(Self {
            text: text.to_owned(),
            header,
        })
    }
}

impl fmt::Debug for ApiKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("ApiKey(..)")
    }
}

/// A text that cannot be a key. It does not say which.
#[derive(Clone, Copy, Debug, Error, PartialEq, Eq)]
#[error("an API key is one word of visible ASCII characters")]
pub struct MalformedApiKey;

#[cfg(test)]
mod tests {
    use super::*;

    fn address(text: &str) -> String {
        text.parse::<Address>().unwrap().to_string()
    }

    #[test]
    fn an_address_without_a_path_is_given_the_usual_one() {
        assert_eq!(address("http://localhost:8080"), "http://localhost:8080/v1");
        assert_eq!(
            address("https://api.example.org/"),
            "https://api.example.org/v1"
        );
        assert_eq!(address("http://[::1]:8080/"), "http://[::1]:8080/v1");
    }

    #[test]
    fn a_path_is_kept_without_slashes_at_its_end() {
        assert_eq!(
            address("https://host/openai/v2//"),
            "https://host/openai/v2"
        );
        let found: Address = "http://host/v1".parse().unwrap();
        assert_eq!(found.join("completions"), "http://host/v1/completions");
    }

    #[test]
    fn what_is_no_address_of_a_server_is_refused() {
        let error = |text: &str| text.parse::<Address>().unwrap_err();
        for text in [
            "localhost:8080",
            "/v1",
            "example.org",
            "http:/v1",
            "http://",
            "http:///v1",
        ] {
            let found = error(text);
            assert!(
                matches!(found, AddressError::Relative | AddressError::Malformed(_)),
                "{text}: {found:?}"
            );
        }
        assert!(matches!(
            error("ftp://host/v1"),
            AddressError::Scheme { scheme } if scheme == "ftp"
        ));
        assert!(matches!(
            error("https://me:word@host"),
            AddressError::Credentials
        ));
        assert!(matches!(error("http://host/v1?key=1"), AddressError::Query));
        assert!(matches!(error("http://host/v1#part"), AddressError::Query));
        assert!(matches!(error("http://a b"), AddressError::Malformed(_)));
    }

    #[test]
    fn this_machine_is_known_by_its_names() {
        let is_here = |text: &str| text.parse::<Address>().unwrap().is_here();
        for text in [
            "http://localhost",
            "http://LocalHost:1",
            "http://127.0.0.2:80/v1",
            "https://[::1]",
        ] {
            assert!(is_here(text), "{text}");
        }
        for text in [
            "http://localhost.example.org",
            "http://10.0.0.1",
            "http://[::2]",
        ] {
            assert!(!is_here(text), "{text}");
        }
    }

    #[test]
    fn a_key_is_one_visible_word_and_is_not_shown() {
        let key: ApiKey = " sk-one\n".parse().unwrap();
        assert_eq!(key.header().to_str().unwrap(), "Bearer sk-one");
        assert_eq!(key.hidden_in("no sk-one here"), "no [API key] here");
        assert!(!format!("{key:?} {:?}", key.header()).contains("one"));
        for text in ["", " ", "two words", "line\nend", "clé"] {
            assert_eq!(text.parse::<ApiKey>(), Err(MalformedApiKey), "{text:?}");
        }
    }
}
