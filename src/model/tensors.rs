//! A list of f32 tensors, one for each target: weights, a gradient, or a perturbation, depending on who holds it.
//!
//! The optimizer's vector space. Every sum over elements runs in f64, tensor after tensor in the list's order, in chunks of
//! a fixed size, so no result depends on the number of threads.

use std::sync::atomic::{AtomicU64, Ordering};

use rayon::prelude::*;

/// Elements summed by one task; fixed, so that partial sums are always the same.
const CHUNK: usize = 1 << 16;

/// One f32 tensor for each target, in the targets' order.
#[derive(Clone, Debug, Default)]
pub struct TargetTensors {
    tensors: Vec<Vec<f32>>,
    content: Content,
}

/// Tells contents apart without reading them: of two lists with the same one, all elements are the same. A clone has its original's, and
/// whatever may write draws a new one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Content(u64);

impl Content {
    fn new() -> Self {
        static NEXT: AtomicU64 = AtomicU64::new(0);
        Self(NEXT.fetch_add(1, Ordering::Relaxed))
    }
}

impl Default for Content {
    fn default() -> Self {
        Self::new()
    }
}

impl PartialEq for TargetTensors {
    fn eq(&self, other: &Self) -> bool {
        self.tensors == other.tensors
    }
}

impl TargetTensors {
    /// Takes the elements of each target, row-major.
    pub fn new(tensors: Vec<Vec<f32>>) -> Self {
        Self {
            tensors,
            content: Content::new(),
        }
    }

    /// What tells these elements from others.
    pub(super) fn content(&self) -> Content {
        self.content
    }

    /// Zeros in the shape of `self`.
    #[must_use]
    pub fn zeros_like(&self) -> Self {
        Self::new(self.iter().map(|t| vec![0.0; t.len()]).collect())
    }

    /// The elements of each target.
    pub fn iter(&self) -> impl ExactSizeIterator<Item = &[f32]> {
        self.tensors.iter().map(Vec::as_slice)
    }

    /// The elements of each target, to write to.
    pub fn iter_mut(&mut self) -> impl ExactSizeIterator<Item = &mut [f32]> {
        self.content = Content::new();
        self.tensors.iter_mut().map(Vec::as_mut_slice)
    }

    /// The elements of target number `index`.
    pub fn tensor(&self, index: usize) -> &[f32] {
        &self.tensors[index]
    }

    /// The elements of target number `index`, to write to.
    pub fn tensor_mut(&mut self, index: usize) -> &mut [f32] {
        self.content = Content::new();
        &mut self.tensors[index]
    }

    /// Drops the targets whose numbers `keeps` does not keep.
    pub fn retain(&mut self, keeps: impl Fn(usize) -> bool) {
        self.content = Content::new();
        let mut number = 0..;
        self.tensors.retain(|_| number.next().is_some_and(&keeps));
    }

    /// Elements in all targets together.
    pub fn elements(&self) -> usize {
        self.tensors.iter().map(Vec::len).sum()
    }

    /// Sets every element to 0.
    pub fn clear(&mut self) {
        self.par_chunks_mut().for_each(|chunk| chunk.fill(0.0));
    }

    /// Copies `other`'s elements.
    pub fn copy_from(&mut self, other: &Self) {
        self.zip_mut(other, |x, y| *x = y);
    }

    /// Multiplies every element by `factor`.
    pub fn scale(&mut self, factor: f32) {
        self.par_chunks_mut()
            .for_each(|chunk| chunk.iter_mut().for_each(|x| *x *= factor));
    }

    /// Adds `factor * other`.
    pub fn add_scaled(&mut self, factor: f32, other: &Self) {
        self.zip_mut(other, |x, y| *x += factor * y);
    }

    /// Applies `update` to each pair of elements of `self` and `other`.
    pub fn zip_mut(&mut self, other: &Self, update: impl Fn(&mut f32, f32) + Sync) {
        assert_eq!(
            self.tensors.len(),
            other.tensors.len(),
            "tensors of the same targets"
        );
        self.content = Content::new();
        for (x, y) in self.tensors.iter_mut().zip(&other.tensors) {
            assert_eq!(x.len(), y.len(), "tensors of the same targets");
            x.par_chunks_mut(CHUNK)
                .zip(y.par_chunks(CHUNK))
                .for_each(|(x, y)| x.iter_mut().zip(y).for_each(|(x, &y)| update(x, y)));
        }
    }

    /// Sum over all elements of `self * other`, in f64.
    pub fn dot(&self, other: &Self) -> f64 {
        self.iter().zip(other.iter()).map(|(x, y)| dot(x, y)).sum()
    }

    /// Euclidean norm over all targets together.
    pub fn norm(&self) -> f64 {
        self.dot(self).sqrt()
    }

    /// Euclidean norm of each target.
    pub fn norms(&self) -> Vec<f64> {
        self.iter().map(|x| dot(x, x).sqrt()).collect()
    }

    fn par_chunks_mut(&mut self) -> impl ParallelIterator<Item = &mut [f32]> {
        self.content = Content::new();
        self.tensors
            .par_iter_mut()
            .flat_map(|x| x.par_chunks_mut(CHUNK))
    }
}

fn dot(x: &[f32], y: &[f32]) -> f64 {
    assert_eq!(x.len(), y.len(), "tensors of the same targets");
    let partial: Vec<f64> = x
        .par_chunks(CHUNK)
        .zip(y.par_chunks(CHUNK))
        .map(|(x, y)| {
            x.iter()
                .zip(y)
                .map(|(&x, &y)| f64::from(x) * f64::from(y))
                .sum()
        })
        .collect();
    partial.into_iter().sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pair() -> TargetTensors {
        TargetTensors::new(vec![vec![3.0; 3], vec![0.5, -1.0]])
    }

    #[test]
    fn norms_run_over_one_target_or_all() {
        assert_eq!(pair().norm(), (27.0f64 + 1.25).sqrt());
        assert_eq!(pair().norms(), [27.0f64.sqrt(), 1.25f64.sqrt()]);
        assert_eq!(pair().elements(), 5);
    }

    #[test]
    fn vectors_add_scale_and_clear() {
        let mut x = pair();
        x.add_scaled(2.0, &pair());
        assert_eq!(x.tensor(1), [1.5, -3.0]);
        x.scale(0.5);
        assert_eq!(x.tensor(0), [4.5; 3]);
        x.copy_from(&pair());
        assert_eq!(x, pair());
        x.clear();
        assert_eq!(x, pair().zeros_like());
        x.retain(|number| number == 1);
        assert_eq!(x, TargetTensors::new(vec![vec![0.0; 2]]));
    }

    #[test]
    fn contents_are_told_apart_by_who_may_have_written() {
        let x = pair();
        let mut y = x.clone();
        assert_eq!(x.content(), y.content());
        assert_ne!(x.content(), pair().content());
        let mut seen = vec![x.content()];
        let mut differs = |y: &TargetTensors| {
            assert!(!seen.contains(&y.content()));
            seen.push(y.content());
        };
        y.tensor_mut(0)[0] = 1.0;
        differs(&y);
        y.clear();
        differs(&y);
        let _ = y.iter_mut();
        differs(&y);
        y.scale(2.0);
        differs(&y);
        y.copy_from(&x);
        differs(&y);
        y.add_scaled(1.0, &x);
        differs(&y);
        y.retain(|number| number == 0);
        differs(&y);
    }

    #[test]
    fn sums_do_not_depend_on_the_number_of_threads() {
        #[expect(clippy::cast_precision_loss, reason = "small indices")]
        let x = TargetTensors::new(vec![(0..300_000).map(|i| (i as f32 * 0.1).sin()).collect()]);
        let norm = |threads| {
            let pool = rayon::ThreadPoolBuilder::new()
                .num_threads(threads)
                .build()
                .expect("a pool");
            pool.install(|| x.norm().to_bits())
        };
        assert_eq!(norm(1), norm(5));
    }
}
