//! The element types of the safetensors format.
//!
//! All of them pass through unread. Three can be patched: those whose every value widens to `f32` without loss and which are
//! what training leaves behind. Names and widths are those of safetensors 0.8.

use std::fmt;
use std::str::FromStr;

use thiserror::Error;

macro_rules! dtypes {
    ($($(#[$doc:meta])* $variant:ident = $name:literal, $bits:literal;)*) => {
        /// An element type of a stored tensor.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
        #[expect(non_camel_case_types, reason = "the variants are spelled as the files spell them")]
        #[non_exhaustive]
        pub enum Dtype {
            $($(#[$doc])* $variant,)*
        }

        impl Dtype {
            /// Every element type, narrow ones first.
            pub const ALL: &'static [Self] = &[$(Self::$variant,)*];

            /// The name that a safetensors header uses.
            pub const fn name(self) -> &'static str {
                match self {
                    $(Self::$variant => $name,)*
                }
            }

            /// The width of one element in bits; below 8 for the packed types.
            pub const fn bits(self) -> usize {
                match self {
                    $(Self::$variant => $bits,)*
                }
            }
        }
    };
}

dtypes! {
    /// OCP MX 4-bit float, two to a byte.
    F4 = "F4", 4;
    /// OCP MX 6-bit float with 2 exponent bits.
    F6_E2M3 = "F6_E2M3", 6;
    /// OCP MX 6-bit float with 3 exponent bits.
    F6_E3M2 = "F6_E3M2", 6;
    /// Boolean, a byte each.
    BOOL = "BOOL", 8;
    /// Unsigned 8-bit integer.
    U8 = "U8", 8;
    /// Signed 8-bit integer.
    I8 = "I8", 8;
    /// 8-bit float with 5 exponent bits.
    F8_E5M2 = "F8_E5M2", 8;
    /// 8-bit float with 4 exponent bits.
    F8_E4M3 = "F8_E4M3", 8;
    /// 8-bit exponent without a mantissa, a block's scale.
    F8_E8M0 = "F8_E8M0", 8;
    /// 8-bit float with 4 exponent bits and no negative zero.
    F8_E4M3FNUZ = "F8_E4M3FNUZ", 8;
    /// 8-bit float with 5 exponent bits and no negative zero.
    F8_E5M2FNUZ = "F8_E5M2FNUZ", 8;
    /// Signed 16-bit integer.
    I16 = "I16", 16;
    /// Unsigned 16-bit integer.
    U16 = "U16", 16;
    /// IEEE 754 binary16.
    F16 = "F16", 16;
    /// The upper half of an IEEE 754 binary32.
    BF16 = "BF16", 16;
    /// Signed 32-bit integer.
    I32 = "I32", 32;
    /// Unsigned 32-bit integer.
    U32 = "U32", 32;
    /// IEEE 754 binary32.
    F32 = "F32", 32;
    /// Two binary32: a complex number.
    C64 = "C64", 64;
    /// IEEE 754 binary64.
    F64 = "F64", 64;
    /// Signed 64-bit integer.
    I64 = "I64", 64;
    /// Unsigned 64-bit integer.
    U64 = "U64", 64;
}

impl Dtype {
    /// Whether a perturbation can be added to tensors of this type: `F32`, `F16` and `BF16` only.
    pub const fn is_patchable(self) -> bool {
        self.patchable_width().is_some()
    }

    /// The bytes of one element of a patchable type, and nothing for the others.
    pub const fn patchable_width(self) -> Option<usize> {
        match self {
            Self::F32 => Some(4),
            Self::F16 | Self::BF16 => Some(2),
            _ => None,
        }
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
            .ok_or_else(|| UnknownDtype {
                found: name.chars().take(32).collect(),
            })
    }
}

/// A name that is no element type.
#[derive(Debug, Error, PartialEq, Eq)]
#[error("`{found}` is not a safetensors element type")]
pub struct UnknownDtype {
    /// The name, cut to 32 characters.
    pub found: String,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_and_widths_are_those_of_the_safetensors_crate() {
        for &dtype in Dtype::ALL {
            let theirs: safetensors::Dtype =
                serde_json::from_value(serde_json::Value::String(dtype.name().into()))
                    .unwrap_or_else(|error| panic!("{dtype}: {error}"));
            assert_eq!(theirs.bitsize(), dtype.bits(), "{dtype}");
            assert_eq!(dtype.name().parse(), Ok(dtype));
        }
        assert_eq!(Dtype::ALL.len(), 22);
    }

    #[test]
    fn names_are_spelled_exactly() {
        assert!("f32".parse::<Dtype>().is_err());
        assert!("F32 ".parse::<Dtype>().is_err());
    }
}
