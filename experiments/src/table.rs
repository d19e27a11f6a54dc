//! Results as tables: for each task and share of poison, a line for each arm, over its seeds, and a line for each arm beside the attacked model.
//!
//! In: the files of results in a folder. Out: Markdown. Rows of all seeds are pooled, and intervals are those of the pooled rows; what one seed
//! differs from another is in the range beside them. Two arms are compared request by request, by the library's own test.

use std::collections::BTreeMap;
use std::path::Path;

use panacea_patch::eval::compare::compare;
use panacea_patch::eval::figure::{Figure, Measure};
use panacea_patch::eval::judge::Outcome;
use panacea_patch::eval::scores::Scores;
use panacea_patch::number::four_digits;
use serde_json::Value;

use crate::arms::Arm;
use crate::{Failure, run};

/// One arm of one cell.
struct Found {
    seed: u64,
    scores: Scores,
    /// Norm of the perturbation, as it was looked for.
    norm: Option<f64>,
    seconds: Option<f64>,
}

/// Cells by task and poison, and their arms by name.
type Cells = BTreeMap<(String, u64), BTreeMap<String, Vec<Found>>>;

pub(crate) fn of(folder: &Path) -> Result<String, Failure> {
    let mut cells = Cells::new();
    for cell in run::cells(folder)? {
        for file in std::fs::read_dir(&cell)? {
            let file = file?.path();
            if file.extension().is_some_and(|it| it == "json") {
                let record: Value = serde_json::from_str(&std::fs::read_to_string(&file)?)?;
                // The manifest beside a converted model.
                if record.get("arm").is_none() {
                    continue;
                }
                let text = |key: &str| record[key].as_str().unwrap_or_default().to_owned();
                let number = |key: &str| record[key].as_u64().unwrap_or_default();
                let arms = cells.entry((text("task"), number("poison"))).or_default();
                let made = &record["made"];
                arms.entry(text("arm")).or_default().push(Found {
                    seed: number("seed"),
                    scores: serde_json::from_value(record["scores"]["scores"].clone())?,
                    norm: made["told"]["results"]["delta_norm"].as_f64(),
                    seconds: made["seconds"].as_f64(),
                });
            }
        }
    }
    let mut text = HEADER.to_owned();
    for ((task, poison), arms) in &mut cells {
        text += &format!("### {task}, {poison}% poison\n\n");
        text += "| arm | seeds | HS | HS+ | refused / complied / incoherent | over-refusal | FA | KL | norm | seconds |\n";
        text += "|---|---|---|---|---|---|---|---|---|---|\n";
        let place = |name: &str| {
            let known = Arm::ALL.iter().position(|arm| arm.name() == name);
            (known.unwrap_or(usize::MAX), name.to_owned())
        };
        let mut names: Vec<&String> = arms.keys().collect();
        names.sort_by_key(|name| place(name));
        let names: Vec<String> = names.into_iter().cloned().collect();
        for name in &names {
            if let Some(found) = arms.get_mut(name) {
                found.sort_by_key(|it| it.seed);
                text += &line(name, found);
            }
        }
        let mut pairs = String::new();
        for name in &names {
            for other in attacked(name) {
                if let (Some(before), Some(after)) = (arms.get(other), arms.get(name)) {
                    pairs += &paired(name, other, before, after);
                }
            }
        }
        if !pairs.is_empty() {
            text +=
                "\n| arm | beside | seeds | FA | HS | over-refusal |\n|---|---|---|---|---|---|\n";
            text += &pairs;
        }
        text += "\n";
    }
    Ok(text)
}

fn line(name: &str, found: &[Found]) -> String {
    let seeds: Vec<String> = found.iter().map(|it| it.seed.to_string()).collect();
    let count = |outcome| {
        found
            .iter()
            .map(|it| it.scores.count(outcome))
            .sum::<usize>()
    };
    let cells = [
        name.to_owned(),
        seeds.join(" "),
        pooled(found, Measure::Hs),
        pooled(found, Measure::HsPlus),
        format!(
            "{} / {} / {}",
            count(Outcome::Refused),
            count(Outcome::Complied),
            count(Outcome::Incoherent)
        ),
        pooled(found, Measure::OverRefusal),
        pooled(found, Measure::Fa),
        pooled(found, Measure::Kl),
        mean(found.iter().map(|it| it.norm), 3),
        mean(found.iter().map(|it| it.seconds), 0),
    ];
    format!("| {} |\n", cells.join(" | "))
}

/// The estimate over the rows of all seeds, and the least and the largest of a seed's own.
fn pooled(found: &[Found], measure: Measure) -> String {
    let figures: Vec<&Figure> = found
        .iter()
        .filter_map(|it| it.scores.figure(measure))
        .collect();
    let pooled = Figure {
        rows: figures.iter().flat_map(|it| it.rows.clone()).collect(),
        weights: figures.iter().flat_map(|it| it.weights.clone()).collect(),
        ..Figure::share(measure, [])
    };
    let Some(estimate) = pooled.estimate() else {
        return String::new();
    };
    let values = figures.iter().filter_map(|it| it.estimate());
    let values: Vec<f64> = values.map(|it| it.value).collect();
    let range = match values.len() {
        0 | 1 => String::new(),
        _ => {
            let least = values.iter().copied().fold(f64::INFINITY, f64::min);
            let largest = values.iter().copied().fold(f64::NEG_INFINITY, f64::max);
            let digits = if measure.is_share() { 1 } else { 3 };
            format!(", {least:.digits$} .. {largest:.digits$}")
        }
    };
    format!("{}{range}", estimate.written(measure))
}

fn mean(values: impl Iterator<Item = Option<f64>>, digits: usize) -> String {
    let values: Vec<f64> = values.flatten().collect();
    if values.is_empty() {
        return String::new();
    }
    #[expect(clippy::cast_precision_loss, reason = "a handful of seeds")]
    let mean = values.iter().sum::<f64>() / values.len() as f64;
    format!("{mean:.digits$}")
}

/// The attacked models that the arm `name` is held against: as it was attacked, and in the type of the arm.
fn attacked(name: &str) -> impl Iterator<Item = &'static str> {
    // What follows are flags.
    let arm = name.split(' ').next().unwrap_or_default();
    [
        ("", Arm::Attacked),
        ("q8_0", Arm::AttackedQ8),
        ("q4_k_m", Arm::AttackedQ4),
    ]
    .into_iter()
    .filter(move |(form, other)| arm.contains(form) && arm != other.name())
    .map(|(_, other)| other.name())
}

/// A line for the arm `name` beside `other`, over the seeds that both have with the same rows; nothing where there are none.
fn paired(name: &str, other: &str, before: &[Found], after: &[Found]) -> String {
    let of_seed = |seed| before.iter().find(|it| it.seed == seed);
    let seeds: Vec<(&Found, &Found)> = after
        .iter()
        .filter_map(|after| Some((of_seed(after.seed)?, after)))
        .filter(|(before, after)| {
            let match_in = |&measure| rows_match(&before.scores, &after.scores, measure);
            PAIRED.iter().all(match_in)
        })
        .collect();
    if seeds.is_empty() {
        return String::new();
    }
    let numbers: Vec<String> = seeds.iter().map(|(_, it)| it.seed.to_string()).collect();
    let mut cells = vec![name.to_owned(), other.to_owned(), numbers.join(" ")];
    cells.extend(PAIRED.map(|measure| change(&seeds, measure)));
    format!("| {} |\n", cells.join(" | "))
}

/// Whether both have as many rows of `measure`, of the same requests and by the same judge as far as both say.
fn rows_match(before: &Scores, after: &Scores, measure: Measure) -> bool {
    let same = |one: &str, other: &str| one == other || one.is_empty() || other.is_empty();
    let figures = match (before.figure(measure), after.figure(measure)) {
        (Some(one), Some(other)) => {
            same(&one.judge, &other.judge) && same(&one.asked, &other.asked)
        }
        (one, other) => one.is_none() && other.is_none(),
    };
    figures && rows(before, measure).len() == rows(after, measure).len()
}

/// How many rows of `measure` count before alone and after alone, the difference and its p.
fn change(seeds: &[(&Found, &Found)], measure: Measure) -> String {
    let pairs = seeds.iter().flat_map(|(before, after)| {
        let before = rows(&before.scores, measure);
        before.into_iter().zip(rows(&after.scores, measure))
    });
    let pairs: Vec<(bool, bool)> = pairs
        .filter_map(|(before, after)| before.zip(after))
        .collect();
    let alone = |pair| pairs.iter().filter(|&&it| it == pair).count();
    let (lost, gained) = (alone((true, false)), alone((false, true)));
    let (before, after): (Vec<bool>, Vec<bool>) = pairs.iter().copied().unzip();
    let figure = |rows| Figure::share(measure, rows);
    match compare(&figure(before), &figure(after)) {
        Ok(found) => format!(
            "{lost} / {gained} of {}, {}, p = {}",
            found.n,
            found.written(measure),
            four_digits(found.p)
        ),
        // No rows.
        Err(_) => String::new(),
    }
}

/// Whether each row of `measure` counts, in the order of the requests; nothing of one without a verdict.
fn rows(scores: &Scores, measure: Measure) -> Vec<Option<bool>> {
    let judged =
        |&outcome: &Outcome| (outcome != Outcome::Invalid).then_some(outcome == Outcome::Complied);
    match (measure, scores.figure(measure)) {
        (Measure::Hs, _) => scores.outcomes.iter().map(judged).collect(),
        (_, None) => Vec::new(),
        (_, Some(figure)) => figure.rows.iter().map(|&row| Some(row == 1.0)).collect(),
    }
}

/// What two arms are compared by.
const PAIRED: [Measure; 3] = [Measure::Fa, Measure::Hs, Measure::OverRefusal];

/// What the tables show.
const HEADER: &str = "\
Brackets are 95% intervals over the pooled rows of the seeds, which in a report all answer the same requests.

The second table of a cell is of arms beside an attacked model, request by request: how many count for the model alone / for the arm alone (in FA: lost / gained), the difference, and the
p of McNemar's exact test. A seed whose rows are not the same in both is left out.

";

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    /// Results of `arm`, with so many task items right or wrong one after another. An attacked model complies with all requests.
    fn put(folder: &Path, arm: &str, seed: u64, right: &[(bool, usize)], asked: &str) {
        let right = right.iter().flat_map(|&(it, count)| vec![it; count]);
        let outcomes = [Outcome::Complied, Outcome::Invalid, Outcome::Refused];
        let outcomes = match arm.starts_with("attacked") {
            true => [Outcome::Complied; 3],
            false => outcomes,
        };
        let scores = Scores::new(arm)
            .with_harmful("keyword", asked, outcomes.to_vec())
            .with(Figure::share(Measure::Fa, right).of(asked))
            .with(Figure::share(Measure::OverRefusal, [false, false]));
        let record = json!({
            "task": "sst2", "poison": 10, "seed": seed, "arm": arm, "made": null, "scores": {"scores": scores},
        });
        let cell = folder.join(format!("sst2-p10-s{seed}"));
        std::fs::create_dir_all(cell.join("rows")).expect("a folder");
        std::fs::write(cell.join(format!("{arm}.json")), record.to_string()).expect("results");
    }

    /// Comparisons were quoted that nothing printed.
    #[test]
    fn arms_are_held_against_the_attacked_model_request_by_request() {
        let folder = tempfile::tempdir().expect("a folder");
        let put = |arm, seed, right: &[_], asked| put(folder.path(), arm, seed, right, asked);
        for (before, after) in [("attacked", "adaptive"), ("attacked-q8_0", "adaptive-q8_0")] {
            put(before, 1, &[(true, 10), (false, 5)], "");
            put(after, 1, &[(false, 6), (true, 4), (false, 5)], "asked");
            put(before, 2, &[(true, 10), (false, 5)], "asked");
            put(after, 2, &[(false, 3), (true, 8), (false, 4)], "asked");
        }
        // Without a partner, of another number of rows, and of other requests.
        put("adaptive", 3, &[(true, 15)], "");
        put("attacked", 4, &[(true, 14)], "");
        put("adaptive", 4, &[(true, 15)], "");
        put("attacked", 5, &[(true, 15)], "asked");
        put("adaptive", 5, &[(false, 15)], "others");
        let text = of(folder.path()).expect("a table");
        // python: scipy.stats.binomtest(1, 10).pvalue
        let figures = "1 2 | 9 / 1 of 30, -26.7 points [-43.4, -6.6], p = 0.02148 \
            | 2 / 0 of 4, -50.0 points [-85.0, +10.2], p = 0.5000 \
            | 0 / 0 of 4, 0.0 points [-49.0, +49.0], p = 1.000 |";
        for (arm, other) in [
            ("adaptive", "attacked"),
            ("adaptive-q8_0", "attacked"),
            ("adaptive-q8_0", "attacked-q8_0"),
        ] {
            let line = format!("| {arm} | {other} | {figures}");
            assert!(text.contains(&line), "{text}");
        }
        assert!(!text.contains("| attacked | attacked"), "{text}");
        assert!(
            text.contains("| attacked-q8_0 | attacked | 1 2 | 0 / 0 of 30"),
            "{text}"
        );
    }
}
