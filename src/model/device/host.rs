//! The kernels of a GPU, run on the processor: `host.cpp` compiles their source, unchanged, with a thread for each of a block's.

use std::io::{Read, Write};
use std::path::Path;
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::sync::{Arc, Mutex};

use candle_core::{DType, Result, Tensor};
use panacea_formats::Checkpoint;

use super::kernels::{Kernels, Launch, Scalar};
use super::place::{Device, DeviceName};
use super::{Activations, DeviceDecoder};
use crate::model::{
    Config, Decoder, Differentiable, EncodedRow, Pack, Point, TargetSelection, TargetTensors,
};

/// A program that runs them, and its pipes.
#[derive(Debug)]
struct Host {
    pipes: Mutex<(ChildStdin, ChildStdout)>,
    child: Child,
}

impl Host {
    fn compile() -> Self {
        let folder = tempfile::tempdir().expect("a folder");
        let program = folder.path().join("host");
        let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("src/model/device/host.cpp");
        let compiler = Command::new("c++")
            .args(["-std=c++20", "-O1", "-pthread", "-o"])
            .args([&program, &source])
            .status();
        assert!(compiler.expect("a C++ compiler").success());
        let mut child = Command::new(&program)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .expect("the program");
        let pipes = (child.stdin.take(), child.stdout.take());
        let (Some(stdin), Some(stdout)) = pipes else {
            panic!("both are piped");
        };
        Self {
            pipes: Mutex::new((stdin, stdout)),
            child,
        }
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        // It waits for the next call, and reads no more.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Launch for Host {
    fn launch(
        &self,
        name: &'static str,
        blocks: usize,
        inputs: &[Tensor],
        scalars: &[Scalar],
        outputs: &[&[usize]],
    ) -> Result<Vec<Tensor>> {
        let number = |x: usize| u32::try_from(x).expect("a small number").to_ne_bytes();
        let mut call = number(name.len()).to_vec();
        call.extend_from_slice(name.as_bytes());
        call.extend(number(blocks));
        call.extend(number(inputs.len()));
        for input in inputs {
            assert!(input.is_contiguous());
            let flat = input.flatten_all()?;
            call.extend(number(flat.elem_count()));
            match flat.dtype() {
                DType::U32 => {
                    call.extend(flat.to_vec1::<u32>()?.iter().flat_map(|x| x.to_ne_bytes()))
                }
                _ => call.extend(flat.to_vec1::<f32>()?.iter().flat_map(|x| x.to_ne_bytes())),
            }
        }
        call.extend(number(scalars.len()));
        for scalar in scalars {
            call.extend(match scalar {
                Scalar::Float(x) => x.to_ne_bytes(),
                Scalar::Int(x) => x.to_ne_bytes(),
            });
        }
        call.extend(number(outputs.len()));
        for shape in outputs {
            call.extend(number(shape.iter().product()));
        }
        let mut pipes = self.pipes.lock().expect("nobody panicked");
        pipes.0.write_all(&call)?;
        pipes.0.flush()?;
        let read = |shape: &&[usize]| {
            let mut bytes = vec![0; 4 * shape.iter().product::<usize>()];
            pipes.1.read_exact(&mut bytes)?;
            let floats = bytes.as_chunks().0.iter().map(|&x| f32::from_ne_bytes(x));
            Tensor::from_vec(
                floats.collect::<Vec<_>>(),
                *shape,
                &candle_core::Device::Cpu,
            )
        };
        outputs.iter().map(read).collect()
    }
}

fn candle() -> Device {
    Device::open(DeviceName::Candle).expect("this processor")
}

#[test]
fn kernels_that_do_what_candles_operations_do_are_used() {
    let device = candle().with_kernels(Ok(Kernels::new(Host::compile())));
    assert_eq!(device.trouble(), None);
    assert!(device.kernels().is_some());
}

#[test]
fn others_are_not_used_and_the_reason_is_told() {
    /// What the one inside gives, a hundredth too large for one kernel.
    #[derive(Debug)]
    struct Wrong(Arc<Host>, &'static str);
    impl Launch for Wrong {
        fn launch(
            &self,
            name: &'static str,
            blocks: usize,
            inputs: &[Tensor],
            scalars: &[Scalar],
            outputs: &[&[usize]],
        ) -> Result<Vec<Tensor>> {
            let found = self.0.launch(name, blocks, inputs, scalars, outputs)?;
            let factor = if name == self.1 { 1.01 } else { 1.0 };
            found.iter().map(|it| it.affine(factor, 0.0)).collect()
        }
    }
    let host = Arc::new(Host::compile());
    for (kernel, example) in [
        ("norm_forward", "norm"),
        ("norm_backward", "norm"),
        ("glu_forward", "glu"),
        ("glu_backward", "glu"),
        ("turn", "attention"),
        ("attention_forward", "attention"),
        ("attention_backward", "attention"),
        ("next_token", "head"),
    ] {
        let wrong = Kernels::new(Wrong(Arc::clone(&host), kernel));
        let device = candle().with_kernels(Ok(wrong));
        let trouble = device.trouble().expect(kernel);
        assert!(
            trouble.contains(&format!("`{example}`")),
            "{kernel}: {trouble}"
        );
        assert!(device.kernels().is_none());
    }
    let device = candle().with_kernels(Err("no compiler".to_owned()));
    assert_eq!(device.trouble(), Some("no compiler"));
}

#[test]
fn whole_models_have_the_gradients_of_the_processor() {
    let device = candle().with_kernels(Ok(Kernels::new(Host::compile())));
    for case in ["gemma2", "olmo2", "mixtral", "phi3-longrope-short"] {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR"))
            .join("testdata/oracle")
            .join(case);
        let checkpoint = Checkpoint::open(&folder).expect("a checkpoint");
        let decoder = || {
            let text = std::fs::read_to_string(folder.join("config.json")).expect("a config");
            let config = Config::parse(&text).expect("a supported config");
            let selection: TargetSelection = ".*".parse().expect("all");
            Decoder::new(config, checkpoint.tensors(), &selection).expect("a decoder")
        };
        let row = |tokens: std::ops::Range<u32>| EncodedRow {
            in_loss: tokens.clone().map(|it| it % 2 > 0).collect(),
            tokens: tokens.collect(),
        };
        let pack = Pack::of(&[row(5..16), row(30..39)]);
        let found = |decoder: &mut dyn Differentiable| {
            let sizes = decoder.target_sizes().into_iter();
            let mut gradient = TargetTensors::new(sizes.map(|size| vec![0.0; size]).collect());
            let loss = decoder.capped_loss_and_gradient(Point::stored(), &pack, 9.0, &mut gradient);
            (loss.expect("a loss").sum, gradient)
        };
        let (wanted, mut difference) = found(&mut decoder());
        let mut placed =
            DeviceDecoder::upload(decoder(), vec![device.clone()], Activations::Recompute)
                .expect("a decoder on the device");
        let (loss, gradient) = found(&mut placed);
        assert!(
            (loss / wanted - 1.0).abs() < 1e-6,
            "{case}: {loss} for {wanted}"
        );
        let norm = difference.norm();
        difference.add_scaled(-1.0, &gradient);
        assert!(difference.norm() < 1e-5 * norm, "{case}");
    }
}
