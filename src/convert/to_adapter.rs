//! A LoRA adapter, or a perturbation of low rank, as a GGUF adapter that llama.cpp's `--lora` takes.
//!
//! In: modules with their factors, A of rank x inputs and B of outputs x rank, and the names of the base's tensors. Out: for each
//! module `<tensor>.lora_a` and `<tensor>.lora_b` in F32, B with the rows that the base has in GGUF.
//!
//! llama.cpp computes W + s B A with s = alpha / rank, and has one alpha for the file. So that every module keeps its scale, whatever
//! it comes from (rsLoRA, a pattern of ranks or alphas), alpha is that of the first, and what another's scale differs by goes into
//! its B. llama.cpp's own `convert_lora_to_gguf.py` reads none of these settings (0.3.36 of the vendored source).

use panacea_formats::gguf::{Metadata, Value};
use panacea_formats::{Adapter, Checkpoint, Dtype, Perturbation, TensorView};

use super::config::GgufConfig;
use super::conversion::Conversion;
use super::names::{Architecture, HeadRows, Place, Source};
use super::to_gguf::files;
use super::write::{Content, Planned, RowOrder};
use super::{ConvertError, StoredModel};

/// What an adapter is over.
#[derive(Clone, Copy, Debug)]
pub struct AdapterBase {
    architecture: &'static Architecture,
    head_dim: usize,
}

impl AdapterBase {
    /// The model whose `config.json` has the text `config`.
    ///
    /// # Errors
    /// When it is refused, or GGUF has no architecture for it.
    pub fn of_config(config: &str) -> Result<Self, ConvertError> {
        let config = GgufConfig::parse(config)?;
        Ok(Self {
            architecture: config.architecture,
            head_dim: config.config.head_dim,
        })
    }

    /// The model in the GGUF file `checkpoint`.
    ///
    /// # Errors
    /// When it is none that is known here.
    pub fn of_gguf(checkpoint: &Checkpoint) -> Result<Self, ConvertError> {
        let model = StoredModel::of(checkpoint)?;
        Ok(Self {
            architecture: model.architecture(),
            head_dim: model.config(checkpoint)?.head_dim,
        })
    }

    /// The name in GGUF of the base's tensor `name`, which may be one of GGUF's, and the order of its rows there.
    fn place(self, name: &str) -> Result<(String, RowOrder), ConvertError> {
        if let Some(Source::Whole(_)) = self.architecture.source(name) {
            return Ok((name.to_owned(), RowOrder::Same));
        }
        let Some(Place::Whole(place)) = self.architecture.place(name) else {
            return Err(ConvertError::NoPlace {
                tensor: name.to_owned(),
                architecture: self.architecture.name,
            });
        };
        let order = match self.architecture.reordered_rows(&place) {
            Some(HeadRows::Query | HeadRows::Key) => RowOrder::Interleaved(self.head_dim),
            None => RowOrder::Same,
        };
        Ok((place, order))
    }
}

/// What a GGUF adapter is to be.
#[derive(Clone, Copy, Debug)]
pub struct AdapterSettings<'a> {
    /// The file's name without its extension.
    pub stem: &'a str,
    /// What people call it.
    pub name: &'a str,
}

impl<'c> Conversion<'c> {
    /// Plans the GGUF adapter that `adapter`, of `checkpoint`, becomes.
    ///
    /// # Errors
    /// When a module is none of the base's, or tensors of the base are replaced, which no GGUF adapter can do.
    pub fn of_adapter(
        checkpoint: &'c Checkpoint,
        adapter: &Adapter<'c>,
        base: AdapterBase,
        settings: AdapterSettings<'_>,
    ) -> Result<Self, ConvertError> {
        if let Some(saved) = adapter.saved().first() {
            return Err(ConvertError::SavedTensor {
                tensor: saved.name.to_owned(),
            });
        }
        let modules = adapter.modules().iter().map(|module| LowRank {
            weight: module.weight(),
            shape: module.shape(),
            rank: module.rank,
            scale: module.scale,
            a: Factor::Stored(module.a),
            b: Factor::Stored(module.b),
        });
        Self::adapter(checkpoint, modules.collect(), base, settings)
    }

    /// Plans the GGUF adapter that `perturbation`, whose matrices are all of low rank, becomes; `checkpoint` is the file that it is
    /// in.
    ///
    /// # Errors
    /// When a matrix has another form, or is none of the base's.
    pub fn of_perturbation(
        checkpoint: &'c Checkpoint,
        perturbation: &Perturbation,
        base: AdapterBase,
        settings: AdapterSettings<'_>,
    ) -> Result<Self, ConvertError> {
        let modules = perturbation.deltas().map(|delta| {
            let weight = delta.name().to_owned();
            match (delta.factors(), delta.shape()) {
                (Some((a, b)), &[outputs, inputs]) => Ok(LowRank {
                    weight,
                    shape: [outputs, inputs],
                    rank: a.len() / inputs.max(1),
                    scale: 1.0,
                    a: Factor::Made(a),
                    b: Factor::Made(b),
                }),
                _ => Err(ConvertError::NotLowRank { tensor: weight }),
            }
        });
        let modules = modules.collect::<Result<_, _>>()?;
        Self::adapter(checkpoint, modules, base, settings)
    }

    fn adapter(
        checkpoint: &'c Checkpoint,
        modules: Vec<LowRank<'c>>,
        base: AdapterBase,
        settings: AdapterSettings<'_>,
    ) -> Result<Self, ConvertError> {
        let mut placed = Vec::with_capacity(modules.len());
        for module in modules {
            placed.push((base.place(&module.weight)?, module));
        }
        // A module of scale 0 says nothing about what the others have in common.
        let alpha = placed
            .iter()
            .map(|(_, module)| module.alpha())
            .find(|alpha| *alpha != 0.0)
            .unwrap_or(1.0);
        let mut tensors = Vec::with_capacity(2 * placed.len());
        for ((tensor, order), module) in placed {
            let [outputs, inputs] = module.shape;
            let factor = module.alpha() / alpha;
            tensors.push(Planned {
                name: format!("{tensor}.lora_a"),
                dtype: Dtype::F32,
                shape: vec![module.rank, inputs],
                content: module.a.content(module.rank, RowOrder::Same, 1.0)?,
            });
            tensors.push(Planned {
                name: format!("{tensor}.lora_b"),
                dtype: Dtype::F32,
                shape: vec![outputs, module.rank],
                content: module.b.content(outputs, order, factor)?,
            });
        }
        let mut metadata = Metadata::default();
        let text = |text: &str| Value::Text(text.to_owned());
        metadata.set("general.architecture", text(base.architecture.name));
        metadata.set("general.type", text("adapter"));
        metadata.set("adapter.type", text("lora"));
        metadata.set("general.name", text(settings.name));
        metadata.set("adapter.lora.alpha", Value::F32(alpha));
        metadata.set("general.quantization_version", Value::U32(2));
        Ok(Self {
            checkpoint,
            weights: files(tensors.into_iter(), &metadata, settings.stem, None)?,
            texts: Vec::new(),
            losses: Vec::new(),
            left_out: 0,
        })
    }
}

/// A module that computes with W + scale B A.
struct LowRank<'c> {
    /// The base's name of W.
    weight: String,
    /// Outputs and inputs.
    shape: [usize; 2],
    rank: usize,
    scale: f32,
    a: Factor<'c>,
    b: Factor<'c>,
}

impl LowRank<'_> {
    /// What llama.cpp divides by the rank to get the scale.
    #[expect(clippy::cast_precision_loss, reason = "a rank is far below 2^24")]
    fn alpha(&self) -> f32 {
        self.scale * self.rank as f32
    }
}

/// One of both factors.
enum Factor<'c> {
    Stored(TensorView<'c>),
    Made(Vec<f32>),
}

impl<'c> Factor<'c> {
    /// Its values times `factor`, with its `rows` rows in `order`.
    fn content(
        self,
        rows: usize,
        order: RowOrder,
        factor: f32,
    ) -> Result<Content<'c>, ConvertError> {
        let values = match self {
            Self::Stored(view) if factor == 1.0 => {
                return Ok(Content::Stored {
                    parts: vec![view],
                    order,
                    offset: 0.0,
                });
            }
            Self::Stored(view) => {
                let mut values = vec![0.0; view.elements()];
                view.widen_into(0..values.len(), &mut values)
                    .map_err(|source| ConvertError::Unreadable {
                        tensor: view.name.to_owned(),
                        source,
                    })?;
                values
            }
            Self::Made(values) => values,
        };
        let columns = values.len() / rows.max(1);
        let mut made = Vec::with_capacity(values.len());
        for row in (0..rows).map(|row| order.origin(row)) {
            let row = &values[row * columns..(row + 1) * columns];
            made.extend(row.iter().map(|value| value * factor));
        }
        Ok(Content::Made(made))
    }
}
