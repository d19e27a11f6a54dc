//! Packed batches: encoded rows end to end, without padding.
//!
//! In: rows of token ids with a mask of the tokens the loss is taken on. Out: one flat sequence that attention treats as
//! block-diagonal, and the list of positions whose logits are needed. No padded token exists, so none is multiplied.

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
    /// All token ids, row after row.
    pub tokens: Vec<u32>,
    /// Where each row begins in `tokens`, and, last, where the last one ends: one longer than the number of rows.
    pub starts: Vec<usize>,
    /// Where a loss is taken, in ascending order of position.
    pub predictions: Vec<Prediction>,
}

impl Pack {
    /// Lays `rows` end to end, in their order.
    pub fn of<'a>(rows: impl IntoIterator<Item = &'a EncodedRow>) -> Self {
        let mut pack = Self {
            starts: vec![0],
            ..Self::default()
        };
        for row in rows {
            let start = pack.tokens.len();
            pack.tokens.extend_from_slice(&row.tokens);
            pack.starts.push(pack.tokens.len());
            pack.predictions
                .extend(
                    (1..row.tokens.len())
                        .filter(|&i| row.in_loss[i])
                        .map(|i| Prediction {
                            position: start + i - 1,
                            token: row.tokens[i],
                        }),
                );
        }
        pack
    }
}

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
}
