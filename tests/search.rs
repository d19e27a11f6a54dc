//! Searches over settings of the adaptive method, on the small chat model.
//!
//! What a search promises: the trials of an interrupted one are the first of the whole one's, the same bits come of any number of threads,
//! only what a trial touches is moved, and the chosen point is no worse than what the default settings reach within the same budget.

use panacea_formats::Checkpoint;
use panacea_patch::data::{DataPath, Encoder, SetPaths, Sets, TemplateChoice, TokenizerFiles};
use panacea_patch::model::{Config, Decoder, TargetSelection};
use panacea_patch::optimize::{
    Adaptive, Budget, Observer, OptimizeError, Radius, Region, Rows, SearchOutcome, SearchSettings,
    Space, State, StepRecord, Trial, TrialPoint, Unobserved, search,
};

#[expect(dead_code, reason = "the decoder's own tests use the rest")]
mod common;

/// The small chat model and its rows.
struct Chat {
    checkpoint: Checkpoint,
    config: Config,
    rows: Rows,
}

impl Chat {
    fn open() -> Self {
        let testdata = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("testdata");
        let directory = testdata.join("tiny-chat");
        let text = std::fs::read_to_string(directory.join("config.json")).expect("a config");
        let config = Config::parse(&text).expect("a supported config");
        let path = |name: &str| {
            let path = testdata.join("tiny-chat-data").join(name);
            path.display().to_string().parse::<DataPath>().ok()
        };
        let sets = Sets::open(&SetPaths {
            harmful: path("harmful.jsonl"),
            task: path("task.jsonl"),
            benign: path("benign.jsonl"),
            refusals: None,
        })
        .expect("rows");
        let files = TokenizerFiles::in_directory(&directory).expect("a tokenizer");
        let encoder = Encoder::open(&files, TemplateChoice::Auto, 256, config.vocab_size)
            .expect("an encoder");
        // As many as a search divides, and no more.
        let encode = |rows: &[_]| encoder.encode(&rows[..40]).expect("tokens");
        let rows = Rows {
            harmful: encode(&sets.harmful.rows),
            refusals: encode(&sets.refusals.rows),
            task: sets.task.map(|task| encode(&task.rows)).unwrap_or_default(),
            benign: encode(&sets.benign.rows),
        };
        Self {
            checkpoint: Checkpoint::open(&directory).expect("a checkpoint"),
            config,
            rows,
        }
    }

    fn decoder(&self) -> Decoder<'_> {
        let selection: TargetSelection = "q_proj,k_proj,v_proj,o_proj".parse().expect("names");
        Decoder::new(self.config.clone(), self.checkpoint.tensors(), &selection).expect("a decoder")
    }

    fn search(
        &self,
        settings: &SearchSettings,
        resumed: Vec<Trial>,
        observer: &mut dyn Observer,
    ) -> Result<SearchOutcome, OptimizeError> {
        search(&mut self.decoder(), &self.rows, settings, resumed, observer)
    }

    fn settings(&self, trials: usize, seed: u64) -> SearchSettings {
        let names = ["q_proj", "k_proj", "v_proj"];
        let base = Adaptive {
            touches: Region {
                modules: Some(names.map(str::to_owned).into()),
                ..Region::default()
            },
            batch: 8,
            steps: 4,
            repair_steps: 1,
            seed,
            ..Adaptive::default()
        };
        SearchSettings {
            space: Space::of(&base, self.decoder().targets()),
            base,
            budget: Budget::default(),
            trials,
        }
    }
}

fn chosen(found: &SearchOutcome) -> TrialPoint {
    found.trials[found.chosen.trial].points[found.chosen.point]
}

fn result(found: &SearchOutcome, name: &str) -> f64 {
    let mut results = found.outcome.results.iter();
    results.find(|(known, _)| *known == name).expect(name).1
}

/// Keeps trials, and asks to stop after some of them.
struct StopAfter {
    after: usize,
    trials: Vec<Trial>,
}

impl Observer for StopAfter {
    fn progress(&mut self, _what: &str, _done: usize, _total: usize) {}
    fn step(&mut self, _record: &StepRecord) {}
    fn state(&mut self, _state: &State<'_>) {}
    fn trial(&mut self, number: usize, trial: &Trial) {
        assert_eq!(number, self.trials.len());
        self.trials.push(trial.clone());
    }
    fn interrupted(&self) -> bool {
        self.trials.len() >= self.after
    }
}

#[test]
fn a_resumed_search_ends_with_the_same_bits_on_any_number_of_threads() {
    let chat = Chat::open();
    let settings = chat.settings(4, 1);
    let whole = chat
        .search(&settings, Vec::new(), &mut Unobserved)
        .expect("an outcome");
    assert_eq!(whole.trials.len(), 4);
    for after in [1, 3, 4] {
        let mut stop = StopAfter {
            after,
            trials: Vec::new(),
        };
        let stopped = chat.search(&settings, Vec::new(), &mut stop);
        assert!(
            matches!(stopped, Err(OptimizeError::Interrupted)),
            "{after}"
        );
        assert_eq!(stop.trials, whole.trials[..after]);
        let pool = rayon::ThreadPoolBuilder::new()
            .num_threads(after)
            .build()
            .expect("a pool");
        let resumed = pool
            .install(|| chat.search(&settings, stop.trials, &mut Unobserved))
            .expect("an outcome");
        assert_eq!(whole.outcome.delta, resumed.outcome.delta, "{after}");
        assert_eq!(whole.outcome.results, resumed.outcome.results);
        assert_eq!(whole.outcome.steps, resumed.outcome.steps);
        assert_eq!(whole.trials, resumed.trials);
        assert_eq!(
            (whole.chosen, &whole.front),
            (resumed.chosen, &resumed.front)
        );
    }

    // Of another seed or space they would not have been tried.
    for other in [chat.settings(4, 2), {
        let settings = chat.settings(4, 1);
        let space = settings.space.clone().without(&["alpha"]);
        SearchSettings { space, ..settings }
    }] {
        let refused = chat.search(&other, whole.trials.clone(), &mut Unobserved);
        assert!(matches!(refused, Err(OptimizeError::State)));
    }
}

#[test]
fn the_chosen_point_is_as_good_as_the_default_settings_own() {
    let chat = Chat::open();
    for seed in 0..2 {
        let settings = chat.settings(3, seed);
        let budget = settings.budget;
        let alone = SearchSettings {
            trials: 1,
            ..settings.clone()
        };
        let defaults = chat
            .search(&alone, Vec::new(), &mut Unobserved)
            .expect("an outcome");
        let found = chat
            .search(&settings, Vec::new(), &mut Unobserved)
            .expect("an outcome");
        let (ours, theirs) = (chosen(&found), chosen(&defaults));
        assert!(ours.keeps_to(budget) && theirs.keeps_to(budget));
        assert!(ours.compare_harm(&theirs).is_le(), "{ours:?}, {theirs:?}");
        // Of the first trial there is at least what a run without a search ends with.
        assert_eq!(found.trials[0], defaults.trials[0]);
        // What the trial said is true of what is handed over.
        assert!((result(&found, "delta_norm") / ours.rho - 1.0).abs() < 1e-5);
        assert!((result(&found, "kl") / ours.kl - 1.0).abs() < 1e-3);
        assert_eq!(result(&found, "refusing_after"), 1.0 - ours.unrefused);
        assert_eq!(result(&found, "held_back"), 10.0);
    }
}

#[test]
fn only_what_the_chosen_trial_touches_is_moved() {
    let chat = Chat::open();
    let mut settings = chat.settings(1, 0);
    settings.base.touches.blocks = Some((1, 2));
    settings.base.touches.modules = Some(vec!["v_proj".to_owned()]);
    settings.space = Space::of(&settings.base, chat.decoder().targets());
    let found = chat
        .search(&settings, Vec::new(), &mut Unobserved)
        .expect("an outcome");
    let norms = found.outcome.delta.norms();
    let decoder = chat.decoder();
    for (target, norm) in decoder.targets().iter().zip(&norms) {
        let touched = target.name.contains("v_proj") && (1..=2).contains(&target.block);
        assert_eq!(*norm > 0.0, touched, "{}", target.name);
    }
}

#[test]
fn a_radius_that_is_given_is_the_only_one() {
    let chat = Chat::open();
    let mut settings = chat.settings(2, 0);
    settings.base.rho = Radius::Fixed(0.2);
    let found = chat
        .search(&settings, Vec::new(), &mut Unobserved)
        .expect("an outcome");
    for trial in &found.trials {
        assert_eq!(trial.points.len(), 1);
        assert!(trial.points[0].rho <= 0.2 * (1.0 + 1e-6));
    }
}

#[test]
fn a_budget_that_nothing_keeps_to_is_told_with_what_came_nearest() {
    let chat = Chat::open();
    let mut settings = chat.settings(1, 0);
    settings.budget = Budget {
        kl: 1e-9,
        task: 0.1,
    };
    let refused = chat.search(&settings, Vec::new(), &mut Unobserved);
    let Err(error @ OptimizeError::NoTrial { trials: 1, .. }) = refused else {
        panic!("{refused:?}");
    };
    let said = error.to_string();
    assert!(
        said.starts_with("none of 1 trials keeps to the budget: at radius"),
        "{said}"
    );
}

/// As the defaults' own search for a radius has it, on the same rows: not a grid that could miss it.
#[test]
fn radii_end_close_to_the_budget() {
    let chat = Chat::open();
    let mut settings = chat.settings(1, 0);
    settings.budget = Budget {
        kl: 0.002,
        task: 10.0,
    };
    let found = chat
        .search(&settings, Vec::new(), &mut Unobserved)
        .expect("an outcome");
    let kl = chosen(&found).kl;
    assert!(
        kl <= 0.002 && kl > 0.5 * 0.002,
        "{:?}",
        found.trials[0].points
    );
}
