"""Writes testdata/gguf/: small files by gguf-py, as a reader that was not written with it must find them.

    python testdata/gen/gguf_files.py

Needs gguf and numpy of requirements.txt. Without randomness, so running it again changes nothing. What gguf-py does not write is made
from what it writes: empty arrays through one method that is overridden, an unknown type through a number put in place of another,
version 2 through the version's byte.
"""

import pathlib

import numpy
from gguf import GGMLQuantizationType as Type
from gguf import GGUFValueType as Value
from gguf import GGUFWriter, quantize
from gguf.gguf_writer import TensorInfo

OUT = pathlib.Path(__file__).resolve().parent.parent / "gguf"


class Empty:
    """An empty array of values of one type."""

    def __init__(self, elements):
        self.elements = elements


class Writer(GGUFWriter):
    def _pack_val(self, val, vtype, add_vtype, sub_type=None):
        if not isinstance(val, Empty):
            return super()._pack_val(val, vtype, add_vtype, sub_type)
        start = self._pack("I", Value.ARRAY) if add_vtype else b""
        return start + self._pack("I", val.elements) + self._pack("Q", 0)


def write(writer):
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def ramp(*shape):
    """-1 to 1, of which every element is another."""
    return numpy.linspace(-1, 1, int(numpy.prod(shape)), dtype=numpy.float32).reshape(shape)


def add_scalars(writer):
    writer.add_uint8("scalar.u8", 200)
    writer.add_int8("scalar.i8", -100)
    writer.add_uint16("scalar.u16", 60_000)
    writer.add_int16("scalar.i16", -30_000)
    writer.add_uint32("scalar.u32", 4_000_000_000)
    writer.add_int32("scalar.i32", -2_000_000_000)
    writer.add_float32("scalar.f32", 0.1)
    writer.add_bool("scalar.true", True)
    writer.add_bool("scalar.false", False)
    writer.add_string("scalar.text", "caf\u00e9 \U0001f980\0end")
    writer.add_key_value("scalar.no-text", "", Value.STRING)
    writer.add_uint64("scalar.u64", 2**64 - 1)
    writer.add_int64("scalar.i64", -(2**63))
    writer.add_float64("scalar.f64", 0.1)


def add_arrays(writer):
    for name, values, elements in [
        ("u8", [0, 255], Value.UINT8), ("i8", [-128, 127], Value.INT8), ("u16", [0, 65_535], Value.UINT16),
        ("i16", [-32_768, 32_767], Value.INT16), ("u32", [0, 2**32 - 1], Value.UINT32), ("i32", [-(2**31), 2**31 - 1], Value.INT32),
        ("f32", [0.1, -0.0, float("inf")], Value.FLOAT32), ("bool", [True, False, True], Value.BOOL),
        ("text", ["", "a", "\u4e2d\u6587"], Value.STRING), ("u64", [0, 2**64 - 1], Value.UINT64),
        ("i64", [-(2**63), 2**63 - 1], Value.INT64), ("f64", [0.1, -0.0, float("-inf")], Value.FLOAT64),
    ]:
        writer.add_key_value(f"array.{name}", values, Value.ARRAY, elements)


def values():
    """Every type of value, and tensors of types that other readers read."""
    writer = Writer(OUT / "values.gguf", "llama")
    add_scalars(writer)
    add_arrays(writer)
    writer.add_tensor("matrix.f32", ramp(3, 5))
    writer.add_tensor("list.f16", ramp(7).astype(numpy.float16))
    for quantized in [Type.BF16, Type.Q4_0, Type.Q4_1, Type.Q5_0, Type.Q5_1, Type.Q8_0]:
        writer.add_tensor(f"cube.{quantized.name.lower()}", quantize(ramp(2, 3, 64), quantized), raw_dtype=quantized)
    write(writer)


def arrays():
    """Arrays without elements, of every type, and arrays in arrays."""
    writer = Writer(OUT / "arrays.gguf", "llama")
    for elements in Value:
        writer.add_key_value(f"empty.{elements.name.lower()}", Empty(elements), Value.ARRAY)
    writer.add_array("nested.numbers", [[1, 2], [3], [-4, 5, 6]])
    writer.add_array("nested.texts", [["a", ""], ["b"]])
    writer.add_array("nested.deep", [[[0.5]], [[1.5, 2.5], [3.5]]])
    writer.add_array("nested.empty", [Empty(Value.UINT16), [7], Empty(Value.ARRAY)])
    write(writer)


def nested_types(original):
    """`GGUFValueType.get_type`, which does not know `Empty`."""
    return lambda value: Value.ARRAY if isinstance(value, Empty) else original(value)


def aligned():
    """64 instead of 32, with padding of every kind: much, little and none."""
    writer = Writer(OUT / "aligned-64.gguf", "llama")
    writer.add_custom_alignment(64)
    for length in [1, 15, 16, 17, 32]:
        writer.add_tensor(f"list.{length}", ramp(length))
    write(writer)
    file = (OUT / "aligned-64.gguf").read_bytes()
    # The second version has the third's layout.
    (OUT / "version-2.gguf").write_bytes(file[:4] + b"\2\0\0\0" + file[8:])


def types():
    """Tensors of types that few readers know, and one of a type that none does: 5 numbers in 77 bytes."""
    writer = Writer(OUT / "types.gguf", "llama")
    for dtype in [numpy.int8, numpy.int16, numpy.int32, numpy.int64, numpy.float64]:
        writer.add_tensor(numpy.dtype(dtype).name, numpy.arange(-3, 4).astype(dtype))
    writer.add_tensor("strange", numpy.arange(77, dtype=numpy.int8))
    writer.tensors[0]["strange"] = TensorInfo(shape=[5], dtype=1000, nbytes=77, tensor=writer.tensors[0]["strange"].tensor)
    for dtype, blocks in [(Type.IQ4_NL, 18), (Type.MXFP4, 17), (Type.Q6_K, 210)]:
        writer.add_tensor(dtype.name.lower(), numpy.arange(2 * blocks, dtype=numpy.uint8).reshape(2, blocks), raw_dtype=dtype)
    write(writer)


def split():
    """Three tensors in two files: the first file has all keys, and both say which part they are."""
    writer = Writer(OUT / "split.gguf", "llama", split_max_tensors=2)
    writer.add_string("general.name", "in two parts")
    for name in "abc":
        writer.add_tensor(name, ramp(2, 3) + ord(name))
    write(writer)


def main():
    OUT.mkdir(exist_ok=True)
    Value.get_type = staticmethod(nested_types(Value.get_type))
    for make in [values, arrays, aligned, types, split]:
        make()


if __name__ == "__main__":
    main()
