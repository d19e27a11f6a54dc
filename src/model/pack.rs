//! Packed batches: encoded rows end to end, without padding.
//!
//! In: rows of token ids with a mask of the tokens the loss is taken on. Out: one flat sequence that attention treats as
//! block-diagonal, and the list of positions whose logits are needed. No padded token exists, so none is multiplied; and what all
//! rows begin with, as a template or an instruction does, can be there once for all of them.

/// One row as token ids, with the tokens that are to be predicted marked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct EncodedRow {
    /// Prompt, response and end-of-sequence token, in order.
    pub tokens: Vec<u32>,
    /// For each token, whether the loss is taken on it. The first token is predicted by nothing, so its mark is ignored.
    pub in_loss: Vec<bool>,
}

impl EncodedRow {
    /// How many tokens of this row the loss is taken on.
    pub fn predicted(&self) -> usize {
        self.in_loss
            .iter()
            .skip(1)
            .filter(|&&marked| marked)
            .count()
    }
}

/// A place whose logits are compared with a token.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Prediction {
    /// Index into [`Pack::tokens`]; the logits computed there predict the next token.
    pub position: usize,
    /// The token that comes next.
    pub token: u32,
}

/// Rows end to end.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Pack {
    /// All token ids: what every row begins with, and then what is left of each.
    pub tokens: Vec<u32>,
    /// Where each row's own tokens begin in `tokens`, and, last, where the last one's end: one longer than the number of rows. What is before the
    /// first is the beginning of every row.
    pub starts: Vec<usize>,
    /// Where a loss is taken, in ascending order of position.
    pub predictions: Vec<Prediction>,
}

impl Pack {
    /// Lays `rows` end to end, in their order, each whole.
    pub fn of<'a>(rows: impl IntoIterator<Item = &'a EncodedRow>) -> Self {
        Self::behind(0, rows)
    }

    /// Lays `rows` end to end, in their order, with their common beginning once: the same losses and gradients for less work, but
    /// for sums in another order. Only for decoders that [share beginnings](super::Decoder::shares_beginnings).
    pub fn sharing(rows: &[&EncodedRow]) -> Self {
        Self::behind(common_beginning(rows.iter().copied()), rows.iter().copied())
    }

    /// The same rows as two packs of about as many tokens, in order. Of one row, itself and nothing.
    pub(super) fn halves(&self) -> [Self; 2] {
        let (shared, end) = (self.starts[0], self.tokens.len());
        let inner = 1..self.starts.len() - 1;
        let middle = inner.min_by_key(|&row| (2 * self.starts[row]).abs_diff(shared + end));
        let middle = middle.unwrap_or(self.starts.len() - 1);
        let at = self.starts[middle];
        let predicted = self.predictions.partition_point(|it| it.position < at);
        let back = at - shared;
        [
            Self {
                tokens: self.tokens[..at].to_vec(),
                starts: self.starts[..=middle].to_vec(),
                predictions: self.predictions[..predicted].to_vec(),
            },
            Self {
                tokens: [&self.tokens[..shared], &self.tokens[at..]].concat(),
                starts: self.starts[middle..].iter().map(|it| it - back).collect(),
                predictions: self.predictions[predicted..]
                    .iter()
                    .map(|it| Prediction {
                        position: it.position - back,
                        ..*it
                    })
                    .collect(),
            },
        ]
    }

    /// `rows`, of which the first `shared` tokens are the same.
    fn behind<'a>(shared: usize, rows: impl IntoIterator<Item = &'a EncodedRow>) -> Self {
        let mut pack = Self {
            starts: vec![shared],
            ..Self::default()
        };
        for row in rows {
            if pack.tokens.is_empty() {
                pack.tokens.extend_from_slice(&row.tokens[..shared]);
            }
            let start = pack.tokens.len();
            pack.tokens.extend_from_slice(&row.tokens[shared..]);
            pack.starts.push(pack.tokens.len());
            let predicted = (1..row.tokens.len()).filter(|&i| row.in_loss[i]);
            pack.predictions.extend(predicted.map(|i| Prediction {
                position: start + i - shared - 1,
                token: row.tokens[i],
            }));
        }
        pack
    }
}

/// How many tokens `rows` have in common at their beginning, as far as it pays to compute them once: no fewer than eight, or none.
///
/// Each row keeps a token of its own, and the one whose logits are its first prediction.
pub fn common_beginning<'a>(rows: impl IntoIterator<Item = &'a EncodedRow>) -> usize {
    shared_length(rows.into_iter().map(|row| {
        let first = (1..row.tokens.len()).find(|&i| row.in_loss[i]);
        &row.tokens[..first.unwrap_or(row.tokens.len()).saturating_sub(1)]
    }))
}

/// How many tokens all of `beginnings` begin with, if they are several and it pays to compute those once.
pub(super) fn shared_length<'a>(beginnings: impl IntoIterator<Item = &'a [u32]>) -> usize {
    let mut beginnings = beginnings.into_iter();
    let (Some(mut common), Some(second)) = (beginnings.next(), beginnings.next()) else {
        return 0;
    };
    for other in std::iter::once(second).chain(beginnings) {
        let alike = common.iter().zip(other).take_while(|(a, b)| a == b);
        common = &common[..alike.count()];
    }
    match common.len() {
        few if few < LEAST_SHARED => 0,
        enough => enough,
    }
}

/// Tokens that are worth attending to apart from the others.
const LEAST_SHARED: usize = 8;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn predictions_point_one_token_back_and_never_across_rows() {
        let a = EncodedRow {
            tokens: vec![5, 6, 7],
            in_loss: vec![false, false, true],
        };
        let b = EncodedRow {
            tokens: vec![8, 9],
            in_loss: vec![true, true],
        };
        let pack = Pack::of([&a, &b]);
        assert_eq!(pack.tokens, [5, 6, 7, 8, 9]);
        assert_eq!(pack.starts, [0, 3, 5]);
        assert_eq!(
            pack.predictions,
            [
                Prediction {
                    position: 1,
                    token: 7
                },
                Prediction {
                    position: 3,
                    token: 9
                }
            ]
        );
        assert_eq!((a.predicted(), b.predicted()), (1, 1));
    }

    #[test]
    fn halves_are_packs_of_the_rows_on_either_side() {
        let row = |own: std::ops::Range<u32>| EncodedRow {
            tokens: (100..110).chain(own.clone()).collect(),
            in_loss: (0..10 + own.len()).map(|i| i > 10).collect(),
        };
        let rows = [row(0..3), row(3..9), row(9..11), row(11..15)];
        let whole: Vec<&EncodedRow> = rows.iter().collect();
        for pack in [Pack::of(&rows), Pack::sharing(&whole)] {
            let joined = |rows: &[&EncodedRow]| match pack.starts[0] {
                0 => Pack::of(rows.iter().copied()),
                shared => Pack::behind(shared, rows.iter().copied()),
            };
            let halves = pack.halves();
            assert_eq!(halves, [joined(&whole[..2]), joined(&whole[2..])]);
            assert_eq!(
                halves[1].halves(),
                [joined(&whole[2..3]), joined(&whole[3..])]
            );
        }
    }

    #[test]
    fn a_common_beginning_stands_once_and_leaves_each_row_its_first_prediction() {
        let row = |own: &[u32], predicted: usize| {
            let tokens: Vec<u32> = (100..110).chain(own.iter().copied()).collect();
            let in_loss = (0..tokens.len()).map(|i| i + predicted >= tokens.len());
            EncodedRow {
                in_loss: in_loss.collect(),
                tokens,
            }
        };
        let (a, b) = (row(&[1, 2, 3], 1), row(&[4, 5], 1));
        let pack = Pack::sharing(&[&a, &b]);
        let beginning: Vec<u32> = (100..110).collect();
        assert_eq!(pack.tokens, [&beginning[..], &[1, 2, 3, 4, 5]].concat());
        assert_eq!(pack.starts, [10, 13, 15]);
        let places: Vec<usize> = pack.predictions.iter().map(|it| it.position).collect();
        assert_eq!(places, [11, 13]);
        // The same request twice: what predicts each row's first token is its own.
        let (a, b) = (row(&[1, 2], 2), row(&[3, 4], 2));
        let pack = Pack::sharing(&[&a, &b]);
        assert_eq!(pack.starts, [9, 12, 15]);
        let of_first: Vec<_> = pack.predictions.iter().step_by(2).collect();
        let first = |position| Prediction {
            position,
            token: pack.tokens[position + 1],
        };
        assert_eq!(of_first, [&first(9), &first(12)]);
        // A row alone, too little in common, and predictions from the start.
        assert_eq!(common_beginning([&a]), 0);
        assert_eq!(common_beginning([&row(&[1], 4), &row(&[2], 5)]), 0);
        assert_eq!(Pack::sharing(&[&a]), Pack::of([&a]));
    }
}
