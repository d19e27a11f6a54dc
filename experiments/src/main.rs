//! Attacks a model, patches it in several ways, and measures what each way does: see the README beside it.
//!
//! In: a base model, public data sets by path, a plan. Out: a folder with a file of results for each arm of each cell (task, share of
//! poison, seed), and a table of them. A run that was stopped goes on where it was: what has its file of results is not done again.
//!
//! Fine-tuning is done here with the library's engine; patches and scores are those of the program `panacea-patch`, run as a user would.

mod arms;
mod interrupt;
mod lora;
mod mix;
mod plan;
mod run;
mod table;

use std::error::Error;
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::Parser;

use arms::{Arm, Cell, Program};
use lora::Base;
use mix::Purpose;
use plan::Plan;
use run::Run;

/// What goes wrong is printed and ends the run.
pub(crate) type Failure = Box<dyn Error + Send + Sync>;

/// Attacks a model, patches it in several ways, and measures what each way does.
#[derive(Debug, Parser)]
struct Options {
    /// The base model: a Hugging Face directory.
    model: PathBuf,
    /// The folder of the data sets.
    #[arg(long)]
    data: PathBuf,
    /// Where models and results go; goes on with what is there.
    #[arg(short, long)]
    output: PathBuf,
    /// Sets and sizes [default: `public.json` beside the sources].
    #[arg(long)]
    plan: Option<PathBuf>,
    /// The program `panacea-patch` [default: beside this one].
    #[arg(long)]
    program: Option<PathBuf>,
    /// Tasks of the plan by name [default: all].
    #[arg(long, value_delimiter = ',')]
    tasks: Vec<String>,
    /// Percent of the attack's rows that are poison.
    #[arg(long, value_delimiter = ',', default_value = "0,5,10,20")]
    poison: Vec<usize>,
    /// One cell for each; the first ones, for development, are better not these.
    #[arg(long, value_delimiter = ',', default_value = "1,2,3")]
    seeds: Vec<u64>,
    /// Arms by name [default: all].
    #[arg(long, value_delimiter = ',')]
    arms: Vec<Arm>,
    /// One task, 10% poison, one seed, the arms that matter most: minutes instead of hours.
    #[arg(long)]
    quick: bool,
    /// Score on the rows that are set aside for choosing settings.
    #[arg(long)]
    develop: bool,
    /// Further flags of the adaptive arm, for choosing settings; they name its results.
    #[arg(long, allow_hyphen_values = true)]
    adaptive: Option<String>,
    /// Print the table of what is there, and do nothing else.
    #[arg(long)]
    table: bool,
}

fn main() -> ExitCode {
    let options = Options::parse();
    match interrupt::listen().and_then(|()| run(&options)) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            let causes = std::iter::successors(error.source(), |&cause| cause.source());
            let because: String = causes.map(|it| format!("\n  because: {it}")).collect();
            say(&format!("error: {error}{because}"));
            ExitCode::from(1)
        }
    }
}

fn run(options: &Options) -> Result<(), Failure> {
    let beside = Path::new(env!("CARGO_MANIFEST_DIR")).join("public.json");
    let plan = Plan::read(options.plan.as_ref().unwrap_or(&beside))?;
    if !options.table {
        let program = Program::find(options.program.as_deref())?;
        let tasks = plan.tasks_called(&options.tasks)?;
        let (tasks, poison, seeds, arms) = match options.quick {
            true => (&tasks[..1], &[10][..], &options.seeds[..1], Arm::QUICK),
            false => (
                &tasks[..],
                &options.poison[..],
                &options.seeds[..],
                Arm::ALL,
            ),
        };
        let arms = match options.arms.is_empty() {
            true => arms,
            false => &options.arms,
        };
        let base = Base::open(&options.model, plan.template()?, plan.max_length)?;
        let purpose = match options.develop {
            true => Purpose::Develop,
            false => Purpose::Report,
        };
        let mut cells = Vec::new();
        for &seed in seeds {
            for &task in tasks {
                for &poison in poison {
                    cells.push(Cell {
                        plan: &plan,
                        data: &options.data,
                        base: &base,
                        program: &program,
                        task,
                        poison,
                        seed,
                        purpose,
                        aligned: options.output.join(format!("aligned-s{seed}")),
                        folder: (options.output).join(format!("{}-p{poison}-s{seed}", task.name)),
                        adaptive: options.adaptive.as_deref(),
                    });
                }
            }
        }
        cells.iter().try_for_each(Cell::check)?;
        let run = Run {
            purpose,
            base: base.digest()?,
            plan: Plan {
                tasks: tasks.iter().copied().cloned().collect(),
                ..plan.clone()
            },
        };
        run.begin(&options.output)?;
        cells.iter().try_for_each(|cell| cell.run(arms))?;
    }
    let text = table::of(&options.output)?;
    std::fs::write(options.output.join("table.md"), &text)?;
    say(&text);
    Ok(())
}

/// Tells how far the work is.
pub(crate) fn say(text: &str) {
    let _ = writeln!(std::io::stderr().lock(), "{text}");
}
