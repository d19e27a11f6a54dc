//! Finding a perturbation: everything that can be refused cheaply first, then the minutes or hours of work.
//!
//! In: an open [`Model`] and a resolved [`Search`]. Out: [`Prepared`], when config, tokenizer, data and targets are sound, and from
//! it [`Found`], the perturbation with what was measured and the record of how it was made.

use std::path::{Path, PathBuf};

use panacea_formats::{
    BaseProblem, Checkpoint, DataSource, DeltaTensor, FormatError, PerturbationRecord, Problems,
    describe_base, shown,
};
use panacea_patch::data::{Encoder, Sets, TokenizerFiles};
use panacea_patch::manifest::{Dependency, Role};
use panacea_patch::model::device::DeviceDecoder;
use panacea_patch::model::{
    Config, Decoder, Differentiable, EncodedRow, InParts, TargetSelection, TargetTensors,
};
use panacea_patch::optimize::{
    self, RadiusPoint, Random, Rows, SearchOutcome, SearchSettings, Set, Settings, State,
    StepRecord, Trial, gaussian,
};
use panacea_patch::ranks::Cost;
use panacea_patch::resume::{self, Identity};
use serde_json::{Map, Value, json};

use super::args::{RunArgs, WorkArgs};
use super::device::{CPU, Computer, refuse_devices};
use super::error::{Exit, Failure};
use super::launch::Launch;
use super::memory::MemoryPlan;
use super::model::{Model, looked_in};
use super::report::{Reporter, Saver, StepWatch};
use super::settings::{Search, used_sets};
use super::targets::{module_of, targets_of};

/// A search whose every input was read and understood.
pub(super) struct Prepared<'c> {
    model: &'c Model,
    search: &'c Search,
    /// Names and shapes, in the order of every list of tensors.
    targets: Vec<(String, Vec<usize>)>,
    /// What computes, where the method needs it.
    computing: Option<Computing<'c>>,
    data: Vec<DataSource>,
    /// Config and tokenizer, where it computes.
    side_files: Vec<PathBuf>,
    /// Files that decided the result: weights first.
    inputs: Vec<Dependency>,
}

struct Computing<'c> {
    decoder: Decoder<'c>,
    computer: Computer,
    rows: Rows,
    /// The template, in words.
    template: String,
    memory: MemoryPlan,
}

/// A perturbation, and what was measured on the way to it.
pub(super) struct Found {
    pub(super) targets: Vec<(String, Vec<usize>)>,
    /// What picks these targets, as for [`Model::decoder`].
    pub(super) selection: Option<TargetSelection>,
    pub(super) delta: TargetTensors,
    /// What computed, as on a command line.
    pub(super) device: String,
    pub(super) record: PerturbationRecord,
    pub(super) steps: Vec<StepRecord>,
    /// Of the last steps, those of this process.
    pub(super) seconds: Vec<f64>,
    pub(super) radii: Vec<RadiusPoint>,
    pub(super) results: Vec<(&'static str, f64)>,
    pub(super) inputs: Vec<Dependency>,
    /// What was tried for it, without the perturbation.
    pub(super) search: Option<SearchOutcome>,
    /// How many processes shared the work.
    pub(super) ranks: usize,
    /// What that took, on this one.
    cost: Cost,
}

/// What an interrupted run left.
#[derive(Debug)]
pub(super) enum Resumed {
    /// A state between two steps.
    Steps(State<'static>),
    /// The first trials of a search.
    Trials(Vec<Trial>),
}

/// Reads and checks everything that `search` needs.
///
/// # Errors
/// The first input that is refused.
pub(super) fn prepare<'c>(
    model: &'c Model,
    search: &'c Search,
    (work, run): (&WorkArgs, &RunArgs),
    launch: &Launch,
    reporter: &Reporter,
) -> Result<Prepared<'c>, Failure> {
    if search.trials.is_some() && work.state_every.is_some_and(|every| every > 0) {
        return Err(Failure::no_effect("--state-every", "with `--search`")
            .because("a search is kept after every trial")
            .hint("leave out `--state-every`, or pass 0 to keep nothing"));
    }
    if !search.computes() {
        refuse_devices(run.device.as_ref(), "--method random --rho")?;
        return Ok(Prepared {
            targets: targets_of(model, search.selection().as_ref())?,
            computing: None,
            data: Vec::new(),
            side_files: Vec::new(),
            inputs: model.inputs(&[])?,
            model,
            search,
        });
    }
    let computer = Computer::open(run.device.as_ref(), launch.place, reporter)?;
    launch.connect(&computer)?;
    let config = model.config()?;
    let sets = Sets::open(&search.paths)?;
    let files = model.tokenizer()?;
    let encoder = Encoder::open(
        &files,
        search.template,
        search.max_length,
        config.vocab_size,
    )?;
    let used = used_sets(search, &sets);
    let rows = encode(&encoder, &sets, &used)?;
    let mut decoder = model.decoder(config, search.selection().as_ref())?;
    let memory = MemoryPlan::choose(
        &decoder,
        &rows,
        &search.settings,
        model
            .whole()
            .files()
            .iter()
            .map(|shard| shard.file.length() as u64)
            .sum(),
        work.recompute,
        (work.memory, launch.neighbours),
        &computer,
    )?;
    decoder = decoder.with_activations(memory.activations);
    if memory.releases {
        decoder = decoder.releasing(model.whole());
    }
    let template = encoder.template().to_string();
    for (set, source) in &used {
        reporter.stage(format!(
            "read {} {set} rows: {}",
            source.rows,
            shown(&source.name)
        ));
    }
    if search.uses(Set::Task) && !used.iter().any(|(set, _)| *set == Set::Task) {
        reporter.note(
            "nothing watches the task that the model was fine-tuned for; give some of its rows with --task",
        );
    }
    let side_files = match model.checkpoint.layout().is_gguf() {
        true => Vec::new(),
        false => side_inputs(&model.config_file()?, &files),
    };
    Ok(Prepared {
        targets: decoder
            .targets()
            .iter()
            .map(|target| Ok((model.stored_name(&target.name)?, target.shape.to_vec())))
            .collect::<Result<_, Failure>>()?,
        computing: Some(Computing {
            decoder,
            computer,
            rows,
            template,
            memory,
        }),
        data: used.into_iter().map(|(_, source)| source).collect(),
        inputs: model.inputs(&side_files)?,
        side_files,
        model,
        search,
    })
}

impl Prepared<'_> {
    /// Elements of all targets together.
    pub(super) fn target_elements(&self) -> usize {
        self.targets
            .iter()
            .map(|(_, shape)| shape.iter().product::<usize>())
            .sum()
    }

    /// Config and tokenizer, where it computes.
    pub(super) fn side_files(&self) -> &[PathBuf] {
        &self.side_files
    }

    /// Names and shapes of the targets, in the order of every list of tensors.
    pub(super) fn targets(&self) -> &[(String, Vec<usize>)] {
        &self.targets
    }

    /// How many targets there are.
    pub(super) fn target_count(&self) -> usize {
        self.targets.len()
    }

    /// Whether PEFT finds all targets under their names: projections of a decoder that is known, whose weights are outputs x
    /// inputs, in modules that transformers calls as checkpoints do. It calls experts and the models inside larger ones otherwise.
    ///
    /// # Errors
    /// When the config is not known, or a target is something else.
    pub(super) fn require_modules(&self) -> Result<(), Failure> {
        let known: Vec<String> = match &self.computing {
            Some(_) => self.targets.iter().map(|(name, _)| name.clone()).collect(),
            None => {
                let selection = self.search.selection();
                let config = self.model.config()?;
                let decoder = self.model.decoder(config, selection.as_ref())?;
                let targets = decoder.targets().iter();
                targets.map(|target| target.name.clone()).collect()
            }
        };
        let found = |name: &str| {
            name.starts_with("model.layers.")
                && name.split('.').all(|part| part != "experts")
                && known.iter().any(|it| it == name)
        };
        match self.targets.iter().find(|(name, _)| !found(name)) {
            None => Ok(()),
            Some((name, _)) => Err(Failure::new(
                Exit::Refused,
                "the perturbation cannot be written as an adapter",
            )
            .because(format!(
                "`{}` is no projection under `model.layers`, where PEFT would find it",
                shown(name)
            ))
            .hint("leave out --peft, or name projections with --targets")),
        }
    }

    /// What computes and on which rows, where the method needs it.
    pub(super) fn computing(&self) -> Option<(&Decoder<'_>, &Rows, &MemoryPlan)> {
        self.computing
            .as_ref()
            .map(|computing| (&computing.decoder, &computing.rows, &computing.memory))
    }

    /// The data sets that are used.
    pub(super) fn data(&self) -> &[DataSource] {
        &self.data
    }

    /// How to search, where that was asked for.
    pub(super) fn trial_settings(&self) -> Option<SearchSettings> {
        let computing = self.computing.as_ref()?;
        self.search.trial_settings(computing.decoder.targets())
    }

    /// Everything that changes the numbers, for a state that is to be taken up again.
    pub(super) fn identity(&self) -> Identity {
        let mut identity = Identity::default();
        identity.insert("version", env!("CARGO_PKG_VERSION"));
        identity.insert("method", self.search.method());
        identity.insert("seed", self.search.seed);
        for (name, value) in self.search.parameters() {
            identity.insert(name, value);
        }
        if let Some(settings) = self.trial_settings() {
            identity.insert("space", settings.space);
        }
        // Those of the processor have been kept without its name.
        if let Some(computing) = &self.computing
            && let Computer::Devices(_) = computing.computer
        {
            identity.insert("device", computing.computer.kind());
        }
        for source in &self.data {
            identity.insert(format!("{} rows", source.role), source.sha256);
            identity.insert(format!("number of {} rows", source.role), source.rows);
        }
        for input in &self.inputs {
            let of_base = match input.role {
                Role::Base => "base ",
                _ => "",
            };
            identity.insert(format!("{of_base}file {}", input.name), input.digest);
        }
        identity
    }

    /// Does the work, together with the other ranks of `launch`.
    ///
    /// # Errors
    /// When no perturbation is found, or the work is interrupted.
    pub(super) fn run(
        mut self,
        saver: Option<Saver>,
        resumed: Option<Resumed>,
        launch: &Launch,
        reporter: &Reporter,
    ) -> Result<Found, Failure> {
        launch.agree(&self.identity())?;
        launch.tell(reporter);
        let outcome = self.find(saver, resumed, launch, reporter)?;
        launch.group.end();
        self.model.check_unchanged()?;
        let names = self.targets.iter().map(|(name, _)| name.as_str());
        let base = describe_base(&self.model.checkpoint, names)
            .map_err(|problems| not_patchable(&problems))?;
        Ok(Found {
            record: PerturbationRecord {
                method: self.search.method().to_owned(),
                parameters: outcome.parameters,
                seed: self.search.seed,
                space: self.model.space(),
                base,
                data: self.data,
                tool: format!("panacea-patch {}", env!("CARGO_PKG_VERSION")),
            },
            targets: self.targets,
            selection: outcome.selection,
            delta: outcome.delta,
            device: outcome.device,
            steps: outcome.steps,
            seconds: outcome.seconds,
            radii: outcome.radii,
            results: outcome.results,
            inputs: self.inputs,
            search: outcome.search,
            ranks: launch.group.size(),
            cost: launch.group.cost(),
        })
    }

    /// Does the share of a rank that is not the first, and keeps nothing of it.
    ///
    /// # Errors
    /// As [`Self::run`].
    pub(super) fn follow(mut self, launch: &Launch, reporter: &Reporter) -> Result<(), Failure> {
        launch.agree(&self.identity())?;
        self.find(None, None, launch, reporter)?;
        launch.group.end();
        Ok(())
    }

    /// What every rank does.
    fn find(
        &mut self,
        saver: Option<Saver>,
        resumed: Option<Resumed>,
        launch: &Launch,
        reporter: &Reporter,
    ) -> Result<Outcome, Failure> {
        let group = &launch.group;
        let trial_settings = self.trial_settings();
        let mut parameters = self.search.parameters();
        let mut selection = self.search.selection();
        let mut device = CPU.to_owned();
        let outcome = match self.computing.take() {
            None => {
                let Settings::Random(Random { rho, seed }) = &self.search.settings else {
                    return Err(Failure::usage("the method needs a model"));
                };
                let rho = match rho {
                    optimize::Radius::Fixed(rho) => *rho,
                    optimize::Radius::Auto(_) => {
                        return Err(Failure::usage("a search for rho needs a model"));
                    }
                };
                let sizes: Vec<usize> = self
                    .targets
                    .iter()
                    .map(|(_, shape)| shape.iter().product())
                    .collect();
                reporter.stage(format!("drawing {} elements", sizes.iter().sum::<usize>()));
                let delta = gaussian(&sizes, *seed, rho);
                Outcome {
                    results: vec![("rho", rho), ("delta_norm", delta.norm())],
                    delta,
                    ..Outcome::default()
                }
            }
            Some(computing) => {
                reporter.stage(format!(
                    "optimizing {} targets of {} elements by method {}, with {}",
                    self.targets.len(),
                    computing
                        .decoder
                        .targets()
                        .iter()
                        .map(|it| it.shape[0] * it.shape[1])
                        .sum::<usize>(),
                    self.search.method(),
                    computing.template,
                ));
                device = computing.computer.name();
                let (rows, mut model) = (
                    computing.rows,
                    Running::start(
                        computing.decoder,
                        computing.computer,
                        &computing.memory,
                        reporter,
                    )?,
                );
                let mut watch = StepWatch::new(reporter, saver);
                let decoder = model.differentiable();
                let outcome = match trial_settings {
                    Some(settings) => {
                        let trials = match resumed {
                            Some(Resumed::Trials(trials)) => trials,
                            _ => Vec::new(),
                        };
                        let trials = resume::share_trials(group, trials)?;
                        reporter.stage(format!(
                            "trying {} settings: {}",
                            settings.trials, settings.space
                        ));
                        watch.go_on_after(&trials, settings.budget);
                        let found = optimize::search_among(
                            group, decoder, &rows, &settings, trials, &mut watch,
                        );
                        watch.finish();
                        let found = found?;
                        tell_of_judged(&found, reporter);
                        parameters = self.search.chosen_parameters(&found);
                        selection = touched_modules(decoder, &found);
                        self.keep_touched(decoder, found)
                    }
                    None => {
                        let state = match resumed {
                            Some(Resumed::Steps(state)) => Some(state),
                            _ => None,
                        };
                        let state = resume::share(group, state)?;
                        let settings = &self.search.settings;
                        let outcome = optimize::optimize_among(
                            group, decoder, &rows, settings, state, &mut watch,
                        );
                        watch.finish();
                        let outcome = outcome?;
                        Outcome {
                            delta: outcome.delta,
                            steps: outcome.steps,
                            seconds: watch.seconds().to_vec(),
                            radii: outcome.radii,
                            results: outcome.results,
                            ..Outcome::default()
                        }
                    }
                };
                model.tell_of_parts(reporter);
                outcome
            }
        };
        Ok(Outcome {
            parameters,
            selection,
            device,
            ..outcome
        })
    }

    /// What a search found, without the targets that it left as they are.
    fn keep_touched(&mut self, decoder: &dyn Differentiable, mut found: SearchOutcome) -> Outcome {
        let touches = &found.settings.touches;
        let touched: Vec<bool> = decoder
            .targets()
            .iter()
            .map(|target| touches.holds(target))
            .collect();
        let mut places = touched.iter();
        self.targets.retain(|_| places.next() == Some(&true));
        let mut delta = std::mem::take(&mut found.outcome.delta);
        delta.retain(|place| touched[place]);
        Outcome {
            delta,
            steps: std::mem::take(&mut found.outcome.steps),
            radii: std::mem::take(&mut found.outcome.radii),
            results: std::mem::take(&mut found.outcome.results),
            search: Some(found),
            ..Outcome::default()
        }
    }
}

/// What computes, with the weights where it wants them.
#[derive(Debug)]
enum Running<'c> {
    Cpu(Box<Decoder<'c>>),
    Devices(Box<InParts<DeviceDecoder<'c>>>),
}

impl<'c> Running<'c> {
    fn start(
        decoder: Decoder<'c>,
        computer: Computer,
        memory: &MemoryPlan,
        reporter: &Reporter,
    ) -> Result<Self, Failure> {
        let name = computer.name();
        match computer {
            Computer::Cpu => Ok(Self::Cpu(Box::new(decoder))),
            Computer::Devices(devices) => {
                reporter.stage(format!("copying the weights to {name}"));
                let decoder = DeviceDecoder::upload(decoder, devices, memory.activations)?;
                Ok(Self::Devices(Box::new(InParts::new(decoder))))
            }
        }
    }

    fn differentiable(&mut self) -> &mut dyn Differentiable {
        match self {
            Self::Cpu(decoder) => &mut **decoder,
            Self::Devices(decoder) => &mut **decoder,
        }
    }

    /// Says what was done because memory was not enough.
    fn tell_of_parts(&self, reporter: &Reporter) {
        let Self::Devices(decoder) = self else {
            return;
        };
        if decoder.saves_memory() {
            reporter.note("the device's memory was not enough: activations were computed again");
        }
        if let Some(limit) = decoder.limit() {
            reporter.note(format!(
                "the device's memory was not enough: rows were computed about {limit} tokens at a time"
            ));
        }
    }
}

/// Exactly the modules that the chosen trial touches, by their whole paths.
fn touched_modules(decoder: &dyn Differentiable, found: &SearchOutcome) -> Option<TargetSelection> {
    let mut paths: Vec<&str> = decoder
        .targets()
        .iter()
        .filter(|target| found.settings.touches.holds(target))
        .map(|target| module_of(&target.name))
        .map(|path| path.split(".lora_").next().unwrap_or(path))
        .collect();
    paths.dedup();
    paths.join(",").parse().ok()
}

/// Says where trials were judged on rows that they learned from.
fn tell_of_judged(found: &SearchOutcome, reporter: &Reporter) {
    for judged in &found.judged {
        if !judged.apart && judged.rows > 0 {
            reporter.note(format!(
                "{} {} rows are too few to set some apart: trials were judged on rows that they learned from",
                judged.rows, judged.set
            ));
        }
    }
}

/// What every rank ends with.
#[derive(Default)]
struct Outcome {
    /// As the record has them.
    parameters: Map<String, Value>,
    /// What picks the targets that are left.
    selection: Option<TargetSelection>,
    delta: TargetTensors,
    /// What computed, as on a command line.
    device: String,
    steps: Vec<StepRecord>,
    seconds: Vec<f64>,
    radii: Vec<RadiusPoint>,
    results: Vec<(&'static str, f64)>,
    search: Option<SearchOutcome>,
}

impl Found {
    /// The tensors of the perturbation.
    pub(super) fn deltas(&self) -> Vec<DeltaTensor<'_>> {
        self.targets
            .iter()
            .zip(self.delta.iter())
            .filter_map(|((name, shape), values)| DeltaTensor::new(name, shape, values))
            .collect()
    }

    /// The perturbation in a report.
    pub(super) fn to_json(&self) -> Value {
        json!({
            "method": self.record.method,
            "parameters": self.record.parameters,
            "seed": self.record.seed,
            "tensors": self.targets.len(),
            "elements": self.delta.elements(),
            "norm": self.delta.norm(),
        })
    }

    /// The processes that shared the work, where there were several, and what that took on the first: bytes of gradients that were
    /// summed, seconds in sums, and seconds until the others had come as far.
    pub(super) fn ranks_json(&self) -> Option<Value> {
        (self.ranks > 1).then(|| {
            json!({
                "size": self.ranks,
                "summed_bytes": self.cost.bytes,
                "summing_seconds": self.cost.summing.as_secs_f64(),
                "waiting_seconds": self.cost.waiting.as_secs_f64(),
            })
        })
    }

    /// The search in a report: every trial with its points, the front, what was chosen, and the rows that decided.
    pub(super) fn search_json(&self) -> Option<Value> {
        let found = self.search.as_ref()?;
        let judged: Vec<Value> = found
            .judged
            .iter()
            .map(|it| json!({"set": it.set.to_string(), "rows": it.rows, "apart": it.apart}))
            .collect();
        Some(json!({
            "trials": found.trials,
            "front": found.front,
            "chosen": found.chosen,
            "judged": judged,
        }))
    }

    /// The steps in a report, those of this process with their seconds.
    pub(super) fn steps_json(&self) -> Vec<Value> {
        let resumed = self.steps.len().saturating_sub(self.seconds.len());
        self.steps
            .iter()
            .enumerate()
            .map(|(place, step)| {
                let mut step = json!(step);
                if let Some(seconds) = place.checked_sub(resumed).map(|it| self.seconds[it]) {
                    step["seconds"] = json!(seconds);
                }
                step
            })
            .collect()
    }
}

/// Reads a `config.json`.
///
/// # Errors
/// When it cannot be read or is refused.
pub(super) fn read_config(path: &Path) -> Result<Config, Failure> {
    let text = std::fs::read_to_string(path)
        .map_err(|error| Failure::from(FormatError::new(path, error)))?;
    Config::parse(&text).map_err(|error| Failure::of_config(path, &error))
}

fn encode(encoder: &Encoder, sets: &Sets, used: &[(Set, DataSource)]) -> Result<Rows, Failure> {
    let mut rows = Rows::default();
    for (set, source) in used {
        let examples = match set {
            Set::Harmful => &sets.harmful.rows,
            Set::Benign => &sets.benign.rows,
            Set::Refusals => &sets.refusals.rows,
            Set::Task => match &sets.task {
                Some(task) => &task.rows,
                None => continue,
            },
        };
        let encoded: Vec<EncodedRow> = encoder.encode(examples).map_err(|error| {
            let error_text = format!("the {set} rows of `{}` cannot be used", shown(&source.name));
            Failure {
                error: error_text,
                ..Failure::from(error)
            }
        })?;
        match set {
            Set::Harmful => rows.harmful = encoded,
            Set::Benign => rows.benign = encoded,
            Set::Refusals => rows.refusals = encoded,
            Set::Task => rows.task = encoded,
        }
    }
    Ok(rows)
}

/// The path of a side file that is needed.
///
/// # Errors
/// When there is none.
pub(super) fn required_side_file(checkpoint: &Checkpoint, name: &str) -> Result<PathBuf, Failure> {
    checkpoint.side_file(name).ok_or_else(|| {
        Failure::new(Exit::Refused, format!("there is no `{name}`"))
            .because(looked_in(checkpoint))
            .hint(format!(
                "put the model's `{name}` there; without it, a perturbation can still be loaded with --perturbation, \
                 or drawn with --method random --rho NUMBER"
            ))
    })
}

/// The files besides weights that decide the result.
pub(super) fn side_inputs(config: &Path, files: &TokenizerFiles) -> Vec<PathBuf> {
    let mut paths: Vec<PathBuf> = files.files().chain([config]).map(Path::to_owned).collect();
    paths.sort();
    paths
}

fn not_patchable(problems: &Problems<BaseProblem>) -> Failure {
    Failure::doing(Exit::Refused, "the targets cannot be patched", problems)
}
