//! The whole page, read back by a parser of XML, which shares no code with what wrote it.

use std::collections::{BTreeMap, BTreeSet};

use roxmltree::{Document, Node, ParsingOptions};
use serde_json::{Map, Value as Json, json};

use super::Page;

/// A report with every part.
const DATA: &str = include_str!("../../testdata/report/page.json");

/// Its page. After a change that is meant: `cargo run --example report -- testdata/report/page.json testdata/report/page.html`, then
/// `python3 testdata/gen/digests.py`, and look at it.
const GOLDEN: &str = include_str!("../../testdata/report/page.html");

#[test]
fn the_page_is_as_it_was() {
    let html = html(&data());
    let different = html
        .lines()
        .zip(GOLDEN.lines())
        .position(|(now, then)| now != then);
    assert!(
        html == GOLDEN,
        "the first line that differs is {different:?}, counted from 0"
    );
}

#[test]
fn the_same_data_gives_the_same_page() {
    let page: Page = serde_json::from_value(data()).expect("a page");
    let again: Page =
        serde_json::from_str(&serde_json::to_string(&page).expect("JSON")).expect("a page");
    assert_eq!(page, again);
    assert_eq!(page.html().expect("HTML"), again.html().expect("HTML"));
}

#[test]
fn an_empty_page_is_a_page_with_its_limits() {
    let html = html(&json!({}));
    let document = parse(&html);
    assert_eq!(texts(&document, "h1"), ["Patch report"]);
    assert_eq!(texts(&document, "h2"), ["What this does not promise"]);
    for absent in ["figure", "svg", "table", "details", "dl", "h3"] {
        assert_eq!(elements(&document, absent).count(), 0, "{absent}");
    }
}

#[test]
fn each_part_stands_alone() {
    for (part, value) in data().as_object().expect("an object") {
        let mut alone = Map::new();
        alone.insert(part.clone(), value.clone());
        let html = html(&Json::Object(alone));
        let document = parse(&html);
        check_references(&document);
        check_headings(&document);
        let sections = elements(&document, "section").count();
        let wanted = match part.as_str() {
            "title" | "summary" | "limits" => 1,
            _ => 2,
        };
        assert_eq!(sections, wanted, "{part}");
    }
}

#[test]
fn empty_lists_are_missing_parts() {
    let html = html(&json!({
        "made": {}, "gates": [], "comparison": {"columns": [{"name": "before"}]}, "examples": {}, "front": {}, "affinity": [],
        "search": {"series": [{"name": "h", "values": [null]}], "radius": {}},
    }));
    assert_eq!(texts(&parse(&html), "h2"), ["What this does not promise"]);
}

#[test]
fn figures_have_a_name_a_description_and_a_table() {
    let document = parse(GOLDEN);
    let figures: Vec<_> = elements(&document, "figure").collect();
    assert_eq!(figures.len(), 5);
    for figure in figures {
        assert!(
            figure
                .descendants()
                .any(|node| node.has_tag_name("figcaption"))
        );
        let details = figure
            .descendants()
            .find(|node| node.has_tag_name("details"))
            .expect("details");
        assert!(details.descendants().any(|node| node.has_tag_name("td")));
    }
    for svg in elements(&document, "svg").filter(|svg| svg.attribute("class") != Some("strip")) {
        assert_eq!(svg.attribute("role"), Some("img"));
        for (attribute, tag) in [("aria-labelledby", "title"), ("aria-describedby", "desc")] {
            let named = svg
                .children()
                .find(|node| node.has_tag_name(tag))
                .expect("a name");
            assert_eq!(named.attribute("id"), svg.attribute(attribute));
            assert!(!named.text().unwrap_or_default().is_empty());
        }
    }
    check_references(&document);
    check_headings(&document);
}

#[test]
fn nothing_is_asked_of_the_network_and_nothing_runs() {
    let document = parse(GOLDEN);
    let policy = elements(&document, "meta").find(|meta| meta.attribute("http-equiv").is_some());
    assert_eq!(
        policy.and_then(|meta| meta.attribute("content")),
        Some("default-src 'none'; style-src 'unsafe-inline'; img-src data:")
    );
    for node in document.descendants().filter(Node::is_element) {
        let name = node.tag_name().name();
        assert!(
            ![
                "script", "link", "img", "image", "use", "iframe", "object", "form", "base"
            ]
            .contains(&name),
            "{name}"
        );
        for attribute in node.attributes() {
            let (name, value) = (attribute.name(), attribute.value());
            assert!(
                !name.starts_with("on") && !["src", "srcset", "style", "xmlns"].contains(&name),
                "{name}"
            );
            assert!(name != "href" || value.starts_with('#'), "{value}");
            assert!(
                !value.contains("url(") && !value.contains("http"),
                "{value}"
            );
        }
    }
    let style = elements(&document, "style")
        .next()
        .and_then(|style| style.text())
        .expect("a style sheet");
    for reaching in ["url(", "@import", "http", "src"] {
        assert!(!style.contains(reaching), "{reaching}");
    }
}

#[test]
fn hostile_texts_stay_texts() {
    const HOSTILE: &str = "\"'><script src=http://a/>&amp;</title></style>]]>-->{{ 7 * 7 }}\u{202E}\u{0}\u{1B}\u{FEFF}\u{E0041}";
    let harmless = html(&with_texts(&data(), "x"));
    let hostile = html(&with_texts(&data(), HOSTILE));
    let skeleton = |html: &str| -> Vec<String> {
        let document = parse(html);
        let elements = document.descendants().filter(Node::is_element);
        elements
            .map(|node| {
                let attributes: Vec<_> = node
                    .attributes()
                    .map(|attribute| attribute.name())
                    .collect();
                format!("{} {}", node.tag_name().name(), attributes.join(" "))
            })
            .collect()
    };
    assert_eq!(skeleton(&harmless), skeleton(&hostile));
    assert!(!hostile.contains(['\u{202E}', '\u{0}', '\u{1B}', '\u{FEFF}', '\u{E0041}']));
    assert!(hostile.contains("[U+202E][U+0000][U+001B][U+FEFF][U+E0041]"));
    assert!(
        parse(&hostile)
            .descendants()
            .any(|node| node.text().is_some_and(|text| text.contains("{{ 7 * 7 }}")))
    );
}

#[test]
fn no_more_of_an_answer_than_its_opening_is_in_page_or_data() {
    assert!(DATA.contains("THE BODY"));
    let page: Page = serde_json::from_str(DATA).expect("a page");
    for text in [
        serde_json::to_string(&page).expect("JSON"),
        page.html().expect("HTML"),
        format!("{page:?}"),
    ] {
        assert!(text.contains("Sure, here is how to get around them:…"));
        assert!(!text.contains("THE BODY"));
    }
}

#[test]
fn data_that_nobody_asked_for_is_refused() {
    for data in [
        json!({"tilte": ""}),
        json!({"gates": [{"demand": "hs<=5", "ruling": "maybe"}]}),
        json!({"made": {"manifest": "abc"}}),
    ] {
        assert!(serde_json::from_value::<Page>(data).is_err());
    }
}

#[test]
fn colours_can_be_told_apart() {
    let (light, dark) = GOLDEN
        .split_once("prefers-color-scheme: dark")
        .expect("two schemes");
    for css in [light, dark] {
        let colours: BTreeMap<&str, f64> = css
            .split("--")
            .filter_map(|rule| {
                let (name, value) = rule.split_once(": #")?;
                Some((name, luminance(value.get(..6)?)?))
            })
            .collect();
        let contrast = |a: &str, b: &str| {
            let (a, b) = (colours[a], colours[b]);
            (a.max(b) + 0.05) / (a.min(b) + 0.05)
        };
        // AA of WCAG 2.2: 4.5 for text, 3 for what a figure is read by. Text on the map is on any mixture of `heat` and `paper`.
        let outcomes = ["refused", "complied", "incoherent", "invalid"];
        let texts = ["ink", "muted", "line"]
            .into_iter()
            .chain(outcomes)
            .map(|text| (text, "paper"));
        let texts = texts.chain([
            ("ink", "panel"),
            ("good", "panel"),
            ("bad", "panel"),
            ("ink", "heat"),
        ]);
        for (text, ground) in texts.chain(outcomes.map(|outcome| ("on-bar", outcome))) {
            assert!(
                contrast(text, ground) >= 4.5,
                "{text} on {ground}: {:.2}",
                contrast(text, ground)
            );
        }
        assert!(contrast("axis", "paper") >= 3.0);
    }
}

fn data() -> Json {
    serde_json::from_str(DATA).expect("JSON")
}

fn html(data: &Json) -> String {
    let page: Page = serde_json::from_value(data.clone()).expect("a page");
    page.html().expect("HTML")
}

fn parse(html: &str) -> Document<'_> {
    let options = ParsingOptions {
        allow_dtd: true,
        ..ParsingOptions::default()
    };
    Document::parse_with_options(html, options).expect("well-formed")
}

fn elements<'d, 'input: 'd>(
    document: &'d Document<'input>,
    name: &'d str,
) -> impl Iterator<Item = Node<'d, 'input>> {
    document
        .descendants()
        .filter(move |node| node.has_tag_name(name))
}

fn texts(document: &Document<'_>, name: &str) -> Vec<String> {
    let texts = elements(document, name).map(|node| node.text().unwrap_or_default().to_owned());
    texts.collect()
}

/// Every name is given once, and every name that is asked for is given.
fn check_references(document: &Document<'_>) {
    let mut names = BTreeSet::new();
    for name in document
        .descendants()
        .filter_map(|node| node.attribute("id"))
    {
        assert!(names.insert(name), "`{name}` twice");
    }
    for node in document.descendants() {
        for attribute in node.attributes() {
            let name = match attribute.name() {
                "aria-labelledby" | "aria-describedby" => attribute.value(),
                "href" => &attribute.value()[1..],
                _ => continue,
            };
            assert!(names.contains(name), "no `{name}`");
        }
    }
}

/// One heading of the first level, and none that skips a level.
fn check_headings(document: &Document<'_>) {
    let levels: Vec<u32> = document
        .descendants()
        .filter_map(|node| node.tag_name().name().strip_prefix('h')?.parse().ok())
        .collect();
    assert_eq!(levels.first(), Some(&1));
    assert_eq!(levels.iter().filter(|level| **level == 1).count(), 1);
    assert!(
        levels.windows(2).all(|pair| pair[1] <= pair[0] + 1),
        "{levels:?}"
    );
}

/// `data` with every text of its user's replaced.
fn with_texts(data: &Json, text: &str) -> Json {
    match data {
        Json::Array(items) => items.iter().map(|item| with_texts(item, text)).collect(),
        Json::Object(fields) => {
            let field = |(name, value): (&String, &Json)| {
                let chosen = ["measure", "outcome", "ruling", "unit", "sha256", "manifest"]
                    .contains(&name.as_str());
                let value = match value {
                    Json::String(_) if !chosen => Json::from(text),
                    other => with_texts(other, text),
                };
                (name.clone(), value)
            };
            Json::Object(fields.iter().map(field).collect())
        }
        other => other.clone(),
    }
}

/// WCAG's relative luminance of a colour in hexadecimal.
fn luminance(hex: &str) -> Option<f64> {
    let channel = |from: usize| {
        let value = f64::from(u8::from_str_radix(hex.get(from..from + 2)?, 16).ok()?) / 255.0;
        Some(if value <= 0.04045 {
            value / 12.92
        } else {
            ((value + 0.055) / 1.055).powf(2.4)
        })
    };
    Some(0.2126 * channel(0)? + 0.7152 * channel(2)? + 0.0722 * channel(4)?)
}
