//! Text from strangers, made to show what it is.
//!
//! A request may hold characters that reorder a line (so that what is read is not what is there), hide text in it, or are not
//! allowed in HTML at all. They are spelled out; escaping is the template's.

use std::borrow::Cow;
use std::fmt::Write;

/// `text` with every character that cannot be seen, other than white space and joiners, as `[U+202E]`. Lines end in `\n`.
pub(super) fn visible(text: &str) -> Cow<'_, str> {
    if !text.contains(|character| character == '\r' || is_hidden(character)) {
        return Cow::Borrowed(text);
    }
    let mut shown = String::with_capacity(text.len());
    let mut characters = text.chars().peekable();
    while let Some(character) = characters.next() {
        match character {
            '\r' if characters.peek() == Some(&'\n') => {}
            '\r' => shown.push('\n'),
            hidden if is_hidden(hidden) => {
                // Writing to a string does not fail.
                let _ = write!(shown, "[U+{:04X}]", u32::from(hidden));
            }
            seen => shown.push(seen),
        }
    }
    Cow::Owned(shown)
}

/// Whether a character is a control, changes the direction of others, takes no space, or belongs to no text.
fn is_hidden(character: char) -> bool {
    let code = u32::from(character);
    match character {
        '\n' | '\t' | '\r' => false,
        _ if character.is_control() => true,
        // Marks, embeddings, overrides and isolates of direction; line and paragraph separators.
        '\u{61C}' | '\u{200E}' | '\u{200F}' | '\u{2028}'..='\u{202E}' => true,
        // Without width or form; the joiners U+200C and U+200D are spelling in many languages.
        '\u{180E}' | '\u{200B}' | '\u{2060}'..='\u{206F}' | '\u{FEFF}' => true,
        '\u{FFF9}'..='\u{FFFB}' | '\u{FDD0}'..='\u{FDEF}' => true,
        // Tags and selectors, in which a whole text can hide.
        '\u{E0000}'..='\u{E0FFF}' => true,
        _ => code & 0xFFFE == 0xFFFE,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_reorders_or_hides_is_spelled_out() {
        for (text, shown) in [
            ("a\u{202E}b", "a[U+202E]b"),
            ("\u{2066}x\u{2069}", "[U+2066]x[U+2069]"),
            (
                "a\u{0}\u{1B}[31m\u{7F}\u{85}",
                "a[U+0000][U+001B][31m[U+007F][U+0085]",
            ),
            ("\u{E0041}\u{FEFF}\u{200B}", "[U+E0041][U+FEFF][U+200B]"),
            ("\u{FFFE}\u{10FFFF}\u{FDD0}", "[U+FFFE][U+10FFFF][U+FDD0]"),
            ("\u{2028}", "[U+2028]"),
        ] {
            assert_eq!(visible(text), shown);
        }
    }

    #[test]
    fn what_is_writing_stays() {
        for text in [
            "",
            "tab\tand\nline",
            "שלום",
            "नमस्ते",
            "می\u{200C}خواهم",
            "👩\u{200D}💻 ❤\u{FE0F}",
        ] {
            assert_eq!(visible(text), text);
        }
    }

    #[test]
    fn lines_end_in_one_way() {
        assert_eq!(visible("a\r\nb\rc\n"), "a\nb\nc\n");
    }
}
