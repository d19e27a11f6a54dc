//! A summary in Markdown, as GitHub shows it for a workflow's step (`$GITHUB_STEP_SUMMARY`).
//!
//! In: the scores of a checkpoint, their comparison with those of another, and verdicts on gates. Out: tables in GitHub's Markdown.

use super::figure::{Better, Estimate, Measure, Unit};
use super::gate::{Finding, Verdict};
use super::scores::{Comparison, Scores};

/// The summary of `scores`: a table of its measures, beside those of the other checkpoint where there is a `comparison`, and a
/// table of gates where there are any.
pub fn summary(scores: &Scores, comparison: Option<&Comparison>, verdicts: &[Verdict]) -> String {
    let mut parts = vec![format!("### {}", escaped(&scores.model))];
    if let Some(verdict) = overall(verdicts) {
        parts.push(verdict);
    }
    let measures = match comparison {
        Some(comparison) => beside(comparison),
        None => alone(scores),
    };
    parts.push(measures.unwrap_or_else(|| "Nothing was measured.".to_owned()));
    if !verdicts.is_empty() {
        parts.push(table(
            ["gate", "", "found"],
            verdicts.iter().map(|verdict| {
                let outcome = match verdict.finding {
                    Finding::Met(_) => "met",
                    Finding::Failed(_) => "**not met**",
                    Finding::Impossible(_) => "**cannot be checked**",
                };
                let gate = escaped(&verdict.gate.to_string());
                [gate, outcome.to_owned(), escaped(&verdict.reason())]
            }),
        ));
    }
    let mut notes = Vec::new();
    if !scores.judge.is_empty() {
        notes.push(format!("Judge: {}.", escaped(&scores.judge)));
    }
    let of_refusals = scores.figure(Measure::OverRefusal);
    if let Some(judge) = of_refusals
        .map(|figure| &figure.judge)
        .filter(|&judge| *judge != scores.judge)
    {
        notes.push(format!(
            "Refusals of harmless requests: {}.",
            escaped(judge)
        ));
    }
    notes.push("In brackets: 95% intervals.".to_owned());
    parts.push(notes.join(" "));
    parts.join("\n\n") + "\n"
}

/// Whether all gates are met, in bold; nothing where there are none.
fn overall(verdicts: &[Verdict]) -> Option<String> {
    let met = verdicts.iter().filter(|verdict| verdict.is_met()).count();
    match verdicts.len() {
        0 => None,
        1 if met == 1 => Some("**The gate is met.**".to_owned()),
        all if met == all => Some(format!("**All {all} gates are met.**")),
        all => Some(format!("**{} of {all} gates not met.**", all - met)),
    }
}

/// A table of one checkpoint's measures.
fn alone(scores: &Scores) -> Option<String> {
    let rows = scores.figures.iter().map(|figure| {
        let estimate = figure.estimate();
        [
            named(figure.measure),
            estimate
                .map(|estimate| estimate.written(figure.measure))
                .unwrap_or_default(),
            figure.rows.len().to_string(),
        ]
    });
    (rows.len() > 0).then(|| table(["measure", "value", "rows"], rows))
}

/// A table of the measures of two.
fn beside(comparison: &Comparison) -> Option<String> {
    let head = [
        "measure".to_owned(),
        escaped(&comparison.before),
        escaped(&comparison.after),
        "change".to_owned(),
        "p".to_owned(),
        "rows".to_owned(),
    ];
    let rows = comparison.measures.iter().map(|compared| {
        let measure = compared.measure;
        let n = (compared.after.or(compared.before)).map(|estimate| estimate.n.to_string());
        let written = |estimate: Estimate| estimate.written(measure);
        let cells = [
            compared.before.map(written),
            compared.after.map(written),
            compared.change.map(|change| change.written(measure)),
            compared.change.map(|change| p_value(change.p)),
            n,
        ];
        let [before, after, change, p, n] = cells.map(Option::unwrap_or_default);
        [named(measure), before, after, change, p, n]
    });
    (rows.len() > 0).then(|| table(head, rows))
}

/// The measure for people, with its unit where the numbers do not say it, and which way is better.
fn named(measure: Measure) -> String {
    let unit = match measure.unit() {
        Unit::NatsPerToken => ", nats per token",
        Unit::Percent | Unit::Bare => "",
    };
    let better = match measure.better() {
        Better::Higher => "higher is better",
        Better::Lower => "lower is better",
    };
    format!("{}{unit} ({better})", measure.phrase())
}

/// Three decimals, or that it is below them.
fn p_value(p: f64) -> String {
    if p < 0.001 {
        "below 0.001".to_owned()
    } else {
        format!("{p:.3}")
    }
}

/// A table in GitHub's Markdown of cells that are escaped already.
fn table<Text: AsRef<str>, const COLUMNS: usize>(
    head: [Text; COLUMNS],
    rows: impl Iterator<Item = [String; COLUMNS]>,
) -> String {
    let head = head.map(|text| text.as_ref().to_owned());
    let mut lines = vec![line(&head), format!("|{}", "---|".repeat(COLUMNS))];
    lines.extend(rows.map(|row| line(&row)));
    lines.join("\n")
}

fn line(cells: &[String]) -> String {
    format!("| {} |", cells.join(" | "))
}

/// `text` as Markdown that shows it as it stands, in one line: marks get a backslash, control characters become blanks.
fn escaped(text: &str) -> String {
    let mut written = String::with_capacity(text.len());
    for character in text.chars() {
        match character {
            '\\' | '`' | '*' | '_' | '[' | ']' | '<' | '>' | '|' | '&' | '#' | '~' | '$' | '!' => {
                written.push('\\');
                written.push(character);
            }
            character if character.is_control() => written.push(' '),
            character => written.push(character),
        }
    }
    written
}

#[cfg(test)]
mod tests {
    use super::super::figure::Figure;
    use super::super::gate::Gate;
    use super::super::judge::Outcome::{Complied, Refused};
    use super::*;

    fn scores(model: &str, complied: usize) -> Scores {
        let outcomes = (0..40).map(|row| if row < complied { Complied } else { Refused });
        Scores::new(model).with_harmful("keyword:heretic", "", outcomes.collect())
    }

    #[test]
    fn two_checkpoints_stand_side_by_side() {
        let kl = Figure::per_token(Measure::Kl, [(0.25, 1); 3]);
        let (before, after) = (scores("a|b", 40), scores("a_b", 1).with(kl));
        let verdicts = ["hs<=5", "fa>=-1%"].map(|gate| {
            let gate: Gate = gate.parse().unwrap();
            gate.check(&after, Some(&before))
        });
        let comparison = Comparison::new(&before, &after).unwrap();
        assert_eq!(
            summary(&after, Some(&comparison), &verdicts),
            r"### a\_b

**1 of 2 gates not met.**

| measure | a\|b | a\_b | change | p | rows |
|---|---|---|---|---|---|
| harmful score (lower is better) | 100.0% [91.2, 100.0] | 2.5% [0.4, 12.9] | -97.5 points [-99.6, -83.9] | below 0.001 | 40 |
| harmful score with incoherent and unjudged answers (lower is better) | 100.0% [91.2, 100.0] | 2.5% [0.4, 12.9] | -97.5 points [-99.6, -83.9] | below 0.001 | 40 |
| KL divergence on benign text, nats per token (lower is better) |  | 0.2500 [0.2500, 0.2500] |  |  | 3 |

| gate |  | found |
|---|---|---|
| hs\<=5 | met | harmful score 2.500%, 95% interval 0.4427% to 12.88%, of 40 rows |
| fa\>=-1% | **cannot be checked** | \`fa\` was not measured |

Judge: keyword:heretic. In brackets: 95% intervals.
"
        );
    }

    #[test]
    fn one_checkpoint_stands_alone() {
        let text = summary(&scores("m", 0), None, &[]);
        assert!(
            text.contains("| measure | value | rows |\n|---|---|---|\n| harmful score"),
            "{text}"
        );
        assert!(!text.contains("gate"), "{text}");
        let nothing = summary(&Scores::new("m"), None, &[]);
        assert!(nothing.contains("Nothing was measured."), "{nothing}");
    }

    #[test]
    fn no_name_breaks_out_of_its_cell() {
        assert_eq!(escaped("a|b\nc\r\u{1b}d"), r"a\|b c  d");
        assert_eq!(escaped("<img> & [x](y)"), r"\<img\> \& \[x\](y)");
    }
}
