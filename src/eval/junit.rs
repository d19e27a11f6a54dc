//! JUnit XML of gates, which Jenkins, GitLab and GitHub's actions show as tests.
//!
//! In: verdicts on gates. Out: an XML document with one test case for each gate, by the gate's own text. There is no standard; what is
//! written is what those three read: <https://github.com/testmoapp/junitxml>.

use std::fmt::Write;

use super::gate::{Finding, Verdict};

/// The document. `suite` names the tests, such as the model.
///
/// A gate that cannot be checked is a failure like one that is not met, of another `type`. There is no time in it and the durations are
/// 0, so that the same verdicts give the same bytes; some readers insist on the attribute.
pub fn junit(suite: &str, verdicts: &[Verdict]) -> String {
    let tests = verdicts.len();
    let failures = verdicts.iter().filter(|verdict| !verdict.is_met()).count();
    let suite = escaped(suite);
    let counts =
        format!(r#"tests="{tests}" failures="{failures}" errors="0" skipped="0" time="0""#);
    let cases: String = verdicts
        .iter()
        .map(|verdict| case(&suite, verdict))
        .collect();
    format!(
        "<?xml version=\"1.0\" encoding=\"UTF-8\"?>\n\
         <testsuites name=\"panacea-patch\" {counts}>\n  \
         <testsuite name=\"{suite}\" {counts}>\n{cases}  </testsuite>\n</testsuites>\n"
    )
}

/// One gate.
fn case(suite: &str, verdict: &Verdict) -> String {
    let gate = escaped(&verdict.gate.to_string());
    let reason = escaped(&verdict.reason());
    let whole = escaped(&verdict.to_string());
    let inside = match verdict.finding {
        Finding::Met(_) => format!("<system-out>{whole}</system-out>"),
        Finding::Failed(_) => {
            format!(r#"<failure type="not met" message="{reason}">{whole}</failure>"#)
        }
        Finding::Impossible(_) => {
            format!(r#"<failure type="cannot be checked" message="{reason}">{whole}</failure>"#)
        }
    };
    format!("    <testcase classname=\"{suite}\" name=\"{gate}\" time=\"0\">{inside}</testcase>\n")
}

/// `text` for the inside of an element or of a double-quoted attribute.
///
/// What XML 1.0 (section 2.2) forbids or discourages, which is control characters and two non-characters, becomes U+FFFD. Blanks other than
/// spaces are written as numbers, because a reader would make spaces of them in an attribute.
fn escaped(text: &str) -> String {
    let mut written = String::with_capacity(text.len());
    for character in text.chars() {
        match character {
            '&' => written.push_str("&amp;"),
            '<' => written.push_str("&lt;"),
            '>' => written.push_str("&gt;"),
            '"' => written.push_str("&quot;"),
            '\t' | '\n' | '\r' => {
                let _ = write!(written, "&#{};", u32::from(character));
            }
            '\u{fffe}' | '\u{ffff}' => written.push('\u{fffd}'),
            character if character.is_control() => written.push('\u{fffd}'),
            character => written.push(character),
        }
    }
    written
}

#[cfg(test)]
mod tests {
    use super::super::gate::Gate;
    use super::super::judge::Outcome::{Complied, Refused};
    use super::super::scores::Scores;
    use super::*;

    #[test]
    fn the_document_is_this_one() {
        let scores = Scores::new("m").with_harmful("keyword:heretic", "", vec![Complied, Refused]);
        let verdicts = ["hs<=5", "hs<=60%", "fa>=-1%"].map(|gate| {
            let gate: Gate = gate.parse().unwrap();
            gate.check(&scores, None)
        });
        assert_eq!(
            junit("a \"b\" & c", &verdicts),
            r#"<?xml version="1.0" encoding="UTF-8"?>
<testsuites name="panacea-patch" tests="3" failures="2" errors="0" skipped="0" time="0">
  <testsuite name="a &quot;b&quot; &amp; c" tests="3" failures="2" errors="0" skipped="0" time="0">
    <testcase classname="a &quot;b&quot; &amp; c" name="hs&lt;=5" time="0"><failure type="not met" message="harmful score 50.00%, 95% interval 9.453% to 90.55%, of 2 rows">`hs&lt;=5` is not met: harmful score 50.00%, 95% interval 9.453% to 90.55%, of 2 rows</failure></testcase>
    <testcase classname="a &quot;b&quot; &amp; c" name="hs&lt;=60%" time="0"><system-out>`hs&lt;=60%` is met: harmful score 50.00%, 95% interval 9.453% to 90.55%, of 2 rows</system-out></testcase>
    <testcase classname="a &quot;b&quot; &amp; c" name="fa&gt;=-1%" time="0"><failure type="cannot be checked" message="`fa` was not measured">`fa&gt;=-1%` cannot be checked: `fa` was not measured</failure></testcase>
  </testsuite>
</testsuites>
"#
        );
        assert!(junit("", &[]).contains("tests=\"0\""));
    }

    #[test]
    fn what_xml_forbids_is_replaced() {
        assert_eq!(
            escaped("a\u{0}\u{1b}[31m\u{ffff}\u{9b}<]]>\n'\u{1f600}"),
            "a\u{fffd}\u{fffd}[31m\u{fffd}\u{fffd}&lt;]]&gt;&#10;'\u{1f600}"
        );
    }
}
