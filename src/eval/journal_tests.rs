use std::fs;

use super::*;

/// Answers with the request itself, and remembers what it was asked.
#[derive(Default)]
struct Parrot {
    asked: Vec<String>,
    /// Says that this text has no answer.
    fails_at: Option<&'static str>,
    /// Passes over this one.
    ignores: Option<&'static str>,
}

impl Answerer for Parrot {
    fn identity(&self) -> String {
        "parrot".to_owned()
    }

    fn answer(
        &mut self,
        requests: &[&Request],
        max_new_tokens: usize,
        each: &mut crate::eval::answer::Each<'_>,
    ) -> Result<(), AnswerError> {
        // Any order is allowed.
        for (place, request) in requests.iter().enumerate().rev() {
            self.asked.push(request.text.clone());
            if self.fails_at == Some(&request.text) {
                return Err(AnswerError::Prompt(crate::model::PackError::EmptyPrompt {
                    index: place,
                }));
            }
            if self.ignores == Some(&request.text) {
                continue;
            }
            let text = request.text.repeat(max_new_tokens);
            if each(place, Answer { text, ended: true }).is_break() {
                return Err(AnswerError::Interrupted);
            }
        }
        Ok(())
    }
}

/// Is as sure as the answer is long, to a third of a character.
#[derive(Default)]
struct Ruler {
    asked: usize,
}

impl Judge for Ruler {
    fn name(&self) -> String {
        "ruler".to_owned()
    }

    fn judge(
        &mut self,
        exchanges: &[Exchange<'_>],
        each: &mut crate::eval::judge::Each<'_>,
    ) -> Result<(), JudgeError> {
        for (index, it) in exchanges.iter().enumerate() {
            self.asked += 1;
            let verdict = Verdict {
                outcome: Outcome::Complied,
                score: Some(f64::from(u32::try_from(it.answer.len()).unwrap()) / 3.0),
                categories: vec!["length".to_owned()],
            };
            if each(index, verdict).is_break() {
                return Err(JudgeError::Interrupted);
            }
        }
        Ok(())
    }
}

fn requests(texts: &[&str]) -> Vec<Request> {
    texts.iter().map(|&text| Request::new(text)).collect()
}

fn on(_: usize, _: usize) -> ControlFlow<()> {
    ControlFlow::Continue(())
}

/// A journal's path, in a directory that is deleted at the end.
fn place() -> (tempfile::TempDir, PathBuf) {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("journal");
    (directory, path)
}

fn answers(journal: &mut Journal, parrot: &mut Parrot, texts: &[&str]) -> Vec<String> {
    let found = journal.answers(parrot, &requests(texts), 2, &mut on);
    found.unwrap().into_iter().map(|it| it.text).collect()
}

/// A journal with the answers to `a` and `b`, in the order of its lines `b`, `a`.
fn two_answers(path: &Path) -> Vec<u8> {
    let mut journal = Journal::open(path).unwrap();
    answers(&mut journal, &mut Parrot::default(), &["a", "b"]);
    fs::read(path).unwrap()
}

#[test]
fn rows_that_are_the_same_are_asked_for_once() {
    let mut parrot = Parrot::default();
    let texts = ["a", "b", "a", "c", "b"];
    let found = answers(&mut Journal::none(), &mut parrot, &texts);
    assert_eq!(found, ["aa", "bb", "aa", "cc", "bb"]);
    assert_eq!(parrot.asked, ["c", "b", "a"]);
    // An input makes another request of it.
    let mut two = requests(&["a", "a"]);
    two[1].input = Some("i".to_owned());
    Journal::none()
        .answers(&mut parrot, &two, 2, &mut on)
        .unwrap();
    assert_eq!(parrot.asked.len(), 5);
}

#[test]
fn progress_is_told_before_the_first_row_and_after_each() {
    let (_directory, path) = place();
    two_answers(&path);
    let mut heard = Vec::new();
    Journal::open(&path)
        .unwrap()
        .answers(
            &mut Parrot::default(),
            &requests(&["a", "c", "c", "d"]),
            2,
            &mut |done, of| {
                heard.push((done, of));
                ControlFlow::Continue(())
            },
        )
        .unwrap();
    assert_eq!(heard, [(1, 4), (2, 4), (4, 4)]);
}

#[test]
fn what_is_kept_is_not_asked_for_again() {
    let (_directory, path) = place();
    two_answers(&path);
    let mut parrot = Parrot::default();
    let mut journal = Journal::open(&path).unwrap();
    let found = answers(&mut journal, &mut parrot, &["b", "c", "a"]);
    assert_eq!(found, ["bb", "cc", "aa"]);
    assert_eq!(parrot.asked, ["c"]);
    // Another limit is another question.
    journal
        .answers(&mut parrot, &requests(&["a"]), 3, &mut on)
        .unwrap();
    assert_eq!(parrot.asked, ["c", "a"]);
}

#[test]
fn a_journal_that_keeps_nothing_asks_again() {
    let mut journal = Journal::none();
    let mut parrot = Parrot::default();
    for _ in 0..2 {
        answers(&mut journal, &mut parrot, &["a"]);
    }
    assert_eq!(parrot.asked, ["a", "a"]);
}

#[test]
fn what_was_found_before_a_stop_or_a_failure_is_kept() {
    let (_directory, path) = place();
    let mut stop = |done: usize, _: usize| match done {
        1 => ControlFlow::Break(()),
        _ => ControlFlow::Continue(()),
    };
    let mut parrot = Parrot::default();
    let texts = requests(&["a", "b", "c"]);
    let stopped = Journal::open(&path)
        .unwrap()
        .answers(&mut parrot, &texts, 2, &mut stop);
    assert!(matches!(stopped, Err(JournalError::Interrupted)));
    assert_eq!(parrot.asked, ["c"]);

    let mut failing = Parrot {
        fails_at: Some("a"),
        ..Parrot::default()
    };
    let texts = requests(&["c", "a", "b"]);
    let failed = Journal::open(&path)
        .unwrap()
        .answers(&mut failing, &texts, 2, &mut on);
    assert_eq!(failing.asked, ["b", "a"]);
    // The place is that among all requests, not among those that were asked.
    let Err(JournalError::Answer(AnswerError::Prompt(error))) = failed else {
        panic!("{failed:?}");
    };
    assert_eq!(error, crate::model::PackError::EmptyPrompt { index: 1 });

    let mut parrot = Parrot::default();
    let mut journal = Journal::open(&path).unwrap();
    answers(&mut journal, &mut parrot, &["a", "b", "c"]);
    assert_eq!(parrot.asked, ["a"]);
}

#[test]
fn a_row_that_is_passed_over_is_told() {
    let mut parrot = Parrot {
        ignores: Some("b"),
        ..Parrot::default()
    };
    let texts = requests(&["a", "b", "c"]);
    let found = Journal::none().answers(&mut parrot, &texts, 2, &mut on);
    assert!(matches!(found, Err(JournalError::PassedOver { place: 1 })));
}

#[test]
fn verdicts_come_back_to_the_bit() {
    let (_directory, path) = place();
    let said = ["", "a", "of seven", "a", "x"];
    let exchange = |answer| Exchange {
        request: "q",
        context: None,
        answer,
    };
    let exchanges = said.map(exchange);
    let mut ruler = Ruler::default();
    let mut judged = || {
        Journal::open(&path)
            .unwrap()
            .verdicts(&mut ruler, &exchanges, &mut on)
            .unwrap()
    };
    let first = judged();
    assert_eq!(first, judged());
    assert_eq!(first, Ruler::default().judge_all(&exchanges).unwrap());
    assert_eq!(ruler.asked, 4);
}

#[test]
fn numbers_come_back_to_the_bit_and_only_missing_ones_are_computed() {
    let (_directory, path) = place();
    let values = [0.1 + 0.2, -0.0, f64::INFINITY, 5e-324, 1.0 / 3.0];
    let mut journal = Journal::open(&path).unwrap();
    let stopped: Result<_, JournalError> = journal.numbers("loss", 5, &mut on, |places, take| {
        assert_eq!(places, [0, 1, 2, 3, 4]);
        for place in [3, 0] {
            assert!(take(place, values[place]).is_continue());
        }
        Err(JournalError::Interrupted)
    });
    assert!(stopped.is_err());
    drop(journal);
    let mut journal = Journal::open(&path).unwrap();
    let found: Result<Vec<f64>, JournalError> =
        journal.numbers("loss", 5, &mut on, |places, take| {
            assert_eq!(places, [1, 2, 4]);
            for &place in places {
                // A second value, and one that nobody asked for, count for nothing.
                for _ in 0..2 {
                    assert!(take(place, values[place]).is_continue());
                }
                assert!(take(0, 7.0).is_continue());
            }
            Ok(())
        });
    let bits = |values: &[f64]| values.iter().map(|it| it.to_bits()).collect::<Vec<_>>();
    assert_eq!(bits(&found.unwrap()), bits(&values));
    let other: Result<Vec<f64>, JournalError> = journal.numbers("other", 1, &mut on, |_, take| {
        let _ = take(0, 7.0);
        Ok(())
    });
    assert_eq!(other.unwrap(), [7.0]);
}

#[test]
fn a_file_that_is_cut_anywhere_loses_no_whole_line_before_the_cut() {
    let (_directory, path) = place();
    let whole = two_answers(&path);
    let ends: Vec<usize> = (1..=whole.len())
        .filter(|&end| whole[end - 1] == b'\n')
        .collect();
    assert_eq!(ends.len(), 3);
    for cut in 0..=whole.len() {
        fs::write(&path, &whole[..cut]).unwrap();
        let mut parrot = Parrot::default();
        let mut journal = Journal::open(&path).unwrap();
        let found = answers(&mut journal, &mut parrot, &["a", "b"]);
        assert_eq!(found, ["aa", "bb"]);
        let kept = ends.iter().filter(|&&end| end <= cut).count();
        let expected: &[&str] = match kept {
            0 | 1 => &["b", "a"],
            2 => &["a"],
            _ => &[],
        };
        assert_eq!(parrot.asked, expected, "cut at {cut}");
        drop(journal);
        assert_eq!(fs::read(&path).unwrap(), whole, "cut at {cut}");
    }
}

#[test]
fn a_line_that_was_not_written_so_is_refused() {
    let (_directory, path) = place();
    let whole = String::from_utf8(two_answers(&path)).unwrap();
    let header = whole.lines().next().unwrap();
    let key = "0".repeat(64);
    let lines = [
        String::new(),
        "{}".to_owned(),
        "{\"answer\":".to_owned(),
        header.to_owned(),
        format!(r#"{{"answer":{{"ended":true,"key":"{key}"}}}}"#),
        format!(r#"{{"answer":{{"ended":true,"key":"{key}","text":"a","more":1}}}}"#),
        format!(r#"{{"answer":{{"ended":true,"ended":true,"key":"{key}","text":"a"}}}}"#),
        r#"{"answer":{"ended":true,"key":"0","text":"a"}}"#.to_owned(),
        format!(r#"{{"number":{{"key":"{key}","value":"1.5"}}}}"#),
        format!(r#"{{"number":{{"key":"{key}","value":"+00000000000000f"}}}}"#),
        format!(r#"{{"verdict":{{"key":"{key}","outcome":"safe","score":null,"categories":[]}}}}"#),
    ];
    for line in lines {
        let altered = format!("{whole}{line}\n");
        fs::write(&path, &altered).unwrap();
        let error = Journal::open(&path).unwrap_err();
        assert!(
            matches!(error, JournalError::Malformed { line: 4, .. }),
            "{line}: {error:?}"
        );
        assert_eq!(fs::read_to_string(&path).unwrap(), altered);
    }
    fs::write(&path, [whole.as_bytes(), b"\xff\n"].concat()).unwrap();
    assert!(matches!(
        Journal::open(&path),
        Err(JournalError::Malformed {
            problem: LineProblem::NotText,
            ..
        })
    ));
}

#[test]
fn a_line_is_read_up_to_a_limit() {
    let (_directory, path) = place();
    let head = header() + "\n";
    let limit = usize::try_from(LINE_BYTES).unwrap();
    let before = format!(
        r#"{{"answer":{{"ended":true,"key":"{}","text":""#,
        "0".repeat(64)
    );
    let after = "\"}}\n";
    let line = |length: usize| {
        let text = "x".repeat(length - before.len() - after.len());
        [head.as_str(), &before, &text, after].concat()
    };
    fs::write(&path, line(limit)).unwrap();
    drop(Journal::open(&path).unwrap());
    for text in [line(limit + 1), line(limit + 2).trim_end().to_owned()] {
        fs::write(&path, text).unwrap();
        let error = Journal::open(&path).unwrap_err();
        assert!(
            matches!(
                error,
                JournalError::Malformed {
                    line: 2,
                    problem: LineProblem::TooLong { .. },
                    ..
                }
            ),
            "{error:?}"
        );
    }
}

#[test]
fn what_is_no_journal_of_this_version_is_refused_and_left_as_it_is() {
    let (_directory, path) = place();
    let found = |text: &str| {
        fs::write(&path, text).unwrap();
        let error = Journal::open(&path).unwrap_err();
        assert_eq!(fs::read_to_string(&path).unwrap(), text);
        error
    };
    let later = header().replace(":1}", ":2}");
    assert!(matches!(
        found(&format!("{later}\n")),
        JournalError::Version { found: 2, .. }
    ));
    for text in [
        "a text without an end",
        "{\"prompt\":\"a\"}\n",
        "[]\n",
        "\n",
        "{\"format\":\"panacea-journal\"}\n",
    ] {
        let error = found(text);
        assert!(
            matches!(error, JournalError::NoJournal { .. }),
            "{text}: {error:?}"
        );
    }
}

#[test]
fn two_runs_do_not_keep_one_journal() {
    let (_directory, path) = place();
    let first = Journal::open(&path).unwrap();
    assert!(matches!(
        Journal::open(&path),
        Err(JournalError::Locked { .. })
    ));
    drop(first);
    let second = Journal::open(&path).unwrap();
    second.discard().unwrap();
    assert!(!path.exists());
}

#[test]
fn nothing_is_a_journal_that_cannot_be_opened() {
    let (directory, path) = place();
    assert!(matches!(
        Journal::open(directory.path()),
        Err(JournalError::Io { .. })
    ));
    assert!(matches!(
        Journal::open(&path.join("below")),
        Err(JournalError::Io { .. })
    ));
}
