//! The fastest product of two f32 matrices that this machine was seen to do, for benchmarks to hold a step against.
//!
//!     cargo run --release --example ceiling -- THREADS
//!
//! Prints GFLOP/s: the best of twenty products of two 2048 x 2048 matrices, by candle, whose kernels are those of `gemm`.

#![expect(clippy::print_stdout, reason = "what it is for")]

use std::error::Error;
use std::time::Instant;

use candle_core::{Device, Tensor};

const SIDE: u16 = 2048;

fn main() -> Result<(), Box<dyn Error>> {
    let threads = std::env::args().nth(1).ok_or("usage: ceiling THREADS")?;
    rayon::ThreadPoolBuilder::new()
        .num_threads(threads.parse()?)
        .build_global()?;
    let side = usize::from(SIDE);
    let matrix = || Tensor::rand(0.0f32, 1.0, (side, side), &Device::Cpu);
    let (a, b) = (matrix()?, matrix()?);
    let mut best = f64::INFINITY;
    for _ in 0..20 {
        let began = Instant::now();
        let _ = a.matmul(&b)?;
        best = best.min(began.elapsed().as_secs_f64());
    }
    println!("{}", 2.0 * f64::from(SIDE).powi(3) / best / 1e9);
    Ok(())
}
