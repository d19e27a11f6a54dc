#!/usr/bin/env python3
"""Writes testdata/blocks: values, and what llama.cpp makes of them in every quantized type.

    python blocks.py --ggml libggml-base.so [--out ../blocks]

In: llama.cpp's shared library, built by its CMake for x86-64 (`-DBUILD_SHARED_LIBS=ON`, target ggml-base), and the weights of
testdata/tiny-chat. Out, little-endian:

    values.bin            f32, rows of 512: each row is one kind of values, see `rows`
    <type>.written.bin    `values.bin` in blocks, by `ggml_quantize_chunk` without an importance matrix
    <type>.blocks.bin     blocks to read: some of the written ones, then blocks of random bytes
    <type>.read.bin       f32, what the type's `to_float` makes of them

gguf-py must agree, or the program fails: with what is read of every type, NaN for NaN, and with what is written in Q8_0, which is the
type that llama.cpp's converters write with it.
"""
import argparse
import ctypes
import json
import pathlib

import gguf
import numpy

ROOT = pathlib.Path(__file__).resolve().parent.parent.parent
ROW = 512
READ = 2048  # values
TYPES = ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"]
READ_ONLY = ["IQ4_NL", "MXFP4"]


def main():
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("--ggml", type=pathlib.Path, required=True)
    arguments.add_argument("--out", type=pathlib.Path, default=ROOT / "testdata" / "blocks")
    options = arguments.parse_args()
    ggml = Ggml(options.ggml)
    options.out.mkdir(exist_ok=True)

    rng = numpy.random.default_rng(20)
    values = numpy.concatenate([row.astype(numpy.float32) for row in rows(rng)])
    assert numpy.isfinite(values).all()
    values.tofile(options.out / "values.bin")
    for name in TYPES + READ_ONLY:
        kind = gguf.GGMLQuantizationType[name]
        elements, size = gguf.GGML_QUANT_SIZES[kind]
        count = READ // elements
        blocks = rng.integers(0, 256, count * size, dtype=numpy.uint8)
        if name in TYPES:
            written = ggml.quantize(kind, values)
            written.tofile(options.out / f"{name}.written.bin")
            blocks[: count // 2 * size] = written[: count // 2 * size]
        if name == "Q8_0":
            with numpy.errstate(all="ignore"):
                assert (gguf.quants.quantize(values.reshape(-1, ROW), kind).ravel() == written).all(), name
        read = ggml.dequantize(kind, blocks)
        with numpy.errstate(all="ignore"):
            second = gguf.quants.dequantize(blocks, kind)
        assert numpy.array_equal(read, second, equal_nan=True), name
        blocks.tofile(options.out / f"{name}.blocks.bin")
        read.tofile(options.out / f"{name}.read.bin")


def rows(rng):
    """What can go wrong in a block, each in a row of its own."""
    normal = lambda: rng.standard_normal(ROW)
    sub_blocks = lambda low, high: numpy.repeat(10.0 ** rng.uniform(low, high, ROW // 16), 16)
    yield normal() * 0.02
    yield normal() * sub_blocks(-4, 0)  # scales that do not fit one another
    yield rng.uniform(-1, 1, ROW)
    yield rng.uniform(0.5, 1.5, ROW)  # no minimum below 0
    yield -rng.uniform(0.5, 1.5, ROW)
    yield normal() ** 3  # heavy tails
    yield numpy.where(rng.random(ROW) < 0.03, normal() * 3, normal() * 0.02)  # outliers
    yield numpy.where(rng.random(ROW) < 0.7, rng.choice([0.0, -0.0], ROW), normal())  # zeros of either sign
    yield rng.choice([0.0, -0.0], ROW)
    yield numpy.where(rng.random(ROW) < 0.7, rng.choice([0.0, -0.0], ROW), abs(normal()))  # a zero is the minimum
    yield numpy.repeat([0.0, 0.7, -0.7, 1e-3], ROW // 4)  # constants
    yield numpy.repeat(normal()[: ROW // 16], 16)  # constant in each sub-block
    yield 1 + rng.integers(0, 5, ROW) * 2.0**-23  # constant but for the last bits
    yield rng.integers(-127, 128, ROW) * 0.5  # halves, which some scales leave as they are
    yield numpy.round(normal() * 8) / 64  # few levels
    yield rng.choice([1.0, -1.0], ROW)  # two values equally far from 0
    yield numpy.where(numpy.arange(ROW) % 32 == 31, -4.0, rng.uniform(0, 3.9, ROW))  # farthest: below 0
    yield numpy.where(numpy.arange(ROW) % 32 == 31, 4.0, -rng.uniform(0, 3.9, ROW))  # farthest: above 0
    yield normal() * 1e-6  # scales that are subnormal in f16
    yield normal() * 1e-9  # scales that round to 0 in f16
    yield normal() * 10.0 ** -rng.uniform(12, 45, ROW)  # down to subnormal, or 0, in f32
    yield normal() * numpy.repeat(10.0 ** rng.uniform(3, 6, ROW // 32), 32)  # scales near f16's largest, and beyond
    yield numpy.clip(normal() * 1e38, -3e38, 3e38)  # sums overflow
    yield from trained()


def trained():
    """Weights of the small chat model."""
    path = ROOT / "testdata" / "tiny-chat" / "model.safetensors"
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    for name in sorted(name for name in header if "layers.1." in name and "proj" in name)[:3]:
        start, end = header[name]["data_offsets"]
        raw = data[8 + length + start : 8 + length + end]
        if header[name]["dtype"] == "BF16":
            values = (numpy.frombuffer(raw, "<u2").astype(numpy.uint32) << 16).view(numpy.float32)
        else:
            values = numpy.frombuffer(raw, {"F32": "<f4", "F16": "<f2"}[header[name]["dtype"]])
        yield values[:ROW]


class Ggml:
    """The two functions of llama.cpp's library."""

    class Traits(ctypes.Structure):
        """The head of `struct ggml_type_traits`."""

        _fields_ = [
            ("type_name", ctypes.c_char_p),
            ("blck_size", ctypes.c_int64),
            ("blck_size_interleave", ctypes.c_int64),
            ("type_size", ctypes.c_size_t),
            ("is_quantized", ctypes.c_bool),
            ("to_float", ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64)),
        ]

    def __init__(self, path):
        self.library = ctypes.CDLL(str(path.resolve()))
        self.library.ggml_quantize_chunk.restype = ctypes.c_size_t
        pointer, number = ctypes.c_void_p, ctypes.c_int64
        self.library.ggml_quantize_chunk.argtypes = [ctypes.c_int, pointer, pointer, number, number, number, pointer]
        self.library.ggml_get_type_traits.restype = ctypes.POINTER(self.Traits)

    def quantize(self, kind, values):
        elements, size = gguf.GGML_QUANT_SIZES[kind]
        out = numpy.zeros(values.size // elements * size, numpy.uint8)
        rows = values.size // ROW
        self.library.ggml_quantize_chunk(int(kind), values.ctypes.data, out.ctypes.data, 0, rows, ROW, None)
        return out

    def dequantize(self, kind, blocks):
        elements, size = gguf.GGML_QUANT_SIZES[kind]
        traits = self.library.ggml_get_type_traits(int(kind)).contents
        assert (traits.blck_size, traits.type_size) == (elements, size), kind
        out = numpy.zeros(blocks.size // size * elements, numpy.float32)
        traits.to_float(blocks.ctypes.data, out.ctypes.data, out.size)
        return out


if __name__ == "__main__":
    main()
