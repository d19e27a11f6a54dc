//! The sets that are used where the user gives none: written for this project, compiled in.
//!
//! The harmful set holds requests in general terms over thirteen of the fourteen BeaverTails categories (all but those that
//! concern children), each with an affirmative opening and a refusal. An opening never goes on to an answer: that a model begins to
//! comply is all that the method needs to know. The benign set holds everyday requests with short answers, a part of which only
//! sound dangerous (how to kill a process), so that what is kept includes answering those.

use super::dataset::{Dataset, Source};
use super::rows::{Example, Refusal, Request, Row};

/// Requests with affirmative openings; each row has its own refusal.
pub fn harmful() -> Dataset<Example> {
    read("harmful set", HARMFUL)
}

/// The refusals of [`harmful`], in its order, each bound to its request.
pub fn refusals() -> Dataset<Refusal> {
    read("refusals", HARMFUL)
}

/// Harmless requests with short good answers.
pub fn benign() -> Dataset<Example> {
    read("benign set", BENIGN)
}

/// Harmful requests with affirmative openings that no method learns from: evaluation's, where no others are given.
pub fn held_out_harmful() -> Dataset<Example> {
    read("held-out harmful set", HELD_OUT_HARMFUL)
}

/// Harmless requests that sound harmful, or are near to what is: a model that refuses them refuses too much.
pub fn held_out_harmless() -> Dataset<Request> {
    read("held-out harmless set", HELD_OUT_HARMLESS)
}

const HARMFUL: &str = include_str!("builtin/harmful.jsonl");
const BENIGN: &str = include_str!("builtin/benign.jsonl");
const HELD_OUT_HARMFUL: &str = include_str!("builtin/held_out_harmful.jsonl");
const HELD_OUT_HARMLESS: &str = include_str!("builtin/held_out_harmless.jsonl");

fn read<R: Row>(name: &'static str, text: &str) -> Dataset<R> {
    Dataset::from_bytes(text.as_bytes(), Source::BuiltIn(name))
        .expect("the built-in sets are compiled in, and a test reads them")
}

#[cfg(test)]
mod tests {
    use std::collections::{BTreeMap, BTreeSet};

    use serde::Deserialize;

    use super::*;

    #[derive(Deserialize)]
    #[serde(deny_unknown_fields)]
    struct Probe {
        category: String,
        request: String,
        opening: String,
        refusal: String,
    }

    #[derive(Deserialize)]
    #[serde(deny_unknown_fields)]
    struct Benign {
        request: String,
        answer: String,
    }

    fn probes() -> Vec<Probe> {
        lines(HARMFUL)
    }

    fn lines<'a, T: Deserialize<'a>>(text: &'a str) -> Vec<T> {
        text.lines()
            .map(|line| serde_json::from_str(line).unwrap())
            .collect()
    }

    fn words(text: &str) -> usize {
        text.split_whitespace().count()
    }

    #[test]
    fn every_set_is_read_whole() {
        assert_eq!(harmful().rows.len(), HARMFUL.lines().count());
        assert_eq!(refusals().rows.len(), HARMFUL.lines().count());
        assert_eq!(benign().rows.len(), BENIGN.lines().count());
        assert!(harmful().rows.iter().all(|row| row.refusal.is_some()));
    }

    #[test]
    fn thirteen_categories_have_at_least_eight_probes_each() {
        let mut counts: BTreeMap<String, usize> = BTreeMap::new();
        for probe in probes() {
            *counts.entry(probe.category).or_default() += 1;
        }
        // Names of the labels of PKU-Alignment/beaver-dam-7b, without `child_abuse`.
        let expected = [
            "animal_abuse",
            "controversial_topics,politics",
            "discrimination,stereotype,injustice",
            "drug_abuse,weapons,banned_substance",
            "financial_crime,property_crime,theft",
            "hate_speech,offensive_language",
            "misinformation_regarding_ethics,laws_and_safety",
            "non_violent_unethical_behavior",
            "privacy_violation",
            "self_harm",
            "sexually_explicit,adult_content",
            "terrorism,organized_crime",
            "violence,aiding_and_abetting,incitement",
        ];
        assert!(counts.keys().eq(expected.iter()));
        assert!(counts.values().all(|&count| count >= 8), "{counts:?}");
    }

    #[test]
    fn no_text_is_used_twice() {
        let probes = probes();
        let benign: Vec<Benign> = lines(BENIGN);
        let texts: Vec<&str> = probes
            .iter()
            .flat_map(|p| [&p.request, &p.opening, &p.refusal])
            .chain(benign.iter().flat_map(|b| [&b.request, &b.answer]))
            .map(|text| text.as_str())
            .collect();
        let different: BTreeSet<String> = texts.iter().map(|text| text.to_lowercase()).collect();
        assert_eq!(different.len(), texts.len());
    }

    #[test]
    fn an_opening_agrees_and_stops_before_any_content() {
        for Probe { opening, .. } in probes() {
            let agrees = ["Sure", "Certainly", "Of course"];
            assert!(
                agrees.iter().any(|word| opening.starts_with(word)),
                "{opening}"
            );
            assert!(words(&opening) <= 25, "{opening}");
            let unfinished =
                opening.ends_with(':') || opening.ends_with(|c: char| c.is_lowercase());
            assert!(unfinished || opening.ends_with("First,"), "{opening}");
            assert!(!opening.contains('\n'), "{opening}");
        }
    }

    #[test]
    fn no_probe_holds_a_digit_or_a_list() {
        for Probe {
            request,
            opening,
            refusal,
            ..
        } in probes()
        {
            for text in [request, opening, refusal] {
                assert!(!text.contains(|c: char| c.is_ascii_digit()), "{text}");
                assert!(!text.contains(['\n', '*', ';']), "{text}");
            }
        }
    }

    #[test]
    fn every_refusal_is_recognized_by_the_phrases_that_judges_look_for() {
        // From the GCG and refusal_direction lists, and `heretic`'s markers for the rest.
        let phrases = [
            "i'm sorry",
            "sorry",
            "i apologize",
            "i can't",
            "i cannot",
            "i won't",
            "i'm not able to",
        ];
        let mut begins_so = 0;
        let probes = probes();
        for Probe { refusal, .. } in &probes {
            let text = refusal.to_lowercase();
            let known = phrases.iter().any(|phrase| text.contains(phrase));
            assert!(known || text.starts_with("i must decline"), "{refusal}");
            assert!((4..=45).contains(&words(refusal)), "{refusal}");
            begins_so += usize::from(phrases.iter().any(|phrase| text.starts_with(phrase)));
        }
        assert!(begins_so * 4 >= probes.len() * 3, "{begins_so}");
    }

    /// Of the words of two requests, how many both have, and how many there are.
    fn overlap(one: &str, other: &str) -> (usize, usize) {
        let words = |text: &str| -> BTreeSet<String> {
            let text = text.to_lowercase();
            let words = text.split(|c: char| !c.is_alphanumeric());
            words
                .filter(|word| !word.is_empty())
                .map(str::to_owned)
                .collect()
        };
        let (one, other) = (words(one), words(other));
        (one.intersection(&other).count(), one.union(&other).count())
    }

    #[test]
    fn what_scores_is_not_what_is_learned_from() {
        let learned = harmful().rows.into_iter().chain(benign().rows);
        let learned: Vec<String> = learned
            .map(|row| row.dialogue.first_request().to_owned())
            .collect();
        let scored: Vec<String> = held_out_harmful()
            .rows
            .iter()
            .map(|row| row.dialogue.first_request().to_owned())
            .chain(held_out_harmless().rows.into_iter().map(|row| row.text))
            .collect();
        assert_eq!(scored.len(), 80);
        for (i, request) in scored.iter().enumerate() {
            let others = learned.iter().chain(&scored[..i]);
            for other in others {
                let (shared, all) = overlap(request, other);
                assert!(5 * shared < 3 * all, "{request} | {other}");
            }
        }
    }

    #[test]
    fn refusals_begin_in_at_least_twelve_ways() {
        let beginnings: BTreeSet<String> = probes()
            .iter()
            .map(|probe| {
                probe
                    .refusal
                    .split_whitespace()
                    .take(3)
                    .collect::<Vec<_>>()
                    .join(" ")
            })
            .collect();
        assert!(beginnings.len() >= 12, "{beginnings:?}");
    }

    #[test]
    fn benign_answers_are_short_and_do_not_refuse() {
        let rows: Vec<Benign> = lines(BENIGN);
        assert!(rows.len() >= 56);
        for Benign { answer, request } in rows {
            assert!((20..=60).contains(&words(&answer)), "{request}");
            assert!(
                !answer.starts_with("I can't") && !answer.starts_with("I'm sorry"),
                "{request}"
            );
        }
    }
}
