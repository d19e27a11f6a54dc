//! From the last block's output to losses on a device, and back.
//!
//! In: tokens x hidden. Out: the loss of each predicted position and, if wanted, the gradient with respect to the input. As on the
//! processor ([`crate::model::head`]), logits exist only for a chunk of predicted positions at a time. They are f32: tiles of the output
//! matrix are widened, and multiplied on a GPU's matrix units, where what is stored in BF16 is exact.

use std::ops::Range;

use candle_core::{D, DType, Result, Tensor};

use super::kernels::{Call, Scalar};
use super::linear::in_precision;
use super::norm;
use super::place::Device;
use crate::model::config::Logits;
use crate::model::decoder::Decoder;
use crate::model::head::{Objective, Predicted};
use crate::model::linear::widen;
use crate::model::pack::{Pack, Prediction};

/// Bytes of logits that exist at once, for each of the few times that a chunk's matrix exists: enough for large products.
pub(super) const LOGITS_BYTES: usize = 256 << 20;

/// Bytes of the output matrix that are widened at once.
pub(super) const TILE_BYTES: usize = 256 << 20;

/// The final norm and the output matrix.
#[derive(Debug)]
pub(super) struct PlacedHead {
    /// Hidden, f32.
    pub(super) norm: Tensor,
    pub(super) epsilon: f32,
    /// Vocab x hidden, in the device's precision.
    pub(super) matrix: Tensor,
    /// What follows the matrix.
    pub(super) finish: Logits,
    pub(super) device: Device,
    /// Bytes of logits, and of widened rows, at once.
    pub(super) chunk_bytes: [usize; 2],
}

/// Predicted positions, normalized.
struct Gathered {
    /// Their numbers.
    positions: Tensor,
    /// Predictions x hidden, f32: before the norm, behind it rounded to the device's precision, and the rows' scales.
    rows: Tensor,
    normed: Tensor,
    scale: Tensor,
}

impl PlacedHead {
    /// Copies the head of `host` to `device`.
    pub(super) fn upload(host: &Decoder<'_>, device: &Device) -> Result<Self> {
        let view = &host.weights.head;
        let mut values = vec![0.0; view.elements()];
        widen(view, 0, &mut values);
        let norm = &host.weights.final_norm;
        Ok(Self {
            norm: device.upload(norm, &[norm.len()])?,
            epsilon: host.config.rms_norm_eps,
            matrix: in_precision(&values, [view.shape[0], norm.len()], device)?,
            finish: host.config.logits,
            device: device.clone(),
            chunk_bytes: [LOGITS_BYTES, TILE_BYTES],
        })
    }

    /// One with a cap, of a `norm` and a `matrix`.
    pub(super) fn example(norm: Tensor, matrix: Tensor, device: &Device) -> Self {
        Self {
            norm,
            epsilon: 1e-6,
            matrix,
            finish: Logits {
                scale: 2.0,
                softcap: Some(3.0),
            },
            device: device.clone(),
            chunk_bytes: [LOGITS_BYTES, TILE_BYTES],
        }
    }

    /// The loss of each prediction for `x` (tokens x hidden, f32) and, if it `wants_gradient`, that of their sum with respect to `x`.
    pub(super) fn losses(
        &self,
        x: &Tensor,
        pack: &Pack,
        objective: Objective<'_>,
        wants_gradient: bool,
    ) -> Result<(Vec<f64>, Option<Tensor>)> {
        if pack.predictions.is_empty() {
            let d = wants_gradient.then(|| x.zeros_like()).transpose()?;
            return Ok((Vec::new(), d));
        }
        let gathered = self.gathered(x, pack)?;
        let hidden = self.matrix.dim(1)?;
        let mut losses = Vec::with_capacity(pack.predictions.len());
        let mut d_normed = Vec::new();
        for range in self.chunks(pack)? {
            let normed = gathered.normed.narrow(0, range.start, range.len())?;
            let logits = self.logits(&normed)?;
            let d = match objective {
                Objective::NextToken { cap } => {
                    let predictions = &pack.predictions[range];
                    self.next_token(&logits, predictions, cap, wants_gradient, &mut losses)?
                }
                Objective::Divergence { reference } => {
                    let reference = &reference[range.start * hidden..range.end * hidden];
                    let reference = self.device.upload(reference, &[range.len(), hidden])?;
                    let reference = self.logits(&reference)?;
                    divergence(&logits, &reference, wants_gradient, &mut losses)?
                }
            };
            if let Some(d) = d {
                d_normed.push(self.back_to_hidden(d, &logits)?);
            }
        }
        let d = match d_normed.is_empty() {
            true => None,
            false => {
                let d_normed = Tensor::cat(&d_normed, 0)?;
                let Gathered {
                    positions,
                    rows,
                    scale,
                    ..
                } = &gathered;
                let d_rows = norm::backward(&d_normed, rows, &self.norm, scale, &self.device)?;
                Some(x.zeros_like()?.index_add(positions, &d_rows, 0)?)
            }
        };
        Ok((losses, d))
    }

    /// The loss and the likeliest token of each prediction for `x`.
    pub(super) fn predicted(&self, x: &Tensor, pack: &Pack) -> Result<Vec<Predicted>> {
        if pack.predictions.is_empty() {
            return Ok(Vec::new());
        }
        let normed = self.gathered(x, pack)?.normed;
        let mut losses = Vec::with_capacity(pack.predictions.len());
        let mut likeliest: Vec<u32> = Vec::with_capacity(pack.predictions.len());
        for range in self.chunks(pack)? {
            let logits = self.logits(&normed.narrow(0, range.start, range.len())?)?;
            likeliest.extend(logits.argmax(D::Minus1)?.to_vec1::<u32>()?);
            let predictions = &pack.predictions[range];
            self.next_token(&logits, predictions, f64::INFINITY, false, &mut losses)?;
        }
        let each = losses.into_iter().zip(likeliest);
        Ok(each
            .map(|(loss, likeliest)| Predicted { loss, likeliest })
            .collect())
    }

    /// The final norm's output at each predicted position, predictions x hidden: all that the logits depend on.
    pub(super) fn hidden(&self, x: &Tensor, pack: &Pack) -> Result<Vec<f32>> {
        self.gathered(x, pack)?.normed.flatten_all()?.to_vec1()
    }

    fn gathered(&self, x: &Tensor, pack: &Pack) -> Result<Gathered> {
        #[expect(
            clippy::cast_possible_truncation,
            reason = "a pack has far fewer tokens than 2^32"
        )]
        let positions: Vec<u32> = pack
            .predictions
            .iter()
            .map(|it| it.position as u32)
            .collect();
        let positions = Tensor::from_vec(positions, pack.predictions.len(), &self.device.handle)?;
        let rows = x.index_select(&positions, 0)?;
        let (normed, scale) = norm::forward(&rows, &self.norm, self.epsilon, &self.device)?;
        let rounded = normed.to_dtype(self.device.precision().dtype())?;
        Ok(Gathered {
            positions,
            rows,
            normed: rounded.to_dtype(DType::F32)?,
            scale,
        })
    }

    /// `finish(normed matrix^T)`, predictions x vocab, f32.
    fn logits(&self, normed: &Tensor) -> Result<Tensor> {
        let tiles = self.tiles()?;
        let products = tiles.map(|rows| normed.matmul(&self.widened(&rows)?.t()?));
        let products = Tensor::cat(&products.collect::<Result<Vec<_>>>()?, 1)?;
        let scaled = products.affine(f64::from(self.finish.scale), 0.0)?;
        match self.finish.softcap.map(f64::from) {
            None => Ok(scaled),
            Some(cap) => scaled.affine(1.0 / cap, 0.0)?.tanh()?.affine(cap, 0.0),
        }
    }

    /// The gradient with respect to the normalized rows, given `d`, that with respect to `logits`.
    fn back_to_hidden(&self, d: Tensor, logits: &Tensor) -> Result<Tensor> {
        let d = match self.finish.softcap.map(f64::from) {
            None => d,
            // The derivative 1 - (logit / cap)^2 of c tanh(x / c), from its value.
            Some(cap) => (d * logits.affine(1.0 / cap, 0.0)?.sqr()?.affine(-1.0, 1.0)?)?,
        };
        let d = d.affine(f64::from(self.finish.scale), 0.0)?;
        let mut sum: Option<Tensor> = None;
        for rows in self.tiles()? {
            let part = d.narrow(1, rows.start, rows.len())?.contiguous()?;
            let part = part.matmul(&self.widened(&rows)?)?;
            sum = Some(match sum {
                None => part,
                Some(sum) => (sum + part)?,
            });
        }
        sum.map_or_else(|| d.matmul(&self.matrix), Ok)
    }

    /// -ln softmax(row)\[token] of each row, added to `losses`; if it `wants_gradient`, softmax(row) - onehot(token), or 0 above the cap.
    fn next_token(
        &self,
        logits: &Tensor,
        predictions: &[Prediction],
        cap: f64,
        wants_gradient: bool,
        losses: &mut Vec<f64>,
    ) -> Result<Option<Tensor>> {
        let tokens: Vec<u32> = predictions.iter().map(|it| it.token).collect();
        let tokens = Tensor::from_vec(tokens, (predictions.len(), 1), &self.device.handle)?;
        let (rows, vocab) = logits.dims2()?;
        let (columns, d) = match self.device.kernels() {
            Some(kernels) => {
                let [parts, d] = kernels.launch(Call {
                    name: "next_token",
                    blocks: rows,
                    inputs: &[logits, &tokens],
                    scalars: &[Scalar::length(vocab)],
                    outputs: [&[rows, 3], &[rows, vocab]],
                })?;
                (parts, Some(d))
            }
            None => {
                let top = logits.max_keepdim(D::Minus1)?;
                let e = logits.broadcast_sub(&top)?.exp()?;
                let sum = e.sum_keepdim(D::Minus1)?;
                let score = logits.gather(&tokens, 1)?;
                let columns = Tensor::cat(&[&top, &sum, &score], 1)?;
                let d = match wants_gradient {
                    false => None,
                    true => {
                        let minus_one = tokens.to_dtype(DType::F32)?.affine(0.0, -1.0)?;
                        let p = e.broadcast_div(&sum)?;
                        Some(p.scatter_add(&tokens, &minus_one, 1)?)
                    }
                };
                (columns, d)
            }
        };
        let columns = columns.to_vec2::<f32>()?;
        let of_row = |row: &Vec<f32>| {
            let [top, sum, score] = [row[0], row[1], row[2]].map(f64::from);
            top + sum.ln() - score
        };
        let found: Vec<f64> = columns.iter().map(of_row).collect();
        losses.extend_from_slice(&found);
        let Some(d) = d.filter(|_| wants_gradient) else {
            return Ok(None);
        };
        if found.iter().all(|&loss| loss <= cap) {
            return Ok(Some(d));
        }
        let kept: Vec<f32> = found
            .iter()
            .map(|&loss| f32::from(u8::from(loss <= cap)))
            .collect();
        d.broadcast_mul(&self.device.upload(&kept, &[kept.len(), 1])?)
            .map(Some)
    }

    /// Predictions of `pack` whose logits exist at once.
    fn chunks(&self, pack: &Pack) -> Result<impl Iterator<Item = Range<usize>>> {
        let chunk = (self.chunk_bytes[0] / 4 / self.matrix.dim(0)?).max(1);
        let count = pack.predictions.len();
        let firsts = (0..count).step_by(chunk);
        Ok(firsts.map(move |first| first..count.min(first + chunk)))
    }

    /// Rows of the matrix that are widened at once.
    fn tiles(&self) -> Result<impl Iterator<Item = Range<usize>>> {
        let (vocab, hidden) = self.matrix.dims2()?;
        let rows = (self.chunk_bytes[1] / 4 / hidden).max(1);
        let firsts = (0..vocab).step_by(rows);
        Ok(firsts.map(move |first| first..vocab.min(first + rows)))
    }

    fn widened(&self, rows: &Range<usize>) -> Result<Tensor> {
        let rows = self.matrix.narrow(0, rows.start, rows.len())?;
        rows.to_dtype(DType::F32)
    }
}

/// KL(softmax(reference) || softmax(row)) of each row, added to `losses`; if it `wants_gradient`, softmax(row) - softmax(reference).
fn divergence(
    logits: &Tensor,
    reference: &Tensor,
    wants_gradient: bool,
    losses: &mut Vec<f64>,
) -> Result<Option<Tensor>> {
    let log_softmax = |x: &Tensor| {
        let top = x.max_keepdim(D::Minus1)?;
        let shifted = x.broadcast_sub(&top)?;
        let sum = shifted.exp()?.sum_keepdim(D::Minus1)?;
        shifted.broadcast_sub(&sum.log()?)
    };
    let (log_q, log_p) = (log_softmax(logits)?, log_softmax(reference)?);
    let p = log_p.exp()?;
    let of_rows: Vec<f32> = (&p * (log_p - &log_q)?)?.sum(D::Minus1)?.to_vec1()?;
    losses.extend(of_rows.into_iter().map(f64::from));
    match wants_gradient {
        true => Ok(Some((log_q.exp()? - p)?)),
        false => Ok(None),
    }
}

#[cfg(test)]
mod tests {
    use super::super::place::DeviceName;
    use super::*;

    #[test]
    fn chunks_and_tiles_do_not_matter() {
        let device = Device::open(DeviceName::Candle).unwrap();
        let wave = |count: u16, step: f32| -> Vec<f32> {
            (0..count).map(|i| (f32::from(i) * step).sin()).collect()
        };
        let (vocab, hidden) = (11, 4);
        let norm = device.upload(&[1.0, 0.5, 2.0, 1.5], &[hidden]).unwrap();
        let matrix = device.upload(&wave(44, 1.3), &[vocab, hidden]).unwrap();
        let head = |chunk_bytes| PlacedHead {
            chunk_bytes,
            ..PlacedHead::example(norm.clone(), matrix.clone(), &device)
        };
        let predictions = [(0, 3), (2, 10), (3, 0), (6, 7), (7, 5)];
        let prediction = |&(position, token): &(usize, u32)| Prediction { position, token };
        let pack = Pack {
            predictions: predictions.iter().map(prediction).collect(),
            ..Pack::default()
        };
        let x = device.upload(&wave(32, 0.9), &[8, hidden]).unwrap();
        let reference = wave(20, 0.4);
        for objective in [
            Objective::NextToken { cap: 3.0 },
            Objective::Divergence {
                reference: &reference,
            },
        ] {
            let found = |chunk_bytes| {
                let (losses, d) = head(chunk_bytes)
                    .losses(&x, &pack, objective, true)
                    .unwrap();
                let d = d.unwrap().flatten_all().unwrap();
                (losses, d.to_vec1::<f32>().unwrap())
            };
            let (losses, d) = found([1 << 20; 2]);
            assert!(
                d[4..8].iter().all(|&x| x == 0.0),
                "nothing is predicted there"
            );
            // Rows of logits: 1, 2, 3; rows of the matrix: 1, 3, 11.
            for chunk_bytes in [[1, 1], [4 * 11 * 2, 4 * 4 * 3], [4 * 11 * 3, 1 << 20]] {
                let (other_losses, other_d) = found(chunk_bytes);
                let near = |a: f64, b: f64| (a - b).abs() < 1e-5;
                assert!(losses.iter().zip(other_losses).all(|(a, b)| near(*a, b)));
                let pairs = d.iter().zip(other_d);
                assert!(
                    pairs
                        .into_iter()
                        .all(|(a, b)| near(f64::from(*a), f64::from(b)))
                );
            }
        }
    }
}
