//! A directory with a checkpoint, data and keys, in which the program is run.

#![expect(dead_code, reason = "each test file uses a part")]
#![expect(
    unreachable_pub,
    reason = "a module of several test files, not an interface"
)]

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

/// What lies in it:
///
/// - `my-finetune/`: tiny-chat, a small chat model that was attacked (BF16, one file)
/// - `sharded/`: the same in two shards
/// - `my-adapter/`: a LoRA adapter of `my-finetune`, which its config names
/// - `h.jsonl`, `t.jsonl`, `b.jsonl`: eight harmful, task and benign rows
/// - `keys/`: `testdata/keys`
///
/// Tests damage files by the shell's own means.
pub struct Sandbox {
    directory: tempfile::TempDir,
}

impl Sandbox {
    pub fn new() -> Self {
        let directory = tempfile::tempdir().expect("a directory");
        let testdata = Path::new(env!("CARGO_MANIFEST_DIR")).join("testdata");
        let sandbox = Self { directory };
        copy_files(&testdata.join("tiny-chat"), &sandbox.path("my-finetune"));
        copy_files(&testdata.join("keys"), &sandbox.path("keys"));
        sandbox.shard();
        sandbox.adapt(&testdata.join("peft/tiny-chat"));
        let data = testdata.join("tiny-chat-data");
        for (from, to) in [
            ("harmful.jsonl", "h.jsonl"),
            ("task.jsonl", "t.jsonl"),
            ("benign.jsonl", "b.jsonl"),
        ] {
            let text = fs::read_to_string(data.join(from)).expect("rows");
            let rows: Vec<&str> = text.lines().take(8).collect();
            fs::write(sandbox.path(to), rows.join("\n") + "\n").expect("rows are written");
        }
        sandbox
    }

    /// The path of something in it.
    pub fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    /// Runs `command` in `sh`, in the sandbox; gives the exit code, and stdout and stderr as one text.
    pub fn shell(&self, command: &str) -> (i32, String) {
        // One pipe for both streams, so that their order is that of the writing.
        let mut shell = Command::new("sh");
        for variable in CACHES {
            shell.env_remove(variable);
        }
        let output = shell
            .args(["-c", &format!("exec 2>&1\n{command}")])
            .current_dir(self.directory.path())
            .env("PATH", path_with_program())
            .env("HOME", self.directory.path())
            .env_remove("SOURCE_DATE_EPOCH")
            .env_remove("GITHUB_STEP_SUMMARY")
            .env("COLUMNS", "100")
            .stdin(Stdio::null())
            .output()
            .expect("sh runs");
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        (output.status.code().unwrap_or(-1), text)
    }

    /// `line` with wildcards for what differs from one run or machine to the next.
    pub fn without_chance(&self, line: &str) -> String {
        let digest = regex::Regex::new("[0-9a-f]{64}").expect("a pattern");
        let seconds = regex::Regex::new(r"\([0-9.]+ s\)").expect("a pattern");
        let memory = regex::Regex::new(r#""peak_rss_mib":[0-9]+"#).expect("a pattern");
        let directory = self.directory.path().display().to_string();
        let line = line.replace(&directory, "[..]");
        let line = digest.replace_all(&line, "[..]");
        let line = seconds.replace_all(&line, "([..] s)");
        memory
            .replace_all(&line, r#""peak_rss_mib":[..]"#)
            .into_owned()
    }

    /// The program with `arguments`, to be run in the sandbox.
    pub fn program(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_panacea-patch"));
        command
            .args(arguments)
            .current_dir(self.directory.path())
            .env_remove("SOURCE_DATE_EPOCH")
            .env_remove("GITHUB_STEP_SUMMARY")
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        command
    }

    /// Runs the program, which must exit with 0.
    pub fn run(&self, arguments: &str) {
        let arguments: Vec<&str> = arguments.split_whitespace().collect();
        let output = self.program(&arguments).output().expect("the program runs");
        assert!(
            output.status.success(),
            "{arguments:?}: {}",
            String::from_utf8_lossy(&output.stderr)
        );
    }

    /// Every file of the directory `name`, with its bytes, by name.
    pub fn files(&self, name: &str) -> Vec<(String, Vec<u8>)> {
        let mut files: Vec<(String, Vec<u8>)> = fs::read_dir(self.path(name))
            .expect("a directory")
            .map(|entry| {
                let entry = entry.expect("an entry");
                let bytes = fs::read(entry.path()).expect("a file");
                (entry.file_name().to_string_lossy().into_owned(), bytes)
            })
            .collect();
        files.sort();
        files
    }

    /// The names in the sandbox that begin with a dot: leavings.
    pub fn leavings(&self) -> Vec<String> {
        let mut names: Vec<String> = fs::read_dir(self.directory.path())
            .expect("the sandbox")
            .map(|entry| {
                entry
                    .expect("an entry")
                    .file_name()
                    .to_string_lossy()
                    .into_owned()
            })
            .filter(|name| name.starts_with('.'))
            .collect();
        names.sort();
        names
    }

    /// Copies the adapter, and names `my-finetune` as its base.
    fn adapt(&self, from: &Path) {
        let to = self.path("my-adapter");
        copy_files(from, &to);
        let config = to.join("adapter_config.json");
        let text = fs::read_to_string(&config).expect("a config");
        let renamed = text.replace("../../tiny-chat", "my-finetune");
        assert_ne!(renamed, text);
        fs::write(&config, renamed).expect("the config is writable");
    }

    /// Cuts `my-finetune` into two shards.
    fn shard(&self) {
        let bytes = fs::read(self.path("my-finetune/model.safetensors")).expect("weights");
        let whole = safetensors::SafeTensors::deserialize(&bytes).expect("safetensors");
        let to = self.path("sharded");
        copy_files(&self.path("my-finetune"), &to);
        fs::remove_file(to.join("model.safetensors")).expect("it was copied");
        let mut names: Vec<String> = whole
            .names()
            .into_iter()
            .map(|it| (*it).to_owned())
            .collect();
        names.sort();
        let mut weight_map = serde_json::Map::new();
        for (place, names) in names.chunks(names.len().div_ceil(2)).enumerate() {
            let shard = format!("model-{:05}-of-00002.safetensors", place + 1);
            let tensors: Vec<_> = names
                .iter()
                .map(|name| (name.as_str(), whole.tensor(name).expect("it is there")))
                .collect();
            safetensors::serialize_to_file(tensors, None, &to.join(&shard)).expect("a shard");
            weight_map.extend(
                names
                    .iter()
                    .map(|name| (name.clone(), shard.clone().into())),
            );
        }
        let index = serde_json::json!({"metadata": {}, "weight_map": weight_map});
        fs::write(to.join("model.safetensors.index.json"), index.to_string()).expect("an index");
    }
}

/// Variables that would have an adapter's base looked for elsewhere than in the sandbox.
const CACHES: [&str; 4] = [
    "HF_HUB_CACHE",
    "HUGGINGFACE_HUB_CACHE",
    "HF_HOME",
    "XDG_CACHE_HOME",
];

/// Whether permissions mean nothing to these tests.
pub fn is_root() -> bool {
    let id = Command::new("id").arg("-u").output().expect("id runs");
    id.stdout.trim_ascii() == b"0"
}

fn path_with_program() -> std::ffi::OsString {
    let program = Path::new(env!("CARGO_BIN_EXE_panacea-patch"));
    let mut path = program
        .parent()
        .expect("it is in a directory")
        .as_os_str()
        .to_owned();
    path.push(":");
    path.push(std::env::var_os("PATH").unwrap_or_default());
    path
}

fn copy_files(from: &Path, to: &Path) {
    fs::create_dir(to).expect("a new directory");
    for entry in fs::read_dir(from).expect("a directory") {
        let entry = entry.expect("an entry");
        if entry.path().is_file() {
            fs::write(
                to.join(entry.file_name()),
                fs::read(entry.path()).expect("a file"),
            )
            .expect("a copy");
        }
    }
}
