//! Output is complete or absent, never over an input, and never over what cannot be made again.

#![expect(clippy::unwrap_used, reason = "a test may fail loudly")]

use std::fs;
use std::os::unix::fs::{PermissionsExt as _, symlink};
use std::path::Path;

use panacea_formats::{OutputDir, OutputError, OutputErrorKind, OutputFile, Overwrite, Sha256};

#[test]
fn a_directory_is_absent_until_its_commit_and_complete_after() {
    let root = tempfile::tempdir().unwrap();
    let target = root.path().join("out");
    let mut output = OutputDir::create(&target, Overwrite::Never, &[]).unwrap();
    let written = output.write_file("deep/er/file.txt", b"content").unwrap();
    output.write_file("config.json", b"{}").unwrap();
    assert!(!target.exists());
    assert_eq!(written.name, "deep/er/file.txt");
    assert_eq!((written.bytes, written.sha256), (7, Sha256::of(b"content")));
    let committed = output.commit().unwrap();
    assert!(committed.left_behind.is_none());
    assert_eq!(
        fs::read(target.join("deep/er/file.txt")).unwrap(),
        b"content"
    );
    assert_eq!(names(root.path()), ["out"]);
}

#[test]
fn a_file_is_absent_until_its_commit_and_complete_after() {
    let root = tempfile::tempdir().unwrap();
    let target = root.path().join("out.safetensors");
    let mut output = OutputFile::create(&target, Overwrite::Never, &[]).unwrap();
    output.write_all(b"con").unwrap();
    output.write_all(b"tent").unwrap();
    let written = output.finish().unwrap();
    assert!(!target.exists());
    assert_eq!((written.bytes, written.sha256), (7, Sha256::of(b"content")));
    assert!(matches!(
        kind(output.write_all(b"!")),
        OutputErrorKind::Finished
    ));
    let _ = output.commit().unwrap();
    assert_eq!(fs::read(&target).unwrap(), b"content");
    assert_eq!(names(root.path()), ["out.safetensors"]);
}

#[test]
fn what_is_dropped_leaves_nothing() {
    let root = tempfile::tempdir().unwrap();
    let mut directory = OutputDir::create(&root.path().join("d"), Overwrite::Never, &[]).unwrap();
    directory.write_file("a/b", b"x").unwrap();
    let mut file = OutputFile::create(&root.path().join("f"), Overwrite::Never, &[]).unwrap();
    file.write_all(b"x").unwrap();
    assert_eq!(names(root.path()).len(), 2);
    assert!(
        names(root.path())
            .iter()
            .all(|name| name.contains(".partial-"))
    );
    drop((directory, file));
    assert!(names(root.path()).is_empty());
}

#[test]
fn two_outputs_for_one_target_do_not_meet_and_the_second_commit_is_refused() {
    let root = tempfile::tempdir().unwrap();
    for overwrite in [Overwrite::Never, Overwrite::Replace] {
        let target = root.path().join(format!("{overwrite:?}"));
        let mut first = OutputDir::create(&target, overwrite, &[]).unwrap();
        let mut second = OutputDir::create(&target, overwrite, &[]).unwrap();
        first.write_file("who", b"first").unwrap();
        second.write_file("who", b"second").unwrap();
        let _ = first.commit().unwrap();
        assert!(matches!(
            kind(second.commit().map(drop)),
            OutputErrorKind::Exists
        ));
        assert_eq!(fs::read(target.join("who")).unwrap(), b"first");
    }
    assert_eq!(names(root.path()), ["Never", "Replace"]);
}

#[test]
fn modes_come_from_the_umask() {
    // What the umask makes of a plain file is what it must make of ours; setting the umask would disturb the other tests.
    let root = tempfile::tempdir().unwrap();
    let plain = root.path().join("plain");
    fs::write(&plain, b"").unwrap();
    fs::create_dir(root.path().join("folder")).unwrap();
    let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o7777;

    let mut output = OutputDir::create(&root.path().join("out"), Overwrite::Never, &[]).unwrap();
    output.write_file("sub/file", b"").unwrap();
    let _ = output.commit().unwrap();
    let file = OutputFile::create(&root.path().join("lone"), Overwrite::Never, &[]).unwrap();
    let _ = file.commit().unwrap();

    assert_eq!(mode(&root.path().join("out/sub/file")), mode(&plain));
    assert_eq!(mode(&root.path().join("lone")), mode(&plain));
    assert_eq!(
        mode(&root.path().join("out")),
        mode(&root.path().join("folder"))
    );
    assert_eq!(
        mode(&root.path().join("out/sub")),
        mode(&root.path().join("folder"))
    );
}

#[test]
fn a_check_refuses_what_would_be_refused_and_writes_nothing() {
    let root = tempfile::tempdir().unwrap();
    let target = root.path().join("out");
    OutputDir::check(&target, Overwrite::Never, &[], 1).unwrap();
    OutputFile::check(&target, Overwrite::Never, &[], 1).unwrap();
    assert_eq!(names(root.path()).len(), 0);
    assert!(matches!(
        kind(OutputFile::check(&target, Overwrite::Never, &[], u64::MAX)),
        OutputErrorKind::NotEnoughSpace { .. }
    ));
    assert!(matches!(
        kind(OutputDir::check(
            &target,
            Overwrite::Never,
            &[root.path()],
            1
        )),
        OutputErrorKind::OverlapsInput { .. }
    ));
    fs::create_dir(&target).unwrap();
    assert!(matches!(
        kind(OutputDir::check(&target, Overwrite::Never, &[], 1)),
        OutputErrorKind::Exists
    ));
    OutputDir::check(&target, Overwrite::Replace, &[], 1).unwrap();
}

#[test]
fn nothing_is_replaced_unless_asked() {
    let root = tempfile::tempdir().unwrap();
    let file = root.path().join("file");
    fs::write(&file, b"old").unwrap();
    assert!(matches!(
        refusal_of_file(&file, Overwrite::Never, &[]),
        OutputErrorKind::Exists
    ));
    assert!(matches!(
        refusal_of_dir(&file, Overwrite::Never, &[]),
        OutputErrorKind::Exists
    ));
    let mut output = OutputFile::create(&file, Overwrite::Replace, &[]).unwrap();
    output.write_all(b"new").unwrap();
    assert_eq!(fs::read(&file).unwrap(), b"old");
    let _ = output.commit().unwrap();
    assert_eq!(fs::read(&file).unwrap(), b"new");
    assert_eq!(names(root.path()), ["file"]);
}

#[test]
fn a_checkpoint_is_replaced_whole_and_nothing_of_it_stays() {
    let root = tempfile::tempdir().unwrap();
    let target = root.path().join("out");
    fs::create_dir_all(target.join("old")).unwrap();
    fs::write(target.join("model.safetensors"), b"old").unwrap();
    let mut output = OutputDir::create(&target, Overwrite::Replace, &[]).unwrap();
    output.write_file("new", b"").unwrap();
    assert!(target.join("old").exists());
    let _ = output.commit().unwrap();
    assert_eq!(names(&target), ["new"]);
    assert_eq!(names(root.path()), ["out"]);
}

#[test]
fn directories_that_may_be_precious_are_never_replaced() {
    let root = tempfile::tempdir().unwrap();
    let make = |name: &str, files: &[&str]| {
        let path = root.path().join(name);
        fs::create_dir(&path).unwrap();
        for file in files {
            fs::write(path.join(file), b"").unwrap();
        }
        path
    };
    let empty = make("empty", &[]);
    assert!(OutputDir::create(&empty, Overwrite::Replace, &[]).is_ok());
    let ours = make("ours", &["panacea.manifest.json", "notes.txt"]);
    assert!(OutputDir::create(&ours, Overwrite::Replace, &[]).is_ok());

    let precious = [
        make("notes", &["notes.txt"]),
        make("node-project", &["config.json", "index.js"]),
        make("clone", &["model.safetensors", ".git"]),
    ];
    let link = root.path().join("link");
    symlink(&ours, &link).unwrap();
    let working = std::env::current_dir().unwrap();
    for path in precious.iter().chain([&link, &working]) {
        let refusal = refusal_of_dir(path, Overwrite::Replace, &[]);
        assert!(
            matches!(refusal, OutputErrorKind::NotReplaced { .. }),
            "{}",
            path.display()
        );
    }
    let refusal = refusal_of_file(&empty, Overwrite::Replace, &[]);
    assert!(matches!(refusal, OutputErrorKind::NotReplaced { .. }));
    let refusal = refusal_of_file(&link, Overwrite::Replace, &[]);
    assert!(matches!(refusal, OutputErrorKind::NotReplaced { .. }));
}

#[test]
fn a_target_that_became_precious_meanwhile_is_not_replaced() {
    let root = tempfile::tempdir().unwrap();
    let target = root.path().join("out");
    fs::create_dir(&target).unwrap();
    let output = OutputDir::create(&target, Overwrite::Replace, &[]).unwrap();
    fs::write(target.join("thesis.tex"), b"").unwrap();
    assert!(matches!(
        kind(output.commit().map(drop)),
        OutputErrorKind::NotReplaced { .. }
    ));
    assert_eq!(names(&target), ["thesis.tex"]);
    assert_eq!(names(root.path()), ["out"]);
}

#[test]
fn output_never_overlaps_an_input_however_the_paths_are_spelled() {
    let root = tempfile::tempdir().unwrap();
    let input = root.path().join("in");
    fs::create_dir(&input).unwrap();
    fs::write(input.join("model.safetensors"), b"").unwrap();
    let link = root.path().join("link");
    symlink(&input, &link).unwrap();
    let same = input.join("../in");
    let inside = link.join("out");
    let parent = root.path().to_owned();
    for target in [&input, &same, &inside, &parent] {
        for (input, overwrite) in [(&input, Overwrite::Replace), (&link, Overwrite::Never)] {
            let refusal = refusal_of_dir(target, overwrite, &[input]);
            assert!(
                matches!(refusal, OutputErrorKind::OverlapsInput { .. }),
                "{}",
                target.display()
            );
            let refusal = refusal_of_file(target, overwrite, &[input]);
            assert!(
                matches!(refusal, OutputErrorKind::OverlapsInput { .. }),
                "{}",
                target.display()
            );
        }
    }
    let file = input.join("model.safetensors");
    assert!(matches!(
        refusal_of_file(&file, Overwrite::Replace, &[&file]),
        OutputErrorKind::OverlapsInput { .. }
    ));
    assert!(OutputFile::create(&input.join("other"), Overwrite::Never, &[&file]).is_ok());
    assert!(
        OutputDir::create(&root.path().join("in-patched"), Overwrite::Never, &[&input]).is_ok()
    );
}

#[test]
fn a_target_without_a_name_or_a_parent_is_refused() {
    let root = tempfile::tempdir().unwrap();
    for nameless in ["/", "..", "."] {
        let refusal = refusal_of_dir(Path::new(nameless), Overwrite::Replace, &[]);
        assert!(matches!(refusal, OutputErrorKind::NoName), "{nameless}");
    }
    let orphan = root.path().join("missing/out");
    assert!(matches!(
        refusal_of_dir(&orphan, Overwrite::Never, &[]),
        OutputErrorKind::NoParent { .. }
    ));
    let file = root.path().join("file");
    fs::write(&file, b"").unwrap();
    assert!(!matches!(
        refusal_of_dir(&file.join("out"), Overwrite::Never, &[]),
        OutputErrorKind::Exists
    ));
}

#[test]
fn names_stay_inside_the_directory_and_come_once() {
    let root = tempfile::tempdir().unwrap();
    let mut output = OutputDir::create(&root.path().join("out"), Overwrite::Never, &[]).unwrap();
    for name in ["", ".", "..", "../x", "a/../../x", "/etc/x"] {
        let refusal = kind(output.write_file(name, b"").map(drop));
        assert!(
            matches!(refusal, OutputErrorKind::NameLeadsOut { .. }),
            "{name}"
        );
    }
    output.write_file("a", b"").unwrap();
    assert!(matches!(
        kind(output.write_file("a", b"").map(drop)),
        OutputErrorKind::Io(_)
    ));
}

#[test]
fn room_is_asked_for_before_it_is_needed() {
    let root = tempfile::tempdir().unwrap();
    let output = OutputDir::create(&root.path().join("out"), Overwrite::Never, &[]).unwrap();
    assert!(output.require_space(1).is_ok());
    let error = output.require_space(u64::MAX).unwrap_err();
    assert!(error.is_environment());
    assert!(matches!(
        error.kind,
        OutputErrorKind::NotEnoughSpace {
            needed: u64::MAX,
            ..
        }
    ));
}

fn names(directory: &Path) -> Vec<String> {
    let mut names: Vec<String> = fs::read_dir(directory)
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    names
}

fn kind(result: Result<(), OutputError>) -> OutputErrorKind {
    result.unwrap_err().kind
}

fn refusal_of_dir(target: &Path, overwrite: Overwrite, inputs: &[&Path]) -> OutputErrorKind {
    kind(OutputDir::create(target, overwrite, inputs).map(drop))
}

fn refusal_of_file(target: &Path, overwrite: Overwrite, inputs: &[&Path]) -> OutputErrorKind {
    kind(OutputFile::create(target, overwrite, inputs).map(drop))
}
