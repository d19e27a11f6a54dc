//! The arms of a cell: what is done to the attacked model, and how the result is scored.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::str::FromStr;
use std::time::Instant;

use panacea_formats::{OutputFile, Overwrite};
use panacea_patch::optimize::FineTuning;
use serde_json::{Value, json};

use crate::lora::Base;
use crate::mix::{Files, Purpose, alignment, attack, refusal_tuning};
use crate::plan::{Plan, Task};
use crate::{Failure, interrupt, say};

/// What is done to the attacked model.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Arm {
    /// Nothing, before the attack: what safety is to come back to.
    Aligned,
    /// Nothing.
    Attacked,
    /// The program's default method.
    Adaptive,
    /// Gaussian noise of the norm that `Adaptive` found.
    Random,
    /// The paper's eps alone, in the weights, of the largest norm within the budgets.
    PanaceaEps,
    /// The paper's outer loop and eps, in the weights.
    PanaceaLoop,
    /// The paper's eps alone, in the adapter, of the paper's norm.
    AdapterEps,
    /// The paper's outer loop and eps, in the adapter.
    AdapterLoop,
    /// Fine-tuning of the adapter on refusals and the task, on as many rows as `Adaptive` computed gradients of.
    Refusals,
    /// The aligned model in another type.
    AlignedQ8,
    /// The attacked model in another type.
    AttackedQ8,
    /// `Adaptive`'s file, converted.
    AdaptiveQ8,
    AlignedQ4,
    AttackedQ4,
    AdaptiveQ4,
    /// As `AdaptiveQ4`, with the touched matrices in Q8_0.
    AdaptiveQ4Fine,
    /// The default method on `AttackedQ4`, with the touched matrices in Q8_0: found on the other weights as they are shipped.
    Q4Adaptive,
}

impl Arm {
    /// In the order in which they are done: `Adaptive` before those that take their measure from it.
    pub(crate) const ALL: &[Self] = &[
        Self::Attacked,
        Self::Aligned,
        Self::Adaptive,
        Self::Random,
        Self::PanaceaEps,
        Self::PanaceaLoop,
        Self::AdapterEps,
        Self::AdapterLoop,
        Self::Refusals,
        Self::AttackedQ8,
        Self::AlignedQ8,
        Self::AdaptiveQ8,
        Self::AttackedQ4,
        Self::AlignedQ4,
        Self::AdaptiveQ4,
        Self::AdaptiveQ4Fine,
        Self::Q4Adaptive,
    ];

    /// Those of a quick look.
    pub(crate) const QUICK: &[Self] = &[
        Self::Attacked,
        Self::Aligned,
        Self::Adaptive,
        Self::Random,
        Self::Refusals,
    ];

    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Aligned => "aligned",
            Self::Attacked => "attacked",
            Self::Adaptive => "adaptive",
            Self::Random => "random",
            Self::PanaceaEps => "panacea-eps",
            Self::PanaceaLoop => "panacea-loop",
            Self::AdapterEps => "adapter-eps",
            Self::AdapterLoop => "adapter-loop",
            Self::Refusals => "refusals",
            Self::AlignedQ8 => "aligned-q8_0",
            Self::AttackedQ8 => "attacked-q8_0",
            Self::AdaptiveQ8 => "adaptive-q8_0",
            Self::AlignedQ4 => "aligned-q4_k_m",
            Self::AttackedQ4 => "attacked-q4_k_m",
            Self::AdaptiveQ4 => "adaptive-q4_k_m",
            Self::AdaptiveQ4Fine => "adaptive-q4_k_m-fine",
            Self::Q4Adaptive => "q4_k_m-adaptive",
        }
    }

    /// Whether the result is a GGUF file.
    fn is_gguf(self) -> bool {
        self.converted().is_some() || self == Self::Q4Adaptive
    }

    /// The directory that a quantized arm is converted from, and how.
    fn converted(self) -> Option<(Self, &'static [&'static str])> {
        const Q8: &[&str] = &["--type", "q8_0"];
        const Q4: &[&str] = &["--type", "q4_k_m"];
        const FINE: &[&str] = &["--type", "q4_k_m", "--patched-type", "q8_0"];
        match self {
            Self::AlignedQ8 => Some((Self::Aligned, Q8)),
            Self::AttackedQ8 => Some((Self::Attacked, Q8)),
            Self::AdaptiveQ8 => Some((Self::Adaptive, Q8)),
            Self::AlignedQ4 => Some((Self::Aligned, Q4)),
            Self::AttackedQ4 => Some((Self::Attacked, Q4)),
            Self::AdaptiveQ4 => Some((Self::Adaptive, Q4)),
            Self::AdaptiveQ4Fine => Some((Self::Adaptive, FINE)),
            _ => None,
        }
    }
}

impl FromStr for Arm {
    type Err = String;

    fn from_str(name: &str) -> Result<Self, String> {
        let names: Vec<_> = Self::ALL.iter().map(|arm| arm.name()).collect();
        let found = Self::ALL.iter().find(|arm| arm.name() == name);
        found
            .copied()
            .ok_or_else(|| format!("no arm is called so; there are {}", names.join(", ")))
    }
}

/// A task, a share of poison and a seed.
pub(crate) struct Cell<'a> {
    pub(crate) plan: &'a Plan,
    pub(crate) data: &'a Path,
    pub(crate) base: &'a Base,
    pub(crate) program: &'a Program,
    pub(crate) task: &'a Task,
    pub(crate) poison: usize,
    pub(crate) seed: u64,
    pub(crate) purpose: Purpose,
    /// The folder of the aligned model and its adapter.
    pub(crate) aligned: PathBuf,
    pub(crate) folder: PathBuf,
    /// Further flags of the adaptive arm.
    pub(crate) adaptive: Option<&'a str>,
}

impl Cell<'_> {
    /// Reads all sets, so that what is wrong with one is told before any training.
    pub(crate) fn check(&self) -> Result<(), Failure> {
        alignment(self.plan, self.data)?;
        attack(self.plan, self.data, self.task, self.poison, self.seed)?;
        self.rows()?;
        Ok(())
    }

    /// Does what has no results yet.
    pub(crate) fn run(&self, arms: &[Arm]) -> Result<(), Failure> {
        if !self.aligned.join("model").exists() {
            self.align()?;
        }
        let files = self.rows()?.write(&self.folder.join("rows"))?;
        if !self.attacked().exists() {
            self.attack()?;
        }
        for &arm in arms {
            let results = self.results(arm);
            if results.exists() {
                continue;
            }
            say(&format!("{}: {}", self.folder.display(), self.label(arm)));
            let (model, made) = self.make(arm, &files)?;
            let scores = self.score(arm, &model, &files)?;
            let record = json!({
                "task": self.task.name,
                "poison": self.poison,
                "seed": self.seed,
                "arm": self.label(arm),
                "made": made,
                "scores": scores,
            });
            write_whole(&results, &record)?;
            // What others are made from stays.
            let kept = [
                self.attacked(),
                self.aligned.join("model"),
                self.model(Arm::Adaptive),
                self.model(Arm::AttackedQ4),
            ];
            if !kept.contains(&model) {
                remove(&model)?;
            }
        }
        Ok(())
    }

    fn rows(&self) -> Result<Files<Vec<Value>>, Failure> {
        Files::of(self.plan, self.data, self.task, self.seed, self.purpose)
    }

    /// Fine-tunes the base on refusals and ordinary instructions.
    fn align(&self) -> Result<(), Failure> {
        say(&format!("aligning, seed {}", self.seed));
        let [start, adapter, model] =
            ["start", "adapter", "model"].map(|name| self.aligned.join(name));
        std::fs::create_dir_all(&self.aligned)?;
        self.base.begin(&start, self.seed)?;
        let settings = FineTuning {
            lr: self.plan.align.lr,
            weight_decay: 0.0,
            steps: self.plan.align.steps,
            batch: self.plan.align.batch,
            seed: self.seed,
        };
        let rows = alignment(self.plan, self.data)?;
        self.base.train(&start, &adapter, &rows, &settings)?;
        self.base.merge(&adapter, &model)
    }

    fn attack(&self) -> Result<(), Failure> {
        say(&format!("{}: attacking", self.folder.display()));
        let rows = attack(self.plan, self.data, self.task, self.poison, self.seed)?;
        let settings = FineTuning {
            lr: self.plan.attack.lr,
            weight_decay: 0.0,
            steps: self.plan.attack.steps,
            batch: self.plan.attack.batch,
            seed: self.seed,
        };
        let adapter = self.folder.join("adapter");
        let aligned = self.aligned.join("adapter");
        self.base.train(&aligned, &adapter, &rows, &settings)?;
        self.base.merge(&adapter, &self.attacked())
    }

    fn attacked(&self) -> PathBuf {
        self.folder.join("attacked")
    }

    /// What results are called: the arm, with the flags that development tries.
    fn label(&self, arm: Arm) -> String {
        match (arm.name().contains("adaptive"), self.adaptive) {
            (true, Some(flags)) => format!("{} {flags}", arm.name()),
            _ => arm.name().to_owned(),
        }
    }

    fn file_name(&self, arm: Arm) -> String {
        let plain = |c: char| match c.is_ascii_alphanumeric() || "-_.".contains(c) {
            true => c,
            false => '_',
        };
        self.label(arm).chars().map(plain).collect()
    }

    fn results(&self, arm: Arm) -> PathBuf {
        self.folder.join(format!("{}.json", self.file_name(arm)))
    }

    /// What the program told of the arm's model as it made it.
    fn told(&self, arm: Arm) -> PathBuf {
        self.folder.join(format!("{}.told", self.file_name(arm)))
    }

    fn model(&self, arm: Arm) -> PathBuf {
        match arm {
            Arm::Attacked => self.attacked(),
            Arm::Aligned => self.aligned.join("model"),
            _ if arm.is_gguf() => self.folder.join(format!("{}.gguf", self.file_name(arm))),
            _ => self.folder.join(format!("{}.model", self.file_name(arm))),
        }
    }

    /// Makes the arm's model, and says where it is and what the program told of the making.
    fn make(&self, arm: Arm, files: &Files) -> Result<(PathBuf, Value), Failure> {
        let model = self.model(arm);
        let began = Instant::now();
        let made = match arm {
            Arm::Aligned | Arm::Attacked => Value::Null,
            Arm::Refusals => self.tune_on_refusals(&model)?,
            // What was told of a model that a stopped run had made, but not scored.
            _ if model.exists() && self.told(arm).exists() => {
                serde_json::from_str(&std::fs::read_to_string(self.told(arm))?)?
            }
            _ => {
                let quantized = self.model(Arm::AttackedQ4);
                if arm == Arm::Q4Adaptive && !quantized.exists() {
                    self.write(Arm::AttackedQ4, files)?;
                }
                let mut told = self.write(arm, files)?;
                // The digests of all files, and the like.
                if let Some(told) = told.as_object_mut() {
                    told.retain(|key, _| TOLD.contains(&key.as_str()));
                    if let Some(realized) = told.get_mut("realized") {
                        *realized = realized["total"].take();
                    }
                }
                let made = json!({"told": told, "seconds": began.elapsed().as_secs_f64()});
                write_whole(&self.told(arm), &made)?;
                made
            }
        };
        Ok((model, made))
    }

    /// Has the program write the arm's model, and returns what it told.
    fn write(&self, arm: Arm, files: &Files) -> Result<Value, Failure> {
        let mut arguments = self.arguments(arm, files)?;
        let model = self.model(arm).display().to_string();
        arguments.extend(["--force".to_owned(), "-o".to_owned(), model]);
        self.program.run(&arguments)
    }

    fn arguments(&self, arm: Arm, files: &Files) -> Result<Vec<String>, Failure> {
        let text = |path: &Path| path.display().to_string();
        if let Some((from, how)) = arm.converted() {
            let mut arguments = vec!["convert".to_owned(), text(&self.model(from))];
            arguments.extend(how.iter().map(|&word| word.to_owned()));
            return Ok(arguments);
        }
        let in_adapter = matches!(arm, Arm::AdapterEps | Arm::AdapterLoop);
        let mut arguments = match in_adapter {
            true => vec![
                text(&self.folder.join("adapter")),
                "--base".to_owned(),
                text(self.base.path()),
                "--merge".to_owned(),
            ],
            false if arm.is_gguf() => vec![text(&self.model(Arm::AttackedQ4))],
            false => vec![text(&self.attacked())],
        };
        let mut add = |words: &str| arguments.extend(words.split_whitespace().map(str::to_owned));
        match arm {
            Arm::Adaptive => add(self.adaptive.unwrap_or_default()),
            Arm::Q4Adaptive => {
                add(self.adaptive.unwrap_or_default());
                add("--patched-type q8_0");
            }
            Arm::Random => {
                let norm = self.adaptive_results()?["results"]["delta_norm"].as_f64();
                let norm = norm.ok_or("the adaptive arm has no norm")?;
                add(&format!("--method random --rho {norm}"));
            }
            Arm::PanaceaEps => add("--method panacea --rho auto --steps 0"),
            Arm::PanaceaLoop => add("--method panacea --rho auto"),
            Arm::AdapterEps => add("--method panacea --steps 0"),
            Arm::AdapterLoop => add("--method panacea"),
            _ => return Err(format!("{} is not made by the program", arm.name()).into()),
        }
        add(&format!("--seed {}", self.seed));
        if arm != Arm::Random {
            add(&format!("--template {} --harmful", self.plan.template));
            arguments.push(text(&files.harmful));
            // Nothing of eps alone at a given norm depends on a task.
            if arm != Arm::AdapterEps {
                arguments.extend(["--task".to_owned(), text(&files.task)]);
            }
        }
        Ok(arguments)
    }

    /// What the program told of the adaptive arm, which others take their measure from.
    fn adaptive_results(&self) -> Result<Value, Failure> {
        let path = self.results(Arm::Adaptive);
        if !path.exists() {
            return Err(format!(
                "`{}` is not there: do the arm `adaptive` first, which others take their measure from",
                path.display()
            )
            .into());
        }
        let mut results: Value = serde_json::from_str(&std::fs::read_to_string(path)?)?;
        Ok(results["made"]["told"].take())
    }

    /// Fine-tunes the attacked adapter on as many rows as the adaptive arm computed gradients of, and merges it.
    fn tune_on_refusals(&self, model: &Path) -> Result<Value, Failure> {
        let began = Instant::now();
        let adaptive = self.adaptive_results()?;
        let steps = adaptive["steps"].as_array();
        let gradients: usize = steps
            .ok_or("the adaptive arm has no steps")?
            .iter()
            .map(|step| match step["phase"].as_str() {
                Some("contrast") => 4,
                _ => 2,
            })
            .sum();
        let batch = self.plan.attack.batch;
        let settings = FineTuning {
            lr: TUNING_LR,
            weight_decay: 0.0,
            steps: gradients * ADAPTIVE_BATCH / batch,
            batch,
            seed: self.seed,
        };
        let rows = refusal_tuning(self.plan, self.data, self.task, self.seed)?;
        let adapter = self.folder.join("refusals.adapter");
        let attacked = self.folder.join("adapter");
        self.base.train(&attacked, &adapter, &rows, &settings)?;
        self.base.merge(&adapter, model)?;
        let seconds = began.elapsed().as_secs_f64();
        Ok(json!({"fine_tuning_steps": settings.steps, "seconds": seconds}))
    }

    fn score(&self, arm: Arm, model: &Path, files: &Files) -> Result<Value, Failure> {
        let text = |path: &Path| path.display().to_string();
        let mut arguments: Vec<String> = vec!["eval".to_owned(), text(model)];
        let mut add = |flag: &str, value: String| arguments.extend([flag.to_owned(), value]);
        add("--template", self.plan.template.clone());
        add("--harmful", text(&files.score_harmful));
        add("--harmless", text(&files.score_harmless));
        add("--task", text(&files.score_task));
        add("--benign", text(&files.score_text));
        add("--grade", self.task.grade.clone());
        let score = &self.plan.score;
        add("--max-new-tokens", score.max_new_tokens.to_string());
        add("--task-tokens", self.task.max_new_tokens.to_string());
        add("--judge", score.judge.clone());
        let template = score.judge_template.as_ref();
        let template = template.map(|file| text(&self.data.join(file)));
        let threshold = score.judge_threshold.map(|it| it.to_string());
        for (flag, value) in [
            ("--judge-template", template),
            ("--judge-threshold", threshold),
            ("--judge-endpoint", score.judge_endpoint.clone()),
            ("--judge-model", score.judge_model.clone()),
        ] {
            if let Some(value) = value {
                add(flag, value);
            }
        }
        if arm != Arm::Attacked {
            add("--against", text(&self.attacked()));
        }
        // One for the cell, so that the attacked model answers once.
        let kept = self.folder.join("answers.jsonl");
        add("--journal", text(&kept));
        let mut told = self.program.run(&arguments)?;
        Ok(told["found"].take())
    }
}

/// Writes `value` in one piece, since a file that is there counts as whole.
pub(crate) fn write_whole(path: &Path, value: &Value) -> Result<(), Failure> {
    let mut output = OutputFile::create(path, Overwrite::Replace, &[])?;
    output.write_all(format!("{value:#}\n").as_bytes())?;
    let _ = output.commit()?;
    Ok(())
}

/// Deletes a model, a GGUF file with the manifest beside it.
fn remove(model: &Path) -> Result<(), Failure> {
    if model.is_dir() {
        std::fs::remove_dir_all(model)?;
    } else {
        std::fs::remove_file(model)?;
        let mut manifest = model.as_os_str().to_owned();
        manifest.push(".manifest.json");
        std::fs::remove_file(manifest)?;
    }
    Ok(())
}

/// The program `panacea-patch`.
pub(crate) struct Program(PathBuf);

impl Program {
    pub(crate) fn find(given: Option<&Path>) -> Result<Self, Failure> {
        let beside = std::env::current_exe()?.with_file_name("panacea-patch");
        let path = given.map_or(beside, Path::to_owned);
        match path.exists() {
            true => Ok(Self(path)),
            false => Err(format!(
                "there is no `{}`: build it with `cargo build --release --workspace`, or name it with --program",
                path.display()
            )
            .into()),
        }
    }

    /// Runs it, and returns what it printed.
    fn run(&self, arguments: &[String]) -> Result<Value, Failure> {
        let mut command = Command::new(&self.0);
        command.args(arguments).args(["--json", "--quiet"]);
        let output = interrupt::output(&mut command)?;
        match output.status.success() {
            true => Ok(serde_json::from_slice(&output.stdout)?),
            false => Err(format!(
                "`panacea-patch {}` failed:\n{}",
                arguments.join(" "),
                String::from_utf8_lossy(&output.stderr)
            )
            .into()),
        }
    }
}

/// What is kept of what the program tells of a patch.
const TOLD: [&str; 4] = ["steps", "radii", "results", "realized"];

/// Rows of each set in a step of the adaptive method's.
const ADAPTIVE_BATCH: usize = 24;

/// A common learning rate for LoRA.
const TUNING_LR: f64 = 2e-4;
