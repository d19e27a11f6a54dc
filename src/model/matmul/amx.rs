//! The processor's matrix unit: Intel's AMX, products of BF16 tiles with sums in f32.
//!
//! In: tiles as [`super::tiles`] arranges them. Out: 32 x 32 sums. All that is unsafe about the unit is in this file: asking the system for it,
//! setting it up on a thread, and the instructions themselves, which the compiler has no intrinsics for.
//!
//! One `tdpbf16ps` multiplies a tile of 16 x 32 with one of 32 x 16, pair by pair along the inner dimension. To each of its 256 sums it adds
//! even + odd, where even and odd are sums over the even and odd inner indices, from zero, in ascending order, each step one fused multiply-add.
//! All roundings are to nearest, and f32 values below 2^-126 count as zero, going in and coming out, whatever the thread's own modes are.
//! Source: Intel, "64 and IA-32 Architectures Software Developer's Manual", volume 2, TDPBF16PS.

use std::marker::PhantomData;

use super::tiles::{Multiply, Pieces, Sums, Tile, Unit};

/// The unit, which this processor has and this process may use.
#[derive(Clone, Copy, Debug)]
pub(super) struct Amx(());

impl Amx {
    /// The unit, if the processor has it and the system lets this process use it. Asked once.
    #[cfg(all(target_arch = "x86_64", target_os = "linux"))]
    pub(super) fn here() -> Option<Self> {
        static HERE: std::sync::OnceLock<bool> = std::sync::OnceLock::new();
        HERE.get_or_init(|| unit::is_there() && unit::is_permitted())
            .then_some(Self(()))
    }

    /// There is none.
    #[cfg(not(all(target_arch = "x86_64", target_os = "linux")))]
    pub(super) fn here() -> Option<Self> {
        None
    }
}

impl Unit for Amx {
    type SetUp = SetUp;

    fn set_up(self) -> SetUp {
        unit::configure();
        SetUp(PhantomData)
    }
}

/// The unit, set up on this thread, which it does not leave. Dropped, it is put away, so that the system need not save tiles when it switches
/// to another thread. There is one on a thread at a time.
#[derive(Debug)]
pub(super) struct SetUp(PhantomData<*const ()>);

impl Drop for SetUp {
    fn drop(&mut self) {
        unit::release();
    }
}

impl Multiply for SetUp {
    fn multiply(&self, left: &[Tile], right: &[Tile], pieces: Pieces, sums: &mut Sums) {
        let steps = left.len() / Pieces::Three.tiles();
        assert_eq!(left.len(), steps * Pieces::Three.tiles());
        assert_eq!(right.len(), steps * pieces.tiles());
        unit::multiply(left, right, steps, pieces, sums);
    }
}

#[cfg(all(target_arch = "x86_64", target_os = "linux"))]
#[expect(unsafe_code, reason = "the unit has no safe interface")]
mod unit {
    use std::arch::asm;
    use std::arch::x86_64::__cpuid_count;

    use super::{Pieces, Sums, Tile};

    /// Whether the processor has tiles of eight times 16 rows of 64 bytes and multiplies BF16, and the system keeps them between threads.
    pub(super) fn is_there() -> bool {
        const OSXSAVE: u32 = 1 << 27;
        const AMX: u32 = 1 << 22 | 1 << 24; // AMX-BF16, AMX-TILE
        const STATE: u32 = 1 << 17 | 1 << 18; // tile configuration, tile data
        if __cpuid_count(0, 0).eax < 0x1d
            || __cpuid_count(1, 0).ecx & OSXSAVE == 0
            || __cpuid_count(7, 0).edx & AMX != AMX
        {
            return false;
        }
        let saved: u32;
        // SAFETY: `xgetbv` is there because OSXSAVE is; it reads a register and writes eax and edx.
        unsafe {
            asm!("xgetbv", in("ecx") 0, out("eax") saved, out("edx") _, options(nomem, nostack));
        }
        let palette = __cpuid_count(0x1d, 1);
        let (rows, bytes_per_row) = (palette.ecx & 0xffff, palette.ebx & 0xffff);
        let tiles = palette.ebx >> 16;
        saved & STATE == STATE && rows >= 16 && bytes_per_row >= 64 && tiles >= 8
    }

    /// Asks the system for the unit, on behalf of all threads of this process: Linux saves no tiles for one that never asked.
    pub(super) fn is_permitted() -> bool {
        const SYS_ARCH_PRCTL: i64 = 158;
        const ARCH_REQ_XCOMP_PERM: u64 = 0x1023;
        const TILE_DATA: u64 = 18;
        let result: i64;
        // SAFETY: the call reads two numbers and no memory, and changes what the process may do, for the better; the kernel overwrites rcx and r11.
        unsafe {
            asm!(
                "syscall",
                inlateout("rax") SYS_ARCH_PRCTL => result,
                in("rdi") ARCH_REQ_XCOMP_PERM,
                in("rsi") TILE_DATA,
                out("rcx") _,
                out("r11") _,
                options(nostack),
            );
        }
        result == 0
    }

    /// What `ldtilecfg` reads: palette 1, and for each of eight tiles 16 rows of 64 bytes.
    #[repr(C, align(64))]
    struct Configuration {
        palette: u8,
        start_row: u8,
        reserved: [u8; 14],
        bytes_per_row: [u16; 16],
        rows: [u8; 16],
    }

    static EIGHT_WHOLE_TILES: Configuration = Configuration {
        palette: 1,
        start_row: 0,
        reserved: [0; 14],
        bytes_per_row: [64, 64, 64, 64, 64, 64, 64, 64, 0, 0, 0, 0, 0, 0, 0, 0],
        rows: [16, 16, 16, 16, 16, 16, 16, 16, 0, 0, 0, 0, 0, 0, 0, 0],
    };

    /// Sets up this thread's tiles.
    pub(super) fn configure() {
        // SAFETY: only reached through `Amx`, which exists if the instruction does; it reads the 64 bytes of the configuration, which is a valid one.
        unsafe {
            asm!("ldtilecfg [{}]", in(reg) &raw const EIGHT_WHOLE_TILES, options(nostack, readonly));
        }
    }

    /// Puts this thread's tiles away.
    pub(super) fn release() {
        // SAFETY: only reached through `Amx`, which exists if the instruction does; nobody else's tiles are on this thread.
        unsafe {
            asm!("tilerelease", options(nostack, nomem));
        }
    }

    /// Of two left tiles in tmm6 and tmm7 and two right ones in tmm4 and tmm5, all four products, added to tmm0 to tmm3.
    macro_rules! four_products {
        () => {
            "tdpbf16ps tmm0, tmm6, tmm4
             tdpbf16ps tmm1, tmm6, tmm5
             tdpbf16ps tmm2, tmm7, tmm4
             tdpbf16ps tmm3, tmm7, tmm5"
        };
    }

    /// Loads the left tiles of the piece whose first is `$first` bytes into the step, without room in the first-level cache, which is for the
    /// panel that many left ones meet; and the same for right ones.
    macro_rules! left {
        ($first:literal) => {
            concat!(
                "tileloaddt1 tmm6, [{left} + {row} + ",
                $first,
                "]\n",
                "tileloaddt1 tmm7, [{left} + {row} + 1024 + ",
                $first,
                "]"
            )
        };
    }
    macro_rules! right {
        ($first:literal) => {
            concat!(
                "tileloadd tmm4, [{right} + {row} + ",
                $first,
                "]\n",
                "tileloadd tmm5, [{right} + {row} + 1024 + ",
                $first,
                "]"
            )
        };
    }

    /// The loop over the inner dimension, between emptying the four tiles of sums and storing them.
    macro_rules! products {
        ($left:ident, $right:ident, $steps:ident, $sums:ident, $right_step:literal, $($line:expr),+) => {
            asm!(
                "tilezero tmm0",
                "tilezero tmm1",
                "tilezero tmm2",
                "tilezero tmm3",
                "test {steps}, {steps}",
                "jz 3f",
                "2:",
                $($line,)+
                "add {left}, 6144",
                concat!("add {right}, ", $right_step),
                "dec {steps}",
                "jnz 2b",
                "3:",
                "tilestored [{sums} + {sums_row}], tmm0",
                "tilestored [{sums} + {sums_row} + 64], tmm1",
                "tilestored [{sums} + {sums_row} + 2048], tmm2",
                "tilestored [{sums} + {sums_row} + 2112], tmm3",
                left = inout(reg) $left.as_ptr() => _,
                right = inout(reg) $right.as_ptr() => _,
                steps = inout(reg) $steps => _,
                row = in(reg) 64_usize,
                sums = in(reg) $sums.0.as_mut_ptr(),
                sums_row = in(reg) 128_usize,
                out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _,
                out("tmm4") _, out("tmm5") _, out("tmm6") _, out("tmm7") _,
                options(nostack),
            )
        };
    }

    /// Pieces of the smallest products come first in each step. Their order is part of the result.
    pub(super) fn multiply(
        left: &[Tile],
        right: &[Tile],
        steps: usize,
        pieces: Pieces,
        sums: &mut Sums,
    ) {
        match pieces {
            // SAFETY: the tiles of this thread are set up, as there is a `SetUp`. Each step reads 6 KiB of `left` and 2 KiB of `right`, which
            // are `steps` times as long, as the caller asserted; `sums` has 32 rows of 128 bytes. Any bits are valid BF16 and f32 values.
            Pieces::One => unsafe {
                products!(
                    left,
                    right,
                    steps,
                    sums,
                    "2048",
                    right!("0"),
                    left!("4096"),
                    four_products!(),
                    left!("2048"),
                    four_products!(),
                    left!("0"),
                    four_products!()
                );
            },
            // SAFETY: as above, with 6 KiB of `right`.
            Pieces::Three => unsafe {
                products!(
                    left,
                    right,
                    steps,
                    sums,
                    "6144",
                    right!("0"),
                    left!("4096"),
                    four_products!(),
                    left!("2048"),
                    four_products!(),
                    left!("0"),
                    four_products!(),
                    right!("4096"),
                    four_products!(),
                    right!("2048"),
                    four_products!(),
                    left!("2048"),
                    four_products!()
                );
            },
        }
    }
}

#[cfg(not(all(target_arch = "x86_64", target_os = "linux")))]
mod unit {
    //! Never reached: [`super::Amx`] does not exist here.
    use super::{Pieces, Sums, Tile};

    pub(super) fn configure() {}

    pub(super) fn release() {}

    pub(super) fn multiply(_: &[Tile], _: &[Tile], _: usize, _: Pieces, _: &mut Sums) {}
}
