//! The command line resolved: every setting has a value, and no flag was passed over.
//!
//! In: flags as given. Out: the settings of the stages, or a refusal that says which method a flag belongs to. A run that ignored
//! a flag would be a different run than the user believes.

use std::path::PathBuf;

use panacea_formats::{DataSource, Space};
use panacea_patch::apply::{ApplySettings, LEAST_REALIZED, Rounding};
use panacea_patch::data::{SetPaths, Sets, Source, TemplateChoice};
use panacea_patch::model::{Target, TargetSelection};
use panacea_patch::optimize::{
    Adaptive, Budget, FinalEps, Panacea, Part, Radius, Random, SearchOutcome, SearchSettings, Set,
    Settings, Space as SettingsSpace,
};
use serde_json::{Map, Value, json};

use super::args::{
    AdditionArgs, DataArgs, DeviceArg, FinalEpsName, GgufArgs, MethodArgs, MethodName, PartName,
    PatchArgs, RhoArg, RoundingName, first_given,
};
use super::error::Failure;
use super::model::Model;

/// How a perturbation is to be found.
#[derive(Clone, Debug)]
pub(super) struct Search {
    pub(super) settings: Settings,
    /// What is perturbed.
    space: Space,
    /// As asked for: without it, the paper's projections, or every module of an adapter.
    targets: Option<TargetSelection>,
    weight_decay: Option<f64>,
    pub(super) paths: SetPaths,
    pub(super) template: TemplateChoice,
    pub(super) max_length: usize,
    pub(super) seed: u64,
    /// Of `--search`.
    pub(super) trials: Option<Trials>,
}

/// `--search`: settings are tried.
#[derive(Clone, Debug)]
pub(super) struct Trials {
    /// How many.
    pub(super) count: usize,
    /// What may be spent.
    budget: Budget,
    /// What was given, and so is not varied.
    fixed: Vec<&'static str>,
}

impl Search {
    /// Gives every setting its value. `evaluates` tells whether rows become text in any case.
    ///
    /// # Errors
    /// A usage error when a flag was given that the method does not use.
    pub(super) fn resolve(
        method: &MethodArgs,
        data: &DataArgs,
        evaluates: bool,
    ) -> Result<Self, Failure> {
        let name = method.method.unwrap_or(MethodName::Adaptive);
        refuse_flags_of_other_methods(name, method)?;
        let seed = method.seed.unwrap_or(0);
        let settings = match name {
            MethodName::Adaptive => Settings::Adaptive(adaptive(method, seed)?),
            MethodName::Panacea => Settings::Panacea(panacea(method, data.task.is_some())),
            MethodName::Random => Settings::Random(Random {
                rho: radius(method, RhoArg::Auto),
                seed,
            }),
        };
        let search = Self {
            settings,
            space: Space::Weights,
            targets: method.targets.clone(),
            weight_decay: method.weight_decay,
            paths: SetPaths {
                harmful: data.harmful.clone(),
                task: data.task.clone(),
                benign: data.benign.clone(),
                refusals: data.refusals.clone(),
            },
            template: data.template.unwrap_or_default(),
            max_length: data.max_length.map_or(256, |length| length as usize),
            seed,
            trials: method.search.map(|count| Trials {
                count,
                budget: budget(method),
                fixed: fixed(method),
            }),
        };
        search.refuse_missing_task()?;
        search.refuse_unused_budgets(method)?;
        search.refuse_unused_data(data, evaluates)?;
        Ok(search)
    }

    /// The same for a model whose perturbations are of `space`, which decides some defaults.
    pub(super) fn in_space(mut self, space: Space) -> Self {
        self.space = space;
        if let Settings::Panacea(panacea) = &mut self.settings {
            let default = match space {
                Space::Adapter => PAPER_WEIGHT_DECAY,
                _ => Panacea::default().weight_decay,
            };
            panacea.weight_decay = self.weight_decay.unwrap_or(default);
        }
        self
    }

    /// Which modules are targets; nothing is every module of an adapter.
    pub(super) fn selection(&self) -> Option<TargetSelection> {
        match (self.space, &self.targets, &self.trials) {
            (Space::Adapter, targets, _) => targets.clone(),
            (_, None, Some(_)) => SEARCHED.parse().ok(),
            (_, targets, _) => Some(targets.clone().unwrap_or_default()),
        }
    }

    /// How to search a model with `targets`, where that was asked for.
    pub(super) fn trial_settings(&self, targets: &[Target]) -> Option<SearchSettings> {
        let (Some(trials), Settings::Adaptive(base)) = (&self.trials, &self.settings) else {
            return None;
        };
        let mut base = base.clone();
        if self.space != Space::Adapter && self.targets.is_none() {
            // What is perturbed without a search.
            let names = TargetSelection::default().to_string();
            base.touches.modules = Some(names.split(',').map(str::to_owned).collect());
        }
        Some(SearchSettings {
            space: SettingsSpace::of(&base, targets).without(&trials.fixed),
            base,
            budget: trials.budget,
            trials: trials.count,
        })
    }

    /// As [`Self::parameters`], with the settings that a search chose.
    pub(super) fn chosen_parameters(&self, found: &SearchOutcome) -> Map<String, Value> {
        let chosen = Self {
            settings: Settings::Adaptive(found.settings.clone()),
            ..self.clone()
        };
        let mut parameters = chosen.parameters();
        let Adaptive {
            gain,
            learning_share,
            affinity,
            order,
            touches,
            ..
        } = &found.settings;
        for (name, value) in [
            ("affinity", json!(affinity)),
            ("gain", json!(gain)),
            ("learning_share", json!(learning_share)),
            ("order", json!(order)),
            ("rho", json!(found.point(found.chosen).rho)),
            ("search", json!(found.trials.len())),
        ] {
            parameters.insert(name.to_owned(), value);
        }
        if let Some((first, last)) = touches.blocks {
            parameters.insert("blocks".to_owned(), json!([first, last]));
        }
        if let Some(modules) = &touches.modules {
            parameters.insert("targets".to_owned(), json!(modules.join(",")));
        }
        parameters
    }

    /// The method's name, as records have it.
    pub(super) fn method(&self) -> &'static str {
        match self.settings {
            Settings::Adaptive(_) => "adaptive",
            Settings::Panacea(_) => "panacea",
            Settings::Random(_) => "random",
        }
    }

    fn radius(&self) -> Radius {
        match &self.settings {
            Settings::Adaptive(adaptive) => adaptive.rho,
            Settings::Panacea(panacea) => panacea.rho,
            Settings::Random(random) => random.rho,
        }
    }

    /// Whether the model has to be computed, which takes its config and its tokenizer.
    pub(super) fn computes(&self) -> bool {
        !matches!(
            self.settings,
            Settings::Random(Random {
                rho: Radius::Fixed(_),
                ..
            })
        )
    }

    /// Whether the rows of `set` change the result.
    pub(super) fn uses(&self, set: Set) -> bool {
        let auto = matches!(self.radius(), Radius::Auto(_));
        match (&self.settings, set) {
            (Settings::Adaptive(_), _) => true,
            (Settings::Panacea(_), Set::Harmful) => true,
            (Settings::Panacea(panacea), Set::Task) => auto || panacea.steps > 0,
            (_, Set::Benign | Set::Task) => auto,
            _ => false,
        }
    }

    /// The user's own files among the data sets.
    pub(super) fn data_files(&self) -> Vec<PathBuf> {
        let paths = &self.paths;
        [&paths.harmful, &paths.task, &paths.benign, &paths.refusals]
            .into_iter()
            .flatten()
            .map(|path| path.path().to_owned())
            .collect()
    }

    /// The settings that change the perturbation, as records have them.
    pub(super) fn parameters(&self) -> Map<String, Value> {
        let mut parameters = match &self.settings {
            Settings::Adaptive(adaptive) => json!({
                "aim": adaptive.aim,
                "alpha": adaptive.alpha,
                "batch": adaptive.batch,
                "cap": adaptive.cap,
                "first_tokens": adaptive.first_tokens,
                "guard_share": adaptive.guard_share,
                "repair_length": adaptive.repair_length,
                "repair_steps": adaptive.repair_steps,
                "step_length": adaptive.step_length.map_or(json!("auto"), Value::from),
                "steps": adaptive.steps,
            }),
            Settings::Panacea(panacea) => json!({
                "batch": panacea.batch,
                "final_eps": match panacea.final_eps {
                    FinalEps::Whole => "whole",
                    FinalEps::LastBatch => "last-batch",
                },
                "lambda": panacea.lambda,
                "lr": panacea.lr,
                "part": match panacea.part {
                    Part::Sum => "sum",
                    Part::Eps => "eps",
                    Part::Drift => "drift",
                },
                "steps": panacea.steps,
                "weight_decay": panacea.weight_decay,
            }),
            Settings::Random(_) => json!({}),
        };
        match self.radius() {
            Radius::Fixed(rho) => parameters["rho"] = json!(rho),
            Radius::Auto(_) => parameters["rho"] = json!("auto"),
        }
        let budget = match (self.radius(), &self.trials) {
            (Radius::Auto(budget), _) => Some(budget),
            (Radius::Fixed(_), trials) => trials.as_ref().map(|trials| trials.budget),
        };
        if let Some(budget) = budget {
            parameters["kl_budget"] = json!(budget.kl);
            parameters["task_budget"] = json!(budget.task);
        }
        let selection = self.selection();
        parameters["targets"] =
            json!(selection.map_or_else(|| "all".to_owned(), |it| it.to_string()));
        if self.computes() {
            parameters["template"] = json!(self.template.to_string());
            parameters["max_length"] = json!(self.max_length);
        }
        match parameters {
            Value::Object(parameters) => parameters,
            _ => Map::new(),
        }
    }

    fn refuse_missing_task(&self) -> Result<(), Failure> {
        match &self.settings {
            Settings::Panacea(panacea) if panacea.steps > 0 && self.paths.task.is_none() => {
                Err(Failure::usage("`--steps` needs a task set with `--method panacea`")
                    .because("its outer steps descend the loss of the data that the model was fine-tuned on")
                    .hint("give rows with --task, or leave out `--steps` for eps alone"))
            }
            _ => Ok(()),
        }
    }

    fn refuse_unused_budgets(&self, method: &MethodArgs) -> Result<(), Failure> {
        let (Radius::Fixed(rho), None) = (self.radius(), &self.trials) else {
            return Ok(());
        };
        let budgets = [
            ("--kl-budget", method.kl_budget.is_some()),
            ("--task-budget", method.task_budget.is_some()),
        ];
        match first_given(budgets) {
            None => Ok(()),
            Some(flag) => Err(Failure::no_effect(flag, "with a fixed rho")
                .because(format!("rho is {rho}, so no radius is searched for"))
                .hint(format!("pass `--rho auto`, or leave out `{flag}`"))),
        }
    }

    fn refuse_unused_data(&self, data: &DataArgs, evaluates: bool) -> Result<(), Failure> {
        let on_run = format!("on this run of method `{}`", self.method());
        for (flag, set, given) in [
            ("--harmful", Set::Harmful, data.harmful.is_some()),
            ("--task", Set::Task, data.task.is_some()),
            ("--benign", Set::Benign, data.benign.is_some()),
            ("--refusals", Set::Refusals, data.refusals.is_some()),
        ] {
            if given && !self.uses(set) {
                return Err(Failure::no_effect(flag, &on_run)
                    .because(format!("with these settings it reads no {set} rows"))
                    .hint(format!("leave out `{flag}`, or use `--method adaptive`")));
            }
        }
        let of_rows = [
            ("--template", data.template.is_some() && !evaluates),
            ("--max-length", data.max_length.is_some()),
        ];
        match first_given(of_rows).filter(|_| !self.computes()) {
            None => Ok(()),
            Some(flag) => Err(Failure::no_effect(flag, &on_run)
                .because("with a fixed rho it reads no rows")
                .hint(format!("leave out `{flag}`"))),
        }
    }
}

/// Refuses flags of a search where the perturbation comes from a file.
///
/// # Errors
/// A usage error naming the first of them.
pub(super) fn refuse_search_flags(args: &PatchArgs, evaluates: bool) -> Result<(), Failure> {
    let (data, method, work) = (&args.data, &args.method, &args.work);
    let nearest = args.addition.rounding == Some(RoundingName::Nearest);
    let flags = [
        ("--harmful", data.harmful.is_some()),
        ("--task", data.task.is_some()),
        ("--benign", data.benign.is_some()),
        ("--refusals", data.refusals.is_some()),
        ("--template", data.template.is_some() && !evaluates),
        ("--max-length", data.max_length.is_some()),
        ("--method", method.method.is_some()),
        ("--rho", method.rho.is_some()),
        ("--targets", method.targets.is_some()),
        ("--kl-budget", method.kl_budget.is_some()),
        ("--task-budget", method.task_budget.is_some()),
        ("--seed", method.seed.is_some() && nearest),
        (
            "--device",
            matches!(args.run.device, Some(DeviceArg::Devices(_))),
        ),
        ("--recompute", work.recompute),
        ("--memory", work.memory.is_some()),
        ("--resume", work.resume),
        ("--state-every", work.state_every.is_some()),
    ];
    let of_methods = method_flags(method).map(|(flag, given, _)| (flag, given));
    match first_given(flags.into_iter().chain(of_methods)) {
        None => Ok(()),
        Some(flag) => Err(Failure::no_effect(flag, "with `--perturbation`")
            .because("a perturbation that is loaded from a file is not searched for")
            .hint(format!("leave out `{flag}` or `--perturbation`"))),
    }
}

/// How the perturbation is to be added. `seed` is that of stochastic rounding.
pub(super) fn addition(args: &AdditionArgs, seed: u64) -> ApplySettings {
    ApplySettings {
        patched_type: args.patched_type,
        least_realized: args.min_realized.unwrap_or(LEAST_REALIZED),
        strength: args.strength.unwrap_or_default(),
        rounding: match args.rounding {
            Some(RoundingName::Stochastic) | None => Rounding::Stochastic { seed },
            Some(RoundingName::Nearest) => Rounding::Nearest,
        },
    }
}

/// Refuses settings of the addition that only a GGUF file has a use for, when `model` is none.
///
/// # Errors
/// A usage error naming the first of them.
pub(super) fn check_addition(
    args: &AdditionArgs,
    gguf: &GgufArgs,
    model: &Model,
) -> Result<(), Failure> {
    let flags = [
        (
            "--patched-type",
            args.patched_type.is_some() && gguf.gguf.is_none(),
        ),
        ("--min-realized", args.min_realized.is_some()),
    ];
    let given = first_given(flags);
    match given.filter(|_| !model.checkpoint.layout().is_gguf()) {
        None => Ok(()),
        Some(flag) => Err(Failure::no_effect(flag, "here")
            .because(format!(
                "`{}` is no GGUF file, and its tensors keep their type",
                model.checkpoint.path().display()
            ))
            .hint(format!("leave out `{flag}`"))),
    }
}

/// The settings of the addition that change bytes, as manifests have them.
pub(super) fn addition_parameters(settings: ApplySettings, model: &Model) -> Map<String, Value> {
    let mut parameters = Map::new();
    if model.merges() {
        parameters.insert("merge".to_owned(), json!(true));
    }
    parameters.insert("strength".to_owned(), json!(settings.strength.value()));
    let rounding = match settings.rounding {
        Rounding::Stochastic { seed } => {
            parameters.insert("rounding_seed".to_owned(), json!(seed));
            "stochastic"
        }
        _ => "nearest",
    };
    parameters.insert("rounding".to_owned(), json!(rounding));
    if let Some(dtype) = settings.patched_type {
        parameters.insert("patched_type".to_owned(), json!(dtype.name()));
    }
    parameters
}

/// Each flag that not every method uses, whether it was given, and the methods that use it.
fn method_flags(args: &MethodArgs) -> [(&'static str, bool, &'static [MethodName]); 12] {
    const ADAPTIVE: &[MethodName] = &[MethodName::Adaptive];
    const PANACEA: &[MethodName] = &[MethodName::Panacea];
    const BOTH: &[MethodName] = &[MethodName::Adaptive, MethodName::Panacea];
    [
        ("--lambda", args.lambda.is_some(), PANACEA),
        ("--lr", args.lr.is_some(), PANACEA),
        ("--weight-decay", args.weight_decay.is_some(), PANACEA),
        ("--final-eps", args.final_eps.is_some(), PANACEA),
        ("--part", args.part.is_some(), PANACEA),
        ("--steps", args.steps.is_some(), BOTH),
        ("--batch", args.batch.is_some(), BOTH),
        ("--alpha", args.alpha.is_some(), ADAPTIVE),
        ("--cap", args.cap.is_some(), ADAPTIVE),
        ("--step-length", args.step_length.is_some(), ADAPTIVE),
        ("--repair-steps", args.repair_steps.is_some(), ADAPTIVE),
        ("--search", args.search.is_some(), ADAPTIVE),
    ]
}

fn refuse_flags_of_other_methods(method: MethodName, args: &MethodArgs) -> Result<(), Failure> {
    let spelled = |method: &MethodName| match method {
        MethodName::Adaptive => "`--method adaptive`",
        MethodName::Panacea => "`--method panacea`",
        MethodName::Random => "`--method random`",
    };
    for (flag, given, used_by) in method_flags(args) {
        if given && !used_by.contains(&method) {
            let users: Vec<&str> = used_by.iter().map(spelled).collect();
            let users = users.join(" and ");
            return Err(
                Failure::no_effect(flag, &format!("with {}", spelled(&method)))
                    .because(format!("it belongs to {users}"))
                    .hint(format!(
                        "leave out `{flag}`, or pass {}",
                        spelled(&used_by[0])
                    )),
            );
        }
    }
    Ok(())
}

fn radius(args: &MethodArgs, default: RhoArg) -> Radius {
    match args.rho.unwrap_or(default) {
        RhoArg::Fixed(rho) => Radius::Fixed(rho),
        RhoArg::Auto => Radius::Auto(budget(args)),
    }
}

fn budget(args: &MethodArgs) -> Budget {
    let default = Budget::default();
    Budget {
        kl: args.kl_budget.unwrap_or(default.kl),
        task: args.task_budget.unwrap_or(default.task),
    }
}

/// What flags take out of a search, by its name in the space.
fn fixed(args: &MethodArgs) -> Vec<&'static str> {
    let flags = [
        ("alpha", args.alpha.is_some()),
        ("cap", args.cap.is_some()),
        ("gain", args.step_length.is_some()),
        ("steps", args.steps.is_some()),
        ("repair_steps", args.repair_steps.is_some()),
        ("modules", args.targets.is_some()),
    ];
    let given = flags.into_iter().filter(|(_, given)| *given);
    given.map(|(name, _)| name).collect()
}

fn adaptive(args: &MethodArgs, seed: u64) -> Result<Adaptive, Failure> {
    let default = Adaptive::default();
    let steps = args.steps.unwrap_or(default.steps);
    if steps == 0 {
        return Err(
            Failure::usage("`--steps 0` leaves `--method adaptive` nothing to do")
                .because("its perturbation is made of steps")
                .hint(
                    "pass a number of 1 or above, or `--method panacea`, whose eps needs no step",
                ),
        );
    }
    Ok(Adaptive {
        rho: radius(args, RhoArg::Auto),
        alpha: args.alpha.unwrap_or(default.alpha),
        cap: args.cap.unwrap_or(default.cap),
        step_length: args.step_length.or(default.step_length),
        steps,
        batch: args.batch.unwrap_or(default.batch),
        repair_steps: args.repair_steps.unwrap_or(default.repair_steps),
        seed,
        ..default
    })
}

fn panacea(args: &MethodArgs, has_task: bool) -> Panacea {
    let default = Panacea::default();
    let steps = match has_task {
        true => STEPS_WITH_TASK,
        false => default.steps,
    };
    Panacea {
        rho: radius(args, RhoArg::Fixed(PAPER_RHO)),
        lambda: args.lambda.unwrap_or(default.lambda),
        lr: args.lr.unwrap_or(default.lr),
        weight_decay: args.weight_decay.unwrap_or(default.weight_decay),
        steps: args.steps.unwrap_or(steps),
        batch: args.batch.unwrap_or(default.batch),
        final_eps: match args.final_eps {
            Some(FinalEpsName::LastBatch) => FinalEps::LastBatch,
            Some(FinalEpsName::Whole) | None => FinalEps::Whole,
        },
        part: match args.part {
            Some(PartName::Eps) => Part::Eps,
            Some(PartName::Drift) => Part::Drift,
            Some(PartName::Sum) | None => Part::Sum,
        },
    }
}

/// The data sets that the run uses, in the order of records.
pub(super) fn used_sets(search: &Search, sets: &Sets) -> Vec<(Set, DataSource)> {
    [
        (Set::Harmful, "harmful", Some(&sets.harmful)),
        (Set::Task, "task", sets.task.as_ref()),
        (Set::Benign, "benign", Some(&sets.benign)),
        (Set::Refusals, "refusals", Some(&sets.refusals)),
    ]
    .into_iter()
    .filter(|(set, ..)| search.uses(*set))
    .filter_map(|(set, role, found)| {
        let found = found?;
        let source = DataSource {
            role: role.to_owned(),
            name: name_without_folders(&found.source),
            sha256: found.sha256,
            rows: found.rows.len(),
        };
        Some((set, source))
    })
    .collect()
}

/// The name of a data set: the file's, with its filter, without its folders.
pub(super) fn name_without_folders(source: &Source) -> String {
    match source {
        Source::BuiltIn(_) => source.to_string(),
        Source::File(path) => {
            let whole = path.to_string();
            let filter = whole
                .strip_prefix(&path.path().display().to_string())
                .unwrap_or_default();
            let name = path.path().file_name().unwrap_or_default();
            format!("{}{filter}", name.to_string_lossy())
        }
    }
}

/// The targets that a search chooses among.
const SEARCHED: &str = "q_proj,k_proj,v_proj,qkv_proj,o_proj";

/// Outer steps of the paper's method where there is a task set to take them on.
const STEPS_WITH_TASK: usize = 20;

/// The paper's `eps_rho`, chosen for LoRA matrices.
const PAPER_RHO: f64 = 1.0;

/// The reference code's, for LoRA matrices, which start near zero. Finished weights do not.
const PAPER_WEIGHT_DECAY: f64 = 0.1;

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::super::args::Cli;
    use super::*;

    fn resolve(flags: &str) -> Result<Search, Failure> {
        let words = ["panacea-patch", "m"]
            .into_iter()
            .chain(flags.split_whitespace());
        let patch = Cli::parse_from(words).patch;
        Search::resolve(&patch.method, &patch.data, false)
    }

    #[test]
    fn defaults_depend_on_the_method_and_the_task_set() {
        let adaptive = resolve("").unwrap();
        assert_eq!(adaptive.settings, Settings::Adaptive(Adaptive::default()));
        assert!(matches!(
            resolve("--method panacea").unwrap().settings,
            Settings::Panacea(Panacea { steps: 0, rho: Radius::Fixed(rho), .. }) if rho == 1.0
        ));
        assert!(matches!(
            resolve("--method panacea --task t").unwrap().settings,
            Settings::Panacea(Panacea { steps: 20, .. })
        ));
    }

    #[test]
    fn an_adapter_has_the_papers_weight_decay_and_all_its_modules_as_targets() {
        let decay = |flags: &str, space| match resolve(flags).unwrap().in_space(space).settings {
            Settings::Panacea(panacea) => panacea.weight_decay,
            other => panic!("{other:?}"),
        };
        assert_eq!(decay("--method panacea", Space::Weights), 0.0);
        assert_eq!(decay("--method panacea", Space::Adapter), 0.1);
        for space in [Space::Weights, Space::Adapter] {
            assert_eq!(decay("--method panacea --weight-decay 0.3", space), 0.3);
        }
        let targets = |flags: &str, space| {
            resolve(flags).unwrap().in_space(space).parameters()["targets"].clone()
        };
        assert_eq!(
            targets("", Space::Weights),
            TargetSelection::default().to_string()
        );
        assert_eq!(targets("", Space::Adapter), "all");
        assert_eq!(targets("--targets q_proj", Space::Adapter), "q_proj");
    }

    #[test]
    fn no_flag_is_passed_over() {
        for (flags, flag, hint) in [
            ("--lambda 1", "--lambda", "--method panacea"),
            ("--weight-decay 1", "--weight-decay", "--method panacea"),
            ("--method panacea --cap 1", "--cap", "--method adaptive"),
            ("--method random --steps 1", "--steps", "--method adaptive"),
            ("--method panacea --search", "--search", "--method adaptive"),
            (
                "--method random --search 3",
                "--search",
                "--method adaptive",
            ),
            ("--rho 1 --kl-budget 1", "--kl-budget", "--rho auto"),
            (
                "--method panacea --task-budget 1",
                "--task-budget",
                "--rho auto",
            ),
            ("--method panacea --refusals r", "--refusals", "adaptive"),
            ("--method panacea --steps 0 --task t", "--task", "adaptive"),
            (
                "--method random --rho 1 --benign b",
                "--benign",
                "leave out",
            ),
            (
                "--method random --rho 1 --template raw",
                "--template",
                "leave out",
            ),
        ] {
            let failure = resolve(flags).unwrap_err();
            assert_eq!(failure.exit, super::super::error::Exit::Usage, "{flags}");
            assert!(failure.error.contains(flag), "{flags}: {failure:?}");
            assert!(failure.hint.unwrap().contains(hint), "{flags}");
        }
        assert!(resolve("--method random --benign b --template raw").is_ok());
        assert!(resolve("--method panacea --rho auto --benign b --task t --steps 0").is_ok());
    }

    #[test]
    fn flags_fix_what_a_search_would_vary() {
        let space = |flags: &str| {
            let search = resolve(flags).unwrap();
            let folder =
                std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("testdata/oracle/llama-tied");
            let checkpoint = panacea_formats::Checkpoint::open(&folder).unwrap();
            let config = super::super::find::read_config(&folder.join("config.json")).unwrap();
            let decoder = panacea_patch::model::Decoder::new(
                config,
                checkpoint.tensors(),
                &search.selection().unwrap(),
            )
            .unwrap();
            let settings = search.trial_settings(decoder.targets()).unwrap();
            (settings.space.to_string(), settings.trials)
        };
        let (all, trials) = space("--search");
        assert_eq!(trials, 16);
        assert!(
            all.contains("alpha") && all.contains("or o_proj or"),
            "{all}"
        );
        let (less, trials) = space(
            "--search 3 --alpha 2 --cap 2 --step-length 0.1 --steps 3 --repair-steps 0 --targets v_proj",
        );
        assert_eq!(trials, 3);
        let left = "guard_share 0..1, learning_share 0.25..1, affinity -1..0.25, \
                    order seeded or easiest-first, blocks 0..2";
        assert_eq!(less, left);
        // With a search, a fixed radius is held against the budgets, too.
        assert!(resolve("--search --rho 1 --kl-budget 1").is_ok());
    }

    #[test]
    fn names_of_data_sets_keep_the_filter_and_lose_the_folders() {
        let source = Source::File("/home/me/h.jsonl#is_safe=false".parse().unwrap());
        assert_eq!(name_without_folders(&source), "h.jsonl#is_safe=false");
    }
}
