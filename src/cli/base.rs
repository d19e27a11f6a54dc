//! Where an adapter's base is: the path that was given, or the one that the adapter's config names, or the Hugging Face cache.
//!
//! In: an adapter's directory and its config. Out: the path of the base. Nothing is downloaded, and nothing is looked for where
//! the config's name is no name.

use std::env;
use std::ffi::OsString;
use std::path::{Path, PathBuf};

use panacea_formats::{AdapterConfig, shown};

use super::error::{Exit, Failure};

/// Finds the base of the adapter in `directory`.
///
/// # Errors
/// When it was not given, and none of the places where it could be has it; they are listed.
pub(super) fn find(
    directory: &Path,
    config: &AdapterConfig,
    given: Option<&Path>,
) -> Result<PathBuf, Failure> {
    if let Some(path) = given {
        return Ok(path.to_owned());
    }
    let failure = |because: String| {
        Failure::new(
            Exit::Refused,
            format!("the base of `{}` was not found", directory.display()),
        )
        .because(because)
        .hint("give the model that the adapter was trained on with --base")
    };
    let Some(name) = config
        .base_model_name_or_path
        .as_deref()
        .filter(|name| !name.is_empty())
    else {
        return Err(failure("its config names none".to_owned()));
    };
    let mut looked = Vec::new();
    for place in places(directory, name, config.revision.as_deref()) {
        if place.is_dir() {
            return Ok(place);
        }
        looked.push(format!("`{}`", place.display()));
    }
    Err(failure(format!(
        "its config names `{}`, and it is not at {}",
        shown(name),
        looked.join(", ")
    )))
}

/// Where the model called `name` could be, in the order in which it is looked for: as a path, from the working directory and
/// from the adapter's, then in the Hub's cache.
fn places(directory: &Path, name: &str, revision: Option<&str>) -> Vec<PathBuf> {
    let mut places = vec![PathBuf::from(name)];
    if Path::new(name).is_relative() {
        places.push(directory.join(name));
    }
    if let (Some(repository), Some(cache)) = (cache_folder(name), hub_cache(|it| env::var_os(it))) {
        places.push(snapshot(
            &cache.join(repository),
            revision.unwrap_or("main"),
        ));
    }
    places
}

/// The folder of a repository in the cache; nothing when `name` is no name of one.
fn cache_folder(name: &str) -> Option<String> {
    let sound = |part: &str| {
        let allowed = |c: char| c.is_ascii_alphanumeric() || matches!(c, '_' | '-' | '.');
        !part.is_empty() && !part.starts_with('.') && part.chars().all(allowed)
    };
    let parts: Vec<&str> = name.split('/').collect();
    let named = parts.len() <= 2 && parts.iter().all(|part| sound(part));
    named.then(|| format!("models--{}", parts.join("--")))
}

/// The folder that huggingface_hub keeps models in, by the variables that it asks, in its order.
fn hub_cache(variable: impl Fn(&str) -> Option<OsString>) -> Option<PathBuf> {
    let path = |name: &str| {
        variable(name)
            .filter(|it| !it.is_empty())
            .map(PathBuf::from)
    };
    path("HF_HUB_CACHE")
        .or_else(|| path("HUGGINGFACE_HUB_CACHE"))
        .or_else(|| Some(path("HF_HOME")?.join("hub")))
        .or_else(|| Some(path("XDG_CACHE_HOME")?.join("huggingface/hub")))
        .or_else(|| Some(path("HOME")?.join(".cache/huggingface/hub")))
}

/// The snapshot of `revision`, a branch, a tag or a commit; a folder that does not exist when there is none.
fn snapshot(repository: &Path, revision: &str) -> PathBuf {
    let is_plain = |name: &str| !name.is_empty() && !name.contains(['/', '\\']) && name != "..";
    // A revision such as `refs/pr/1` lies deeper; parts that lead elsewhere are none.
    let commit = revision
        .split('/')
        .all(is_plain)
        .then(|| std::fs::read_to_string(repository.join("refs").join(revision)).ok())
        .flatten();
    let commit = commit.as_deref().map_or(revision, str::trim);
    let snapshots = repository.join("snapshots");
    match is_plain(commit) {
        true => snapshots.join(commit),
        false => snapshots,
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    #[test]
    fn the_cache_is_where_the_hub_keeps_it() {
        let with = |set: &[(&str, &str)]| {
            hub_cache(|name| {
                let found = set.iter().find(|(known, _)| *known == name)?;
                Some(found.1.into())
            })
        };
        let all = [
            ("HF_HUB_CACHE", "/a"),
            ("HUGGINGFACE_HUB_CACHE", "/b"),
            ("HF_HOME", "/c"),
            ("XDG_CACHE_HOME", "/d"),
            ("HOME", "/e"),
        ];
        for (first, wanted) in [
            "/a",
            "/b",
            "/c/hub",
            "/d/huggingface/hub",
            "/e/.cache/huggingface/hub",
        ]
        .into_iter()
        .enumerate()
        {
            assert_eq!(with(&all[first..]), Some(PathBuf::from(wanted)));
        }
        assert_eq!(
            with(&[("HF_HOME", ""), ("HOME", "/e")]),
            with(&[("HOME", "/e")])
        );
        assert_eq!(with(&[]), None);
    }

    #[test]
    fn names_of_repositories_are_told_from_paths() {
        assert_eq!(
            cache_folder("meta-llama/Llama-2-7b-hf").as_deref(),
            Some("models--meta-llama--Llama-2-7b-hf")
        );
        assert_eq!(cache_folder("gpt2").as_deref(), Some("models--gpt2"));
        for path in ["/a/b", "../a", "a/b/c", "a//b", "a/..", "", "a b", "~/a"] {
            assert_eq!(cache_folder(path), None, "{path}");
        }
    }

    #[test]
    fn a_revision_leads_to_its_snapshot_and_never_out_of_the_cache() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path();
        fs::create_dir_all(path.join("refs/refs/pr")).unwrap();
        fs::write(path.join("refs/main"), "abc\n").unwrap();
        fs::write(path.join("refs/refs/pr/1"), "def").unwrap();
        fs::write(path.join("refs/evil"), "../../x").unwrap();
        fs::write(path.join("secret"), "abc").unwrap();
        let found = |revision| snapshot(path, revision);
        assert_eq!(found("main"), path.join("snapshots/abc"));
        assert_eq!(found("refs/pr/1"), path.join("snapshots/def"));
        assert_eq!(found("0123"), path.join("snapshots/0123"));
        for leads_out in ["evil", "../secret", "a/../../secret", ".."] {
            assert_eq!(found(leads_out), path.join("snapshots"), "{leads_out}");
        }
    }

    #[test]
    fn a_base_is_looked_for_beside_the_adapter_and_its_absence_is_explained() {
        let directory = tempfile::tempdir().unwrap();
        let adapter = directory.path().join("adapter");
        fs::create_dir_all(directory.path().join("base")).unwrap();
        fs::create_dir_all(&adapter).unwrap();
        let config = |name: &str| {
            AdapterConfig::parse(&format!(
                r#"{{"peft_type":"LORA","r":1,"lora_alpha":1,"base_model_name_or_path":{name}}}"#
            ))
            .unwrap()
        };
        let found = find(&adapter, &config("\"../base\""), None).unwrap();
        assert_eq!(found, adapter.join("../base"));
        let failure = find(&adapter, &config("\"org/nowhere\""), None).unwrap_err();
        assert!(failure.because.unwrap().contains("models--org--nowhere"));
        assert!(failure.hint.unwrap().contains("--base"));
        assert!(find(&adapter, &config("null"), None).is_err());
        let given = find(&adapter, &config("null"), Some(Path::new("x"))).unwrap();
        assert_eq!(given, Path::new("x"));
    }
}
