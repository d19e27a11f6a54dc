//! Causal attention over a pack on a device: softmax(scale q k^T) v, block-diagonal, optionally windowed or soft-capped.
//!
//! In: query, key and value heads. Out: attended values, and the gradients of all three. A pack is cut into stretches of queries, each
//! with the keys from the first to the last that any of them sees and a mask between them, so that no tokens x tokens matrix exists. The
//! backward makes a stretch's probabilities again. All of it is f32: what is stored in BF16 is exact in the products of f32 that GPUs do
//! on their matrix units (TF32), so that scores are not rounded.

use std::ops::Range;

use candle_core::{D, Result, Tensor};

use super::kernels::{Call, Scalar};
use super::place::Device;
use super::rope::HeadTensors;
use crate::model::kernels::attention::{Pattern, Scores};
use crate::model::kernels::rope::Heads;

/// Queries of a stretch: few enough that short sequences multiply little that they do not see, enough for a GPU to be busy.
pub(super) const STRETCH: usize = 256;

/// Queries that are handled together.
#[derive(Clone, Debug)]
pub(super) struct Stretch {
    queries: Range<usize>,
    /// All that any of them sees, with what lies between.
    keys: Range<usize>,
    /// 0 where a query sees a key, else negative infinity: queries x keys.
    mask: Tensor,
}

impl Stretch {
    /// Cuts the tokens of `pattern` into stretches of at most `length` queries.
    pub(super) fn cut(pattern: Pattern<'_>, length: usize, device: &Device) -> Result<Vec<Self>> {
        let tokens = pattern.tokens();
        let firsts = (0..tokens).step_by(length);
        firsts
            .map(|first| {
                let queries = first..tokens.min(first + length);
                let seen: Vec<_> = queries.clone().map(|query| pattern.seen(query)).collect();
                let runs = || seen.iter().flatten().filter(|run| !run.is_empty());
                let lowest = runs().map(|run| run.start).min().unwrap_or(0);
                let keys = lowest..queries.end;
                let mut mask = vec![f32::NEG_INFINITY; queries.len() * keys.len()];
                for (row, runs) in mask.chunks_exact_mut(keys.len()).zip(&seen) {
                    for run in runs.iter().filter(|run| !run.is_empty()) {
                        row[run.start - lowest..run.end - lowest].fill(0.0);
                    }
                }
                let mask = device.upload(&mask, &[queries.len(), keys.len()])?;
                Ok(Self {
                    queries,
                    keys,
                    mask,
                })
            })
            .collect()
    }
}

/// How heads are multiplied.
#[derive(Clone, Copy, Debug)]
pub(super) struct Attention<'a> {
    pub(super) heads: Heads,
    pub(super) scores: Scores,
    pub(super) stretches: &'a [Stretch],
    pub(super) device: &'a Device,
}

/// A stretch's products of queries and keys, and what softmax makes of them: query heads x queries x keys.
struct Probabilities {
    products: Tensor,
    p: Tensor,
}

impl Attention<'_> {
    /// Tokens x (query heads x dim), f32.
    pub(super) fn forward(self, heads: &HeadTensors) -> Result<Tensor> {
        let of_stretch = |stretch: &Stretch| {
            let (q, k, v) = self.operands(heads, stretch)?;
            let Probabilities { p, .. } = self.probabilities(stretch, &q, &k)?;
            self.rows_of(&self.grouped(&p)?.matmul(&v)?, stretch)
        };
        let rows: Vec<Tensor> = self
            .stretches
            .iter()
            .map(of_stretch)
            .collect::<Result<_>>()?;
        Tensor::cat(&rows, 0)
    }

    /// The gradient with respect to `heads`, given that with respect to the output. With p the probabilities: dv = p^T do; dp = do v^T;
    /// ds = p (dp - rowsum(dp p)), times 1 - tanh^2 under a cap; dq = ds k; dk = ds^T q.
    pub(super) fn backward(self, d_rows: &Tensor, heads: &HeadTensors) -> Result<HeadTensors> {
        let tokens = d_rows.dim(0)?;
        let mut d_query = Vec::with_capacity(self.stretches.len());
        let mut d_key: Option<Tensor> = None;
        let mut d_value: Option<Tensor> = None;
        for stretch in self.stretches {
            let (q, k, v) = self.operands(heads, stretch)?;
            let Probabilities { products, p } = self.probabilities(stretch, &q, &k)?;
            let d = self.heads_of(d_rows, stretch)?;
            let transposed = |x: &Tensor| self.grouped(x)?.transpose(1, 2);
            // Where keys of other stretches are, nothing is added.
            let all_keys = |part: Tensor| {
                part.pad_with_zeros(1, stretch.keys.start, tokens - stretch.keys.end)
            };
            add(&mut d_value, all_keys(transposed(&p)?.matmul(&d)?)?)?;
            let dp = d.matmul(&v.transpose(1, 2)?)?.reshape(p.shape())?;
            let ds = self.d_products(&products, &p, &dp)?;
            let dq = self.grouped(&ds)?.matmul(&k)?;
            d_query.push(dq.reshape((self.heads.query, stretch.queries.len(), self.heads.dim))?);
            add(&mut d_key, all_keys(transposed(&ds)?.matmul(&q)?)?)?;
        }
        let nothing = || heads.key.zeros_like();
        Ok(HeadTensors {
            query: Tensor::cat(&d_query, 1)?,
            key: d_key.map_or_else(nothing, Ok)?,
            value: d_value.map_or_else(nothing, Ok)?,
        })
    }

    /// Queries, those of a group one after the other, keys and values of a stretch: key-value heads x rows x dim, f32.
    fn operands(self, heads: &HeadTensors, stretch: &Stretch) -> Result<(Tensor, Tensor, Tensor)> {
        let part = |x: &Tensor, range: &Range<usize>| {
            let part = x.narrow(1, range.start, range.len())?.contiguous()?;
            part.to_dtype(candle_core::DType::F32)
        };
        Ok((
            self.grouped(&part(&heads.query, &stretch.queries)?)?,
            part(&heads.key, &stretch.keys)?,
            part(&heads.value, &stretch.keys)?,
        ))
    }

    fn probabilities(self, stretch: &Stretch, q: &Tensor, k: &Tensor) -> Result<Probabilities> {
        let products = q.matmul(&k.transpose(1, 2)?)?;
        let (rows, cols) = stretch.mask.dims2()?;
        let products = products.reshape((self.heads.query, rows, cols))?;
        if let Some(kernels) = self.device.kernels() {
            let [p] = kernels.launch(Call {
                name: "attention_forward",
                blocks: self.heads.query * rows,
                inputs: &[&products, &stretch.mask],
                scalars: &[
                    Scalar::Float(self.scores.scale),
                    self.cap(),
                    Scalar::length(rows),
                    Scalar::length(cols),
                ],
                outputs: [&[self.heads.query, rows, cols]],
            })?;
            return Ok(Probabilities { products, p });
        }
        let scaled = products.affine(f64::from(self.scores.scale), 0.0)?;
        let scores = match self.scores.softcap.map(f64::from) {
            None => scaled,
            Some(cap) => {
                let t = scaled.affine(1.0 / cap, 0.0)?.tanh()?;
                t.affine(cap, 0.0)?
            }
        };
        let p = softmax(&scores.broadcast_add(&stretch.mask)?)?;
        Ok(Probabilities { products, p })
    }

    /// The gradient with respect to a stretch's products, given `dp`, that with respect to its probabilities.
    fn d_products(self, products: &Tensor, p: &Tensor, dp: &Tensor) -> Result<Tensor> {
        let (heads, rows, cols) = p.dims3()?;
        if let Some(kernels) = self.device.kernels() {
            let [d] = kernels.launch(Call {
                name: "attention_backward",
                blocks: heads * rows,
                inputs: &[products, p, dp],
                scalars: &[
                    Scalar::Float(self.scores.scale),
                    self.cap(),
                    Scalar::length(cols),
                ],
                outputs: [&[heads, rows, cols]],
            })?;
            return Ok(d);
        }
        let drift = (dp * p)?.sum_keepdim(D::Minus1)?;
        let ds = (p * dp.broadcast_sub(&drift)?)?;
        let scale = f64::from(self.scores.scale);
        let ds = match self.scores.softcap.map(f64::from) {
            None => ds,
            Some(cap) => {
                let t = products.affine(scale / cap, 0.0)?.tanh()?;
                (ds * t.sqr()?.affine(-1.0, 1.0)?)?
            }
        };
        ds.affine(scale, 0.0)
    }

    /// 0 without one.
    fn cap(self) -> Scalar {
        Scalar::Float(self.scores.softcap.unwrap_or(0.0))
    }

    /// Query heads x rows x cols as key-value heads x (group x rows) x cols.
    fn grouped(self, x: &Tensor) -> Result<Tensor> {
        let (heads, rows, cols) = x.dims3()?;
        let group = heads / self.heads.key_value;
        x.reshape((self.heads.key_value, group * rows, cols))
    }

    /// Heads of a stretch's queries, as [`Self::grouped`] leaves them, as rows of tokens.
    fn rows_of(self, x: &Tensor, stretch: &Stretch) -> Result<Tensor> {
        let (heads, rows, dim) = (self.heads.query, stretch.queries.len(), self.heads.dim);
        let x = x
            .reshape((heads, rows, dim))?
            .transpose(0, 1)?
            .contiguous()?;
        x.reshape((rows, heads * dim))
    }

    /// The transpose of [`Self::rows_of`].
    fn heads_of(self, rows: &Tensor, stretch: &Stretch) -> Result<Tensor> {
        let queries = &stretch.queries;
        let rows = rows.narrow(0, queries.start, queries.len())?.contiguous()?;
        let rows = rows.reshape((queries.len(), self.heads.query, self.heads.dim))?;
        self.grouped(&rows.transpose(0, 1)?.contiguous()?)
    }
}

/// Over the last dimension, in f32.
fn softmax(scores: &Tensor) -> Result<Tensor> {
    let top = scores.max_keepdim(D::Minus1)?;
    let e = scores.broadcast_sub(&top)?.exp()?;
    e.broadcast_div(&e.sum_keepdim(D::Minus1)?)
}

fn add(sum: &mut Option<Tensor>, more: Tensor) -> Result<()> {
    *sum = Some(match sum.take() {
        None => more,
        Some(sum) => (sum + more)?,
    });
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::super::place::DeviceName;
    use super::*;
    use crate::model::kernels::rope::Pairs;

    /// Uneven sequences behind a shared beginning.
    const STARTS: [usize; 4] = [3, 8, 9, 15];

    #[test]
    fn the_length_of_a_stretch_does_not_matter() {
        let device = Device::open(DeviceName::Candle).unwrap();
        let heads = Heads {
            query: 4,
            key_value: 2,
            dim: 4,
            pairs: Pairs::Halves,
        };
        let wave = |count: usize, step: f64| {
            let elements = count * 15 * 4;
            let x = Tensor::arange(0u32, u32::try_from(elements).unwrap(), &device.handle);
            let x = x.unwrap().to_dtype(candle_core::DType::F32).unwrap();
            let x = x.affine(step, 0.3).unwrap().sin().unwrap();
            x.reshape((count, 15, 4)).unwrap()
        };
        let tensors = HeadTensors {
            query: wave(4, 1.7),
            key: wave(2, 2.3),
            value: wave(2, 0.9),
        };
        let d = wave(4, 1.1).reshape((15, 16)).unwrap();
        for (window, softcap) in [(None, None), (Some(2), Some(1.5)), (Some(4), None)] {
            let found = |length| {
                let pattern = Pattern {
                    starts: &STARTS,
                    window,
                };
                let stretches = Stretch::cut(pattern, length, &device).unwrap();
                let attention = Attention {
                    heads,
                    scores: Scores {
                        scale: 0.5,
                        softcap,
                    },
                    stretches: &stretches,
                    device: &device,
                };
                let out = attention.forward(&tensors).unwrap();
                let d = attention.backward(&d, &tensors).unwrap();
                [out, d.query, d.key, d.value].map(|x| x.flatten_all().unwrap())
            };
            let whole = found(15);
            for length in [1, 4, 7, 14] {
                for (x, y) in found(length).iter().zip(&whole) {
                    let off = (x - y).unwrap().abs().unwrap().max(0).unwrap();
                    assert!(
                        off.to_scalar::<f32>().unwrap() < 1e-5,
                        "{window:?} {length}"
                    );
                }
            }
        }
    }
}
