//! A vector of `f32`, one lane for each of several sub-blocks, with the operators of arithmetic.
//!
//! Each operation rounds as IEEE 754 says, on every instruction set; none is fused with another.

use std::ops::{Add, Div, Mul, Neg, Sub};

use pulp::Simd;

use super::{MANTISSA, ROUNDING};

/// As many `f32` as the instruction set `S` computes at once: 1, 4, 8 or 16.
#[derive(Clone, Copy)]
pub(super) struct Lanes<S: Simd> {
    simd: S,
    values: S::f32s,
}

/// For each lane, whether something is so.
#[derive(Clone, Copy)]
pub(super) struct Mask<S: Simd> {
    simd: S,
    lanes: S::m32s,
}

impl<S: Simd> Lanes<S> {
    #[inline(always)]
    pub(super) fn all(simd: S, value: f32) -> Self {
        let values = simd.splat_f32s(value);
        Self { simd, values }
    }

    /// The lanes of register `register` in a row of 16.
    #[inline(always)]
    pub(super) fn load(simd: S, row: &[f32; 16], register: usize) -> Self {
        let values = S::as_simd_f32s(row).0[register];
        Self { simd, values }
    }

    #[inline(always)]
    pub(super) fn store(self, row: &mut [f32; 16], register: usize) {
        S::as_mut_simd_f32s(row).0[register] = self.values;
    }

    #[inline(always)]
    pub(super) fn abs(self) -> Self {
        let (simd, values) = (self.simd, self.values);
        let values = simd.abs_f32s(values);
        Self { simd, values }
    }

    #[inline(always)]
    pub(super) fn sqrt(self) -> Self {
        let (simd, values) = (self.simd, self.values);
        let values = simd.sqrt_f32s(values);
        Self { simd, values }
    }

    /// [`super::nearest`] as a float, kept within `least..=most`.
    #[inline(always)]
    pub(super) fn nearest(self, least: Self, most: Self) -> Self {
        let simd = self.simd;
        // Below 2^24 the integers are floats: the same bits under the exponent of 2^23 are the number they count, and 2^23 more.
        let sum = simd.transmute_u32s_f32s((self + Self::all(simd, ROUNDING)).values);
        let mantissa = simd.and_u32s(sum, simd.splat_u32s(MANTISSA));
        let bits = simd.or_u32s(mantissa, simd.splat_u32s(EXPONENT));
        let values = simd.transmute_f32s_u32s(bits);
        let rounded = Self { simd, values } - Self::all(simd, ROUNDING);
        let values = simd.min_f32s(most.values, simd.max_f32s(least.values, rounded.values));
        Self { simd, values }
    }

    #[inline(always)]
    pub(super) fn less(self, than: Self) -> Mask<S> {
        let simd = self.simd;
        let lanes = simd.less_than_f32s(self.values, than.values);
        Mask { simd, lanes }
    }

    #[inline(always)]
    pub(super) fn greater(self, than: Self) -> Mask<S> {
        than.less(self)
    }

    #[inline(always)]
    pub(super) fn equal(self, to: Self) -> Mask<S> {
        let simd = self.simd;
        let lanes = simd.equal_f32s(self.values, to.values);
        Mask { simd, lanes }
    }
}

impl<S: Simd> Mask<S> {
    /// Whether it is so for any lane.
    #[inline(always)]
    pub(super) fn any(self) -> bool {
        self.simd.first_true_m32s(self.lanes) != S::F32_LANES
    }

    #[inline(always)]
    pub(super) fn and(self, other: Self) -> Self {
        let simd = self.simd;
        let lanes = simd.and_m32s(self.lanes, other.lanes);
        Self { simd, lanes }
    }

    #[inline(always)]
    pub(super) fn and_not(self, other: Self) -> Self {
        let simd = self.simd;
        let lanes = simd.and_m32s(self.lanes, simd.not_m32s(other.lanes));
        Self { simd, lanes }
    }

    #[inline(always)]
    pub(super) fn select(self, if_so: Lanes<S>, otherwise: Lanes<S>) -> Lanes<S> {
        let simd = self.simd;
        let values = simd.select_f32s(self.lanes, if_so.values, otherwise.values);
        Lanes { simd, values }
    }
}

macro_rules! operators {
    ($($operator:ident $name:ident $of_simd:ident;)*) => {
        $(impl<S: Simd> $operator for Lanes<S> {
            type Output = Self;

            #[inline(always)]
            fn $name(self, other: Self) -> Self {
                let simd = self.simd;
                let values = simd.$of_simd(self.values, other.values);
                Self { simd, values }
            }
        })*
    };
}

operators! {
    Add add add_f32s;
    Sub sub sub_f32s;
    Mul mul mul_f32s;
    Div div div_f32s;
}

impl<S: Simd> Neg for Lanes<S> {
    type Output = Self;

    #[inline(always)]
    fn neg(self) -> Self {
        let simd = self.simd;
        let values = simd.neg_f32s(self.values);
        Self { simd, values }
    }
}

/// The exponent bits of 2^23.
const EXPONENT: u32 = (127 + 23) << 23;
