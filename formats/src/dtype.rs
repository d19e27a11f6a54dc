//! The element types of safetensors and of GGUF.
//!
//! All of them pass through unread. Some can be read as numbers, and of these most can be patched: written again after a change.
//! Names and widths are those of safetensors 0.8 and of llama.cpp's `ggml.h` (`enum ggml_type`, block sizes of gguf-py 0.19's
//! `GGML_QUANT_SIZES`). A type number that is not in this table is no [`Dtype`].

use std::fmt;
use std::str::FromStr;

use thiserror::Error;

/// The least that can be stored: so many neighboring elements of one row, in so many bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Block {
    /// Elements.
    pub elements: usize,
    /// Bytes that they take together.
    pub bytes: usize,
}

/// Which formats store an element type.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Formats {
    Safetensors,
    /// Under this number.
    Gguf(u32),
    /// Under this number in GGUF.
    Both(u32),
}

macro_rules! dtypes {
    ($($(#[$doc:meta])* $variant:ident: $elements:literal in $bytes:literal, $formats:expr;)*) => {
        /// An element type of a stored tensor.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
        #[expect(non_camel_case_types, reason = "the variants are spelled as the files spell them")]
        #[non_exhaustive]
        pub enum Dtype {
            $($(#[$doc])* $variant,)*
        }

        impl Dtype {
            /// Every element type: those of safetensors, narrow ones first, then those that GGUF alone has, by number.
            pub const ALL: &'static [Self] = &[$(Self::$variant,)*];

            /// The name that a safetensors header uses, or llama.cpp.
            pub const fn name(self) -> &'static str {
                match self {
                    $(Self::$variant => stringify!($variant),)*
                }
            }

            /// The least that can be stored of it. More than one element for the packed and the quantized types.
            pub const fn block(self) -> Block {
                match self {
                    $(Self::$variant => Block { elements: $elements, bytes: $bytes },)*
                }
            }

            const fn formats(self) -> Formats {
                match self {
                    $(Self::$variant => $formats,)*
                }
            }
        }
    };
}

use Formats::{Both, Gguf, Safetensors};

dtypes! {
    /// OCP MX 4-bit float, two to a byte.
    F4: 2 in 1, Safetensors;
    /// OCP MX 6-bit float with 2 exponent bits.
    F6_E2M3: 4 in 3, Safetensors;
    /// OCP MX 6-bit float with 3 exponent bits.
    F6_E3M2: 4 in 3, Safetensors;
    /// Boolean, a byte each.
    BOOL: 1 in 1, Safetensors;
    /// Unsigned 8-bit integer.
    U8: 1 in 1, Safetensors;
    /// Signed 8-bit integer.
    I8: 1 in 1, Both(24);
    /// 8-bit float with 5 exponent bits.
    F8_E5M2: 1 in 1, Safetensors;
    /// 8-bit float with 4 exponent bits.
    F8_E4M3: 1 in 1, Safetensors;
    /// 8-bit exponent without a mantissa, a block's scale.
    F8_E8M0: 1 in 1, Safetensors;
    /// 8-bit float with 4 exponent bits and no negative zero.
    F8_E4M3FNUZ: 1 in 1, Safetensors;
    /// 8-bit float with 5 exponent bits and no negative zero.
    F8_E5M2FNUZ: 1 in 1, Safetensors;
    /// Signed 16-bit integer.
    I16: 1 in 2, Both(25);
    /// Unsigned 16-bit integer.
    U16: 1 in 2, Safetensors;
    /// IEEE 754 binary16.
    F16: 1 in 2, Both(1);
    /// The upper half of an IEEE 754 binary32.
    BF16: 1 in 2, Both(30);
    /// Signed 32-bit integer.
    I32: 1 in 4, Both(26);
    /// Unsigned 32-bit integer.
    U32: 1 in 4, Safetensors;
    /// IEEE 754 binary32.
    F32: 1 in 4, Both(0);
    /// Two binary32: a complex number.
    C64: 1 in 8, Safetensors;
    /// IEEE 754 binary64.
    F64: 1 in 8, Both(28);
    /// Signed 64-bit integer.
    I64: 1 in 8, Both(27);
    /// Unsigned 64-bit integer.
    U64: 1 in 8, Safetensors;
    /// 4 bits and a scale.
    Q4_0: 32 in 18, Gguf(2);
    /// 4 bits, a scale and a minimum.
    Q4_1: 32 in 20, Gguf(3);
    /// 5 bits and a scale.
    Q5_0: 32 in 22, Gguf(6);
    /// 5 bits, a scale and a minimum.
    Q5_1: 32 in 24, Gguf(7);
    /// 8 bits and a scale.
    Q8_0: 32 in 34, Gguf(8);
    /// 8 bits, a scale and a sum: an operand of products, not met in files.
    Q8_1: 32 in 36, Gguf(9);
    /// 2 bits in sub-blocks of 16 with 4-bit scales and minimums.
    Q2_K: 256 in 84, Gguf(10);
    /// 3 bits in sub-blocks of 16 with 6-bit scales.
    Q3_K: 256 in 110, Gguf(11);
    /// 4 bits in sub-blocks of 32 with 6-bit scales and minimums.
    Q4_K: 256 in 144, Gguf(12);
    /// 5 bits in sub-blocks of 32 with 6-bit scales and minimums.
    Q5_K: 256 in 176, Gguf(13);
    /// 6 bits in sub-blocks of 16 with 8-bit scales.
    Q6_K: 256 in 210, Gguf(14);
    /// 8 bits, an f32 scale and sums: an operand of products, not met in files.
    Q8_K: 256 in 292, Gguf(15);
    /// Codebook, 2.06 bits.
    IQ2_XXS: 256 in 66, Gguf(16);
    /// Codebook, 2.31 bits.
    IQ2_XS: 256 in 74, Gguf(17);
    /// Codebook, 3.06 bits.
    IQ3_XXS: 256 in 98, Gguf(18);
    /// Codebook, 1.56 bits.
    IQ1_S: 256 in 50, Gguf(19);
    /// 4 bits on a curve, and a scale.
    IQ4_NL: 32 in 18, Gguf(20);
    /// Codebook, 3.44 bits.
    IQ3_S: 256 in 110, Gguf(21);
    /// Codebook, 2.56 bits.
    IQ2_S: 256 in 82, Gguf(22);
    /// 4 bits on a curve in sub-blocks of 32 with 6-bit scales.
    IQ4_XS: 256 in 136, Gguf(23);
    /// Codebook, 1.75 bits.
    IQ1_M: 256 in 56, Gguf(29);
    /// Three values, 1.69 bits.
    TQ1_0: 256 in 54, Gguf(34);
    /// Three values, 2.06 bits.
    TQ2_0: 256 in 66, Gguf(35);
    /// OCP MX 4-bit float with a shared 8-bit exponent.
    MXFP4: 32 in 17, Gguf(39);
    /// 4-bit float with an 8-bit float scale for each 16.
    NVFP4: 64 in 36, Gguf(40);
    /// A sign and a scale.
    Q1_0: 128 in 18, Gguf(41);
    /// 2 bits and a scale.
    Q2_0: 64 in 18, Gguf(42);
}

impl Dtype {
    /// Whether elements can be read as numbers: the floats of training, and the quantized types that [`crate::dequantize`] knows.
    pub const fn is_readable(self) -> bool {
        self.is_patchable() || matches!(self, Self::IQ4_NL | Self::MXFP4)
    }

    /// Whether a perturbation can be added to tensors of this type: they can be read as numbers, and written again.
    pub const fn is_patchable(self) -> bool {
        self.is_float() || self.is_quantized()
    }

    /// Whether every element is a float of its own that widens to `f32` without loss.
    pub const fn is_float(self) -> bool {
        matches!(self, Self::F32 | Self::F16 | Self::BF16)
    }

    /// Whether [`crate::quantize`] writes it.
    pub const fn is_quantized(self) -> bool {
        matches!(
            self,
            Self::Q4_0
                | Self::Q4_1
                | Self::Q5_0
                | Self::Q5_1
                | Self::Q8_0
                | Self::Q2_K
                | Self::Q3_K
                | Self::Q4_K
                | Self::Q5_K
                | Self::Q6_K
        )
    }

    /// How many bytes `elements` of them take; nothing when they are no whole blocks or too many.
    pub const fn bytes_of(self, elements: usize) -> Option<usize> {
        let block = self.block();
        match elements.is_multiple_of(block.elements) {
            true => (elements / block.elements).checked_mul(block.bytes),
            false => None,
        }
    }

    /// The name, where it is one that a safetensors header can use.
    pub(crate) fn in_safetensors(name: &str) -> Result<Self, UnknownDtype> {
        name.parse()
            .ok()
            .filter(|dtype: &Self| !matches!(dtype.formats(), Gguf(_)))
            .ok_or_else(|| UnknownDtype::named(name))
    }

    /// The number that a GGUF header uses; nothing for the types that are safetensors' alone.
    pub const fn gguf_type(self) -> Option<u32> {
        match self.formats() {
            Gguf(number) | Both(number) => Some(number),
            Safetensors => None,
        }
    }

    /// The type that a GGUF header means by `number`, if it is known here.
    pub fn of_gguf_type(number: u32) -> Option<Self> {
        Self::ALL
            .iter()
            .copied()
            .find(|dtype| dtype.gguf_type() == Some(number))
    }
}

impl fmt::Display for Dtype {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for Dtype {
    type Err = UnknownDtype;

    fn from_str(name: &str) -> Result<Self, Self::Err> {
        Self::ALL
            .iter()
            .copied()
            .find(|dtype| dtype.name() == name)
            .ok_or_else(|| UnknownDtype::named(name))
    }
}

/// A name that is no element type.
#[derive(Debug, Error, PartialEq, Eq)]
#[error("`{found}` is not an element type")]
pub struct UnknownDtype {
    /// The name, cut to 32 characters.
    pub found: String,
}

impl UnknownDtype {
    fn named(name: &str) -> Self {
        Self {
            found: name.chars().take(32).collect(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_and_widths_are_those_of_the_safetensors_crate() {
        let of_safetensors = Dtype::ALL
            .iter()
            .filter(|dtype| Dtype::in_safetensors(dtype.name()).is_ok());
        for &dtype in of_safetensors.clone() {
            let theirs: safetensors::Dtype =
                serde_json::from_value(serde_json::Value::String(dtype.name().into()))
                    .unwrap_or_else(|error| panic!("{dtype}: {error}"));
            let block = dtype.block();
            assert_eq!(
                theirs.bitsize() * block.elements,
                8 * block.bytes,
                "{dtype}"
            );
            assert_eq!(dtype.name().parse(), Ok(dtype));
        }
        assert_eq!(of_safetensors.count(), 22);
    }

    #[test]
    fn numbers_of_gguf_lead_back_to_their_types_and_a_removed_one_to_none() {
        let of_gguf = Dtype::ALL.iter().filter_map(|dtype| dtype.gguf_type());
        assert_eq!(of_gguf.clone().count(), 35);
        for number in of_gguf {
            let dtype = Dtype::of_gguf_type(number);
            assert_eq!(dtype.and_then(Dtype::gguf_type), Some(number));
        }
        for removed in [4, 5, 31, 33, 36, 38, 43] {
            assert_eq!(Dtype::of_gguf_type(removed), None);
        }
    }

    #[test]
    fn bytes_are_those_of_whole_blocks() {
        assert_eq!(Dtype::Q4_K.bytes_of(512), Some(288));
        assert_eq!(Dtype::Q4_K.bytes_of(511), None);
        assert_eq!(Dtype::F4.bytes_of(3), None);
        assert_eq!(Dtype::F64.bytes_of(usize::MAX / 2), None);
        assert_eq!(Dtype::Q8_0.bytes_of(0), Some(0));
    }

    #[test]
    fn names_are_spelled_exactly_and_those_of_gguf_are_not_in_safetensors() {
        assert!("f32".parse::<Dtype>().is_err());
        assert!("F32 ".parse::<Dtype>().is_err());
        assert!("Q4_K".parse::<Dtype>().is_ok());
        assert!(Dtype::in_safetensors("Q4_K").is_err());
    }
}
