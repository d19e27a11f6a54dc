"""Writes testdata/hostile/: files that a reader must refuse, and a few that it must not.

Each file starts with `expect: KIND` and `comment: WHY`, then an empty line; the bytes under test are what follows.
KIND is the variant of the error, or `sound`. The folder says what the bytes are read as.

    python3 testdata/gen/hostile.py testdata/hostile

Standard library only. Without randomness, so running it again changes nothing.
"""

import hashlib
import json
import pathlib
import struct
import sys

OUT = pathlib.Path(sys.argv[1])


def case(folder, name, expect, comment, data):
    path = OUT / folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(f"expect: {expect}\ncomment: {comment}\n\n".encode() + data)


def file(header, data=b""):
    """A safetensors file of that header, which may be text or bytes."""
    header = header.encode() if isinstance(header, str) else header
    return struct.pack("<Q", len(header)) + header + data


def entry(dtype="U8", shape=(4,), offsets=(0, 4)):
    return json.dumps({"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)})


def tensors(*entries, metadata=None):
    parts = [f"{json.dumps(name)}:{text}" for name, text in entries]
    if metadata is not None:
        parts.insert(0, f'"__metadata__":{metadata}')
    return "{" + ",".join(parts) + "}"


def safetensors_cases():
    def s(name, expect, comment, data):
        case("safetensors", name, expect, comment, data)

    one = tensors(("a", entry()))
    four = b"\1\2\3\4"
    s("sound-one-tensor", "sound", "the control of all others", file(one, four))
    s("sound-no-tensor", "sound", "an empty object has nothing to disagree with", file("{}"))
    s("sound-padded", "sound", "spaces at the end of the header are how writers align the data", file(one + "     ", four))
    s("sound-empty-tensors", "sound", "two tensors without bytes may share an offset",
      file(tensors(("a", entry("F32", (0,), (0, 0))), ("b", entry("F32", (3, 0), (0, 0)))))),
    s("sound-scalar", "sound", "an empty shape is one element", file(tensors(("a", entry("F32", (), (0, 4)))), four))
    s("sound-unordered", "sound", "the header may list tensors in any order",
      file(tensors(("b", entry(shape=(2,), offsets=(2, 4))), ("a", entry(shape=(2,), offsets=(0, 2)))), four))
    s("sound-packed", "sound", "four 6-bit floats are three bytes", file(tensors(("a", entry("F6_E2M3", (4,), (0, 3)))), b"abc"))

    s("short-nothing", "TooShort", "no bytes at all", b"")
    s("short-seven", "TooShort", "one byte less than the header's length takes", b"\0" * 7)
    s("header-past-end", "HeaderPastEnd", "a cut download", struct.pack("<Q", 5000) + b"{}  ")
    s("header-one-past-end", "HeaderPastEnd", "off by one", struct.pack("<Q", 3) + b"{}")
    s("header-at-limit", "HeaderPastEnd", "the longest header allowed, not there", struct.pack("<Q", 100_000_000) + b"{}")
    s("header-over-limit", "HeaderTooLong", "one byte over the limit", struct.pack("<Q", 100_000_001) + b"{}")
    s("header-huge", "HeaderTooLong", "a length that wraps when 8 is added", struct.pack("<Q", 2**64 - 1) + b"{}")
    s("header-empty", "HeaderStart", "a header of no bytes", struct.pack("<Q", 0))
    s("header-space-first", "HeaderStart", "the format wants the brace first", file(" " + one, four))
    s("header-array", "HeaderStart", "an array is no header", file("[]"))
    s("header-zip", "HeaderPastEnd", "a PyTorch zip archive under a safetensors name", b"PK\3\4" + b"\0" * 60)
    s("header-not-utf8", "HeaderNotUtf8", "a byte that is no UTF-8 inside a name", file(b'{"\xff":' + entry().encode() + b"}", four))
    s("header-cut", "HeaderSyntax", "JSON that ends early", file(one[:-1], four))
    s("header-trailing", "HeaderSyntax", "a second value behind the header", file(one + "{}", four))
    s("header-trailing-nul", "HeaderSyntax", "padding is spaces, not zero bytes", file(one + "\0\0", four))
    s("deep-nesting", "HeaderSyntax", "20000 brackets must not overflow the stack", file('{"a":' + "[" * 20_000, b""))
    s("deep-nesting-ignored", "HeaderSyntax", "the same in a field that is skipped",
      file('{"a":{"x":' + "[" * 20_000, b""))
    s("lone-surrogate", "HeaderSyntax", "an escape that is no character", file('{"\\ud800":' + entry() + "}", four))

    s("duplicate-tensor", "DuplicateTensor", "same offsets, other type: the last would win silently",
      file(tensors(("a", entry("F32", (1,), (0, 4))), ("a", entry("I32", (1,), (0, 4)))), four))
    s("duplicate-tensor-escaped", "DuplicateTensor", "the same name in another spelling",
      file('{"a":' + entry() + ',"\\u0061":' + entry() + "}", four))
    s("duplicate-tensor-apart", "DuplicateTensor", "other offsets",
      file(tensors(("a", entry(shape=(2,), offsets=(0, 2))), ("a", entry(shape=(2,), offsets=(2, 4)))), four))
    s("duplicate-metadata-object", "DuplicateTensor", "metadata twice",
      file('{"__metadata__":{},"__metadata__":{},"a":' + entry() + "}", four))
    s("duplicate-metadata-key", "DuplicateMetadata", "a key twice",
      file(tensors(("a", entry()), metadata='{"format":"pt","format":"tf"}'), four))
    for field, value in [("dtype", '"U8"'), ("shape", "[4]"), ("data_offsets", "[0,4]")]:
        s(f"duplicate-{field}", "DuplicateField", "a field twice, even with the same value",
          file(tensors(("a", entry()[:-1] + f',"{field}":{value}}}')), four))
        fields = json.loads(entry())
        del fields[field]
        s(f"missing-{field}", "MissingField", "a field less", file(tensors(("a", json.dumps(fields))), four))
    s("unknown-field", "UnknownField", "a field whose meaning nobody knows", file(tensors(("a", entry()[:-1] + ',"stride":[1]}')), four))
    s("metadata-number", "HeaderSyntax", "metadata maps strings to strings", file(tensors(("a", entry()), metadata='{"a":1}'), four))
    s("metadata-list", "HeaderSyntax", "metadata is an object", file(tensors(("a", entry()), metadata="[]"), four))
    s("metadata-null", "HeaderSyntax", "metadata is absent or an object", file(tensors(("a", entry()), metadata="null"), four))
    s("metadata-nested", "HeaderSyntax", "no objects inside", file(tensors(("a", entry()), metadata='{"a":{}}'), four))
    s("dtype-unknown", "UnknownDtype", "a type of no version", file(tensors(("a", entry("F7"))), four))
    s("dtype-lowercase", "UnknownDtype", "types are spelled in capitals", file(tensors(("a", entry("u8"))), four))
    s("dtype-number", "HeaderSyntax", "a type is a string", file(tensors(("a", '{"dtype":1,"shape":[4],"data_offsets":[0,4]}')), four))
    s("shape-negative", "HeaderSyntax", "a dimension below zero", file(tensors(("a", entry(shape=(-4,)))), four))
    s("shape-fraction", "HeaderSyntax", "half a dimension", file(tensors(("a", entry(shape=(4.5,)))), four))
    s("shape-float", "HeaderSyntax", "4.0 is not an integer here", file(tensors(("a", entry(shape=(4.0,)))), four))
    s("shape-over-u64", "HeaderSyntax", "one more than 64 bits hold", file(tensors(("a", entry(shape=(2**64,)))), four))
    s("shape-product-overflow", "ShapeOverflow", "2^32 * 2^32 wraps to 0", file(tensors(("a", entry(shape=(2**32, 2**32), offsets=(0, 0))))))
    s("shape-overflow-hidden-by-zero", "ShapeOverflow", "a zero behind the overflow does not excuse it",
      file(tensors(("a", entry(shape=(2**63, 4, 0), offsets=(0, 0))))))
    s("shape-bits-overflow", "ShapeOverflow", "the elements fit, their bits do not", file(tensors(("a", entry("F64", (2**60,), (0, 0))))))
    s("dimensions-at-limit", "sound", "64 dimensions", file(tensors(("a", entry(shape=[1] * 63 + [4]))), four))
    s("dimensions-over-limit", "TooManyDimensions", "65 dimensions", file(tensors(("a", entry(shape=[1] * 64 + [4]))), four))
    s("torn-byte", "TornByte", "three 4-bit floats are a byte and a half", file(tensors(("a", entry("F4", (3,), (0, 2)))), b"ab"))
    s("size-too-small", "SizeMismatch", "four bytes for two F32", file(tensors(("a", entry("F32", (2,), (0, 4)))), four))
    s("size-too-large", "SizeMismatch", "four bytes for three U8", file(tensors(("a", entry("U8", (3,), (0, 4)))), four))
    s("offsets-three", "HeaderSyntax", "two offsets, no more", file(tensors(("a", entry(offsets=(0, 4, 8)))), four))
    s("offsets-one", "HeaderSyntax", "two offsets, no less", file(tensors(("a", entry(offsets=(4,)))), four))
    s("offsets-negative", "HeaderSyntax", "an offset below zero", file(tensors(("a", entry(offsets=(-4, 0)))), four))
    s("offsets-reversed", "OffsetsReversed", "the end before the start", file(tensors(("a", entry(shape=(0,), offsets=(4, 0)))), four))
    s("offsets-wrap", "Hole", "far behind the end, of the right length", file(tensors(("a", entry(offsets=(2**64 - 5, 2**64 - 1)))), four))
    s("hole-at-start", "Hole", "four bytes that belong to nobody", file(tensors(("a", entry(offsets=(4, 8)))), four * 2))
    s("hole-between", "Hole", "room for another file inside",
      file(tensors(("a", entry()), ("b", entry(offsets=(8, 12)))), four * 3))
    s("overlap", "Overlap", "two tensors share two bytes",
      file(tensors(("a", entry()), ("b", entry(offsets=(2, 6)))), four * 2))
    s("overlap-same", "Overlap", "two names for the same bytes", file(tensors(("a", entry()), ("b", entry())), four))
    s("data-short", "DataTooShort", "the last byte is missing", file(one, four[:3]))
    s("data-missing", "DataTooShort", "all of it is missing", file(one))
    s("data-long", "DataTooLong", "a byte behind the last tensor", file(one, four + b"x"))
    s("data-without-tensors", "DataTooLong", "bytes and no tensor to own them", file("{}", four))


def record(**changes):
    """A record of the perturbation format; a change to None leaves the field out."""
    fields = {
        "format_version": 1,
        "method": "adaptive",
        "parameters": {"rho": 0.5},
        "direction": "restores-safety",
        "seed": 7,
        "space": "weights",
        "base": {"w": {"dtype": "BF16", "shape": [2], "sha256": hashlib.sha256(b"base").hexdigest()}},
        "data": [{"role": "harmful", "name": "h.jsonl", "sha256": hashlib.sha256(b"rows").hexdigest(), "rows": 3}],
        "tool": "panacea-patch 0.1.0",
    }
    fields.update(changes)
    return {key: value for key, value in fields.items() if value is not None}


def perturbation(text, values=struct.pack("<2f", 0.5, -0.25), name="w", dtype="F32", shape=(2,), more=""):
    text = text if isinstance(text, str) else json.dumps(text)
    header = tensors((name, entry(dtype, shape, (0, len(values)))), metadata='{"panacea":' + json.dumps(text) + more + "}")
    return file(header, values)


def perturbation_cases():
    def p(name, expect, comment, data):
        case("perturbation", name, expect, comment, data)

    base = record()["base"]
    p("sound", "sound", "the control of all others; not canonical, which writers must be and readers need not ask for", perturbation(record()))
    p("no-metadata", "NoRecord", "a checkpoint is no perturbation", file(tensors(("w", entry("F32", (2,), (0, 8)))), b"\0" * 8))
    p("other-metadata", "NoRecord", "nor is one with other metadata",
      file(tensors(("w", entry("F32", (2,), (0, 8))), metadata='{"format":"pt"}'), b"\0" * 8))
    p("two-metadata", "NoRecord", "the record stands alone", perturbation(record(), more=',"format":"pt"'))
    p("record-not-json", "RecordSyntax", "text that is no JSON", perturbation("restores-safety"))
    p("record-array", "Version", "JSON that is no object", perturbation([]))
    p("record-twice", "RecordSyntax", "a direction for the reviewer, another for the machine",
      perturbation(json.dumps(record())[:-1] + ',"direction":"restores-safety"}'))
    p("record-nested-twice", "RecordSyntax", "the same inside the parameters",
      perturbation(json.dumps(record()).replace('{"rho": 0.5}', '{"rho":0.5,"rho":5}')))
    p("record-deep", "RecordSyntax", "brackets must not overflow the stack", perturbation("[" * 20_000))
    p("version-2", "Version", "a later version is not guessed at", perturbation(record(format_version=2)))
    p("version-text", "Version", "a version is a number", perturbation(record(format_version="1")))
    p("version-float", "Version", "and an integer", perturbation(record(format_version=1.0)))
    p("version-missing", "Version", "a record says its version", perturbation(record(format_version=None)))
    p("direction-weakens", "Direction", "made to weaken a model", perturbation(record(direction="weakens-safety")))
    p("direction-missing", "Direction", "made for who knows what", perturbation(record(direction=None)))
    p("direction-case", "Direction", "spelled in another way", perturbation(record(direction="Restores-Safety")))
    p("space-adapter", "sound", "for the A and B of an adapter", perturbation(record(space="adapter")))
    p("space-activations", "Space", "a space that is not supported", perturbation(record(space="activations")))
    p("space-case", "Space", "spelled in another way", perturbation(record(space="Adapter")))
    p("space-list", "Space", "a space is a string", perturbation(record(space=["weights"])))
    p("unknown-field", "RecordSyntax", "a field whose meaning nobody knows", perturbation(record(scale=-1)))
    for field in ["method", "parameters", "seed", "base", "data", "tool"]:
        p(f"missing-{field}", "RecordSyntax", "a field less", perturbation(record(**{field: None})))
    p("seed-negative", "RecordSyntax", "a seed is not negative", perturbation(record(seed=-1)))
    p("base-digest-short", "RecordSyntax", "a digest cut to 63 digits",
      perturbation(record(base={"w": dict(base["w"], sha256=base["w"]["sha256"][:-1])})))
    p("base-digest-capitals", "RecordSyntax", "digests have one spelling",
      perturbation(record(base={"w": dict(base["w"], sha256=base["w"]["sha256"].upper())})))
    p("base-unknown-field", "RecordSyntax", "no unknown fields inside either", perturbation(record(base={"w": dict(base["w"], offset=1)})))
    p("base-dtype-unknown", "RecordSyntax", "a type of no version", perturbation(record(base={"w": dict(base["w"], dtype="F7")})))
    p("base-dtype-integer", "BaseDtype", "integers cannot be patched", perturbation(record(base={"w": dict(base["w"], dtype="I32")})))
    p("base-shape", "Shape", "as many elements in another shape", perturbation(record(base={"w": dict(base["w"], shape=[1, 2])})))
    p("base-other-tensor", "Undescribed", "a tensor that the record does not name", perturbation(record(), name="v"))
    p("base-one-more", "Absent", "the record names one that is not there", perturbation(record(base={"w": base["w"], "z": base["w"]})))
    p("no-tensors", "Empty", "nothing to add",
      file(tensors(metadata='{"panacea":' + json.dumps(json.dumps(record(base={}))) + "}")))
    p("values-f16", "Dtype", "a perturbation is F32", perturbation(record(), b"\0" * 4, dtype="F16"))
    p("values-nan", "NotFinite", "one NaN ruins a model", perturbation(record(), struct.pack("<2f", 0.0, float("nan"))))
    p("values-infinite", "NotFinite", "so does an infinity", perturbation(record(), struct.pack("<2f", float("-inf"), 0.0)))
    compact_cases(p)


def compact_cases(p):
    """Low-rank and sparse forms, for a base tensor `w` of 2 x 3."""
    base = {"w": {"dtype": "BF16", "shape": [2, 3], "sha256": hashlib.sha256(b"base").hexdigest()}}

    def f32(*values):
        return "F32", [len(values)], struct.pack(f"<{len(values)}f", *values)

    def u32(*values):
        return "U32", [len(values)], struct.pack(f"<{len(values)}I", *values)

    def shaped(part, *shape):
        return part[0], shape, part[2]

    def packed(parts, base=base):
        entries, data = [], b""
        for name, (dtype, shape, values) in parts.items():
            entries.append((name, entry(dtype, shape, (len(data), len(data) + len(values)))))
            data += values
        return file(tensors(*entries, metadata='{"panacea":' + json.dumps(json.dumps(record(base=base))) + "}"), data)

    a, b = shaped(f32(1, 2, 3), 1, 3), shaped(f32(-1, 0.5), 2, 1)
    indices, values = u32(0, 5), f32(0.5, -1)

    def low_rank(name, expect, comment, a=a, b=b, **more):
        p(f"low-rank-{name}", expect, comment, packed({"w.lora_A": a, "w.lora_B": b}, **more))

    def sparse(name, expect, comment, indices=indices, values=values, **more):
        p(f"sparse-{name}", expect, comment, packed({"w.indices": indices, "w.values": values}, **more))

    def shape(*dimensions):
        return {"base": {"w": dict(base["w"], shape=dimensions)}}

    low_rank("sound", "sound", "the control of the low-rank ones")
    low_rank("of-full-rank", "sound", "rank 2 of a 2 x 3 matrix", shaped(f32(*range(6)), 2, 3), shaped(f32(*range(4)), 2, 2))
    low_rank("over-full-rank", "Rank", "rank 3 of a 2 x 3 matrix", shaped(f32(*range(9)), 3, 3), shaped(f32(*range(6)), 2, 3))
    low_rank("of-rank-zero", "Factors", "factors without elements", shaped(f32(), 0, 3), shaped(f32(), 2, 0))
    low_rank("huge-rank", "Factors", "a rank of 2^64 - 1 beside a base without inputs",
             shaped(f32(), 2**64 - 1, 0), shaped(f32(), 2, 0), **shape(2, 0))
    low_rank("other-rank", "Factors", "factors of ranks 1 and 2", b=shaped(f32(1, 2, 3, 4), 2, 2))
    low_rank("exchanged", "Factors", "A under the name of B", a=b, b=a)
    low_rank("transposed", "Factors", "A as inputs x rank", a=shaped(f32(1, 2, 3), 3, 1))
    low_rank("flat", "Factors", "factors that are lists", a=f32(1, 2, 3), b=f32(1, 2))
    low_rank("other-shape", "Factors", "of a 3 x 2 base", **shape(3, 2))
    low_rank("of-a-list", "Factors", "of a base that is no matrix", **shape(6))
    low_rank("of-three-dimensions", "Factors", "nor is that one", **shape(1, 2, 3))
    low_rank("bf16", "Dtype", "factors are F32", a=("BF16", [1, 3], b"\0" * 6))
    low_rank("integers", "Dtype", "and not integers of as many bytes", b=shaped(u32(1, 2), 2, 1))
    low_rank("nan", "NotFinite", "one NaN ruins a row", b=shaped(f32(1, float("nan")), 2, 1))
    low_rank("infinite", "NotFinite", "an infinity ruins a column", a=shaped(f32(1, float("inf"), 0), 1, 3))
    low_rank("overflow", "Product", "finite factors of an infinite product",
             shaped(f32(1e30, 1, 1), 1, 3), shaped(f32(1, -1e30), 2, 1))
    low_rank("base-integer", "BaseDtype", "integers cannot be patched", base={"w": dict(base["w"], dtype="I32")})

    sparse("sound", "sound", "the control of the sparse ones")
    sparse("empty", "sound", "nothing to add to this tensor", u32(), f32())
    sparse("whole", "sound", "every element", u32(*range(6)), f32(*range(6)))
    sparse("of-a-list", "sound", "a base of any dimensions will do", **shape(6))
    sparse("past-end", "Index", "element 6 of 6", u32(0, 6))
    sparse("far-past-end", "Index", "the largest index that there is", u32(0, 2**32 - 1))
    sparse("of-nothing", "Index", "element 0 of none", u32(0), f32(1), **shape(2, 0))
    sparse("twice", "Index", "an element twice: one value would be lost", u32(5, 5))
    sparse("descending", "Index", "a list that cannot be searched", u32(5, 0))
    sparse("fewer-values", "Entries", "two indices, one value", values=f32(1))
    sparse("more-values", "Entries", "two indices, three values", values=f32(1, 2, 3))
    sparse("shaped", "Entries", "lists are flat", shaped(indices, 2, 1), shaped(values, 2, 1))
    sparse("scalar", "Entries", "nor are they scalars", shaped(u32(0), *()), shaped(f32(1), *()))
    sparse("signed", "Dtype", "indices are U32", indices=("I32", [2], struct.pack("<2i", 0, -1)))
    sparse("wide", "Dtype", "and not U64", indices=("U64", [2], struct.pack("<2Q", 0, 5)))
    sparse("bf16", "Dtype", "values are F32", values=("BF16", [2], b"\0" * 4))
    sparse("nan", "NotFinite", "one NaN ruins a model", values=f32(1, float("nan")))
    sparse("too-large", "TooLarge", "elements that no index reaches", u32(), f32(), **shape(2**16, 2**16 + 1))
    sparse("at-limit", "sound", "2^32 elements, and the last of them", u32(2**32 - 1), f32(1), **shape(2**16, 2**16))
    sparse("overflow", "TooLarge", "2^64 elements, which wrap to none", u32(), f32(), **shape(2**32, 2**32))

    for part, of in [("lora_A", a), ("lora_B", b), ("indices", indices), ("values", values)]:
        p(f"form-{part}", "Form", "half of a form", packed({f"w.{part}": of}))
        p(f"form-{part}-and-dense", "Form", "a tensor and half of another form",
          packed({"w": shaped(f32(*range(6)), 2, 3), f"w.{part}": of}))
    whole = {"w.lora_A": a, "w.lora_B": b, "w.indices": indices, "w.values": values}
    p("form-two", "Form", "low rank and sparse: which is it", packed(whole))
    p("form-crossed", "Form", "halves of two forms", packed({"w.lora_A": a, "w.values": values}))
    p("form-capitals", "Undescribed", "ends have one spelling", packed({"w.lora_a": a, "w.lora_B": b}))
    p("form-twice-removed", "Undescribed", "an end on an end", packed({"w.lora_A.values": values, "w.lora_A.indices": indices}))
    p("form-no-name", "Undescribed", "an end on nothing", packed({".lora_A": a, ".lora_B": b}))
    p("form-mixed", "sound", "each tensor has a form of its own",
      packed({"v": shaped(f32(*range(6)), 2, 3), "w.indices": indices, "w.lora_A.lora_A": a, "w.lora_A.lora_B": b, "w.values": values},
             base=dict(base, **{"v": base["w"], "w.lora_A": base["w"]})))
    named = dict(base, **{"w.lora_A": dict(base["w"], shape=[1, 3])})
    p("form-of-a-name", "sound", "a described name is dense, whatever it ends in",
      packed({"w": shaped(f32(*range(6)), 2, 3), "w.lora_A": a}, base=named))
    p("form-taken-name", "Form", "so `w` has half a form here, although the shapes would fit",
      packed({"w.lora_A": a, "w.lora_B": b}, base=named))


def index_cases():
    """Read beside `one.safetensors`, which holds `a` and `b`, and `two.safetensors`, which holds `c`."""

    def i(name, expect, comment, value):
        data = value if isinstance(value, bytes) else json.dumps(value).encode()
        case("index", name, expect, comment, data)

    one, two = "one.safetensors", "two.safetensors"
    good = {"a": one, "b": one, "c": two}
    i("sound", "sound", "the control of all others", {"metadata": {"total_size": 12}, "weight_map": good})
    i("empty", "IndexSyntax", "no bytes", b"")
    i("not-json", "IndexSyntax", "text", b"weights")
    i("not-utf8", "NoWeightMap", "not even text", b'{"weight_map":{"\xff":"one.safetensors"}}')
    i("array", "NoWeightMap", "not an object", [])
    i("no-map", "NoWeightMap", "no map", {"metadata": {}})
    i("empty-map", "NoWeightMap", "a map of nothing", {"weight_map": {}})
    i("map-to-number", "NoWeightMap", "a map to something else", {"weight_map": dict(good, c=2)})
    i("map-twice", "IndexSyntax", "two maps", json.dumps({"weight_map": good}).encode()[:-1] + b',"weight_map":{}}')
    i("tensor-twice-in-map", "IndexSyntax", "a tensor mapped twice",
      b'{"weight_map":{"a":"one.safetensors","b":"one.safetensors","c":"two.safetensors","c":"one.safetensors"}}')
    i("deep", "IndexSyntax", "brackets must not overflow the stack", b"[" * 20_000)
    i("shard-missing", "ShardMissing", "a shard that was not downloaded", {"weight_map": dict(good, d="three.safetensors")})
    for name, shard in [
        ("parent", "../one.safetensors"), ("absolute", "/etc/one.safetensors"), ("folder", "sub/one.safetensors"),
        ("backslash", "sub\\one.safetensors"), ("drive", "C:one.safetensors"), ("empty", ""), ("hidden", ".safetensors"),
        ("pickle", "pytorch_model.bin"), ("nul", "one.safetensors\0"),
    ]:
        i(f"shard-{name}", "ShardName", "a name that leads elsewhere, or is not that of a safetensors file", {"weight_map": dict(good, c=shard)})
    i("tensor-missing", "TensorMissing", "a tensor that no shard has", {"weight_map": dict(good, d=two)})
    i("tensor-elsewhere", "TensorElsewhere", "the right tensor in the wrong shard", {"weight_map": dict(good, a=two)})
    i("tensor-unlisted", "TensorUnlisted", "a tensor that the index hides", {"weight_map": {"a": one, "c": two}})
    i("tensor-in-two", "TensorTwice", "`twin.safetensors` holds `c` too", {"weight_map": dict(good, t="twin.safetensors")})

U8, I8, U16, I16, U32, I32, F32, BOOL, TEXT, ARRAY, U64, I64, F64 = range(13)


def text(value):
    value = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(value)) + value


def pair(key, kind, value):
    """A key and its value, which is a number or bytes; a kind that is none takes them, too."""
    if isinstance(value, int):
        formats = {U8: "B", I8: "b", U16: "H", I16: "h", U32: "I", I32: "i", BOOL: "B", U64: "Q", I64: "q"}
        value = struct.pack("<" + formats[kind], value)
    return text(key) + struct.pack("<I", kind) + value


def array(kind, count, values=b""):
    return struct.pack("<IQ", kind, count) + values


def info(name="a", shape=(1,), kind=0, offset=0, dimensions=None):
    """A tensor's description, of `shape` innermost dimension first: one F32 at the beginning of the data."""
    dimensions = len(shape) if dimensions is None else dimensions
    return text(name) + struct.pack(f"<I{len(shape)}QIQ", dimensions, *shape, kind, offset)


def padded(data, alignment=32):
    return data + b"\0" * (-len(data) % alignment)


def gguf(pairs=(), infos=(), data=None, version=3, keys=None, tensors=None, alignment=32):
    """A GGUF file of these parts, with padding in front of the data, if there is any."""
    keys = len(pairs) if keys is None else keys
    tensors = len(infos) if tensors is None else tensors
    header = b"GGUF" + struct.pack("<IQQ", version, tensors, keys) + b"".join(pairs) + b"".join(infos)
    return header if data is None else padded(header, alignment) + data


def gguf_cases():
    def g(name, expect, comment, data):
        case("gguf", name, expect, comment, data)

    four = b"\1\2\3\4"
    sound = gguf([pair("general.architecture", TEXT, text("llama"))], [info()], padded(four))
    g("sound", "sound", "the control of all others", sound)
    g("sound-nothing", "sound", "no keys, no tensors", gguf())
    g("sound-without-last-padding", "sound", "padding behind the last tensor need not be there", sound[:-28])
    g("sound-with-some-padding", "sound", "nor all of it", sound[:-5])
    g("sound-padding-of-no-zeros", "sound", "what padding holds is nobody's matter", sound[:-28] + b"x" * 28)
    g("sound-no-tensors-padded", "sound", "padding in front of no data", padded(gguf()))
    g("sound-no-tensors-half-padded", "sound", "or some of it", gguf() + b"\0" * 3)
    g("sound-file-type-is-text", "sound", "what a key of a model means is not the container's matter",
      gguf([pair("general.file_type", TEXT, text("F16"))]))

    for length in range(4):
        g(f"magic-{length}-bytes", "PastEnd", "not even the magic", b"GGUF"[:length])
    g("magic-ggml", "Magic", "the format before", b"GGML" + sound[4:])
    g("magic-backwards", "Magic", "the magic of the other byte order", b"FUGG" + sound[4:])
    g("magic-zip", "Magic", "a PyTorch zip archive under another name", b"PK\3\4" + b"\0" * 60)
    g("version-none", "PastEnd", "nothing behind the magic", b"GGUF")
    g("version-0", "UnknownVersion", "there was none", gguf(version=0))
    g("version-1", "Version1", "lengths had 32 bits", gguf(version=1))
    g("version-2", "sound", "the same but for the byte order", gguf(version=2))
    g("version-4", "UnknownVersion", "a later version is not guessed at", gguf(version=4))
    g("version-huge", "UnknownVersion", "nor is the last that there can be", gguf(version=2**32 - 1))
    g("version-big-endian", "BigEndian", "a file for other machines", b"GGUF" + struct.pack(">IQQ", 3, 0, 0))
    g("version-2-big-endian", "BigEndian", "there was none of that version", b"GGUF" + struct.pack(">IQQ", 2, 0, 0))

    for cut in range(8, 24, 5):
        g(f"counts-cut-at-{cut}", "PastEnd", "a cut download", sound[:cut])
    g("counts-huge", "CountPastEnd", "2^64 - 1 of both", gguf(keys=2**64 - 1, tensors=2**64 - 1))
    g("counts-wrap", "CountPastEnd", "2^61 keys, of which each takes 8 bytes at least", gguf(keys=2**61))
    g("tensors-huge", "CountPastEnd", "2^64 - 1 tensors and no keys", gguf(tensors=2**64 - 1))
    g("tensors-none", "CountPastEnd", "a tensor that is not there", gguf(tensors=1))
    least_key = pair("a", BOOL, 1)
    g("keys-shortest", "sound", "one key in the 14 bytes that it needs", gguf([least_key]))
    g("keys-in-a-byte-less", "CountPastEnd", "two keys in 27", gguf([least_key, b"\0" * 13]))
    g("keys-that-could-fit", "EmptyKey", "two keys in 28, the other made of zeros", gguf([least_key, b"\0" * 14]))
    least_tensor = info("", ())
    g("tensors-shortest", "sound", "one scalar without a name in the 24 bytes that it needs", gguf([], [least_tensor], four))
    g("tensors-in-a-byte-less", "CountPastEnd", "two tensors in 47", gguf([], [least_tensor, b"\0" * 23]))
    g("tensors-that-could-fit", "DuplicateTensor", "two tensors in 48, the other made of zeros", gguf([], [least_tensor, b"\0" * 24]))
    g("tensors-after-keys", "CountPastEnd", "one tensor, for which only the bytes of keys would have had room",
      gguf([pair("a", TEXT, text("x" * 40))], tensors=1))

    for name, claimed in [("512-mib", 2**29), ("one-past-end", 51), ("huge", 2**64 - 1), ("wrapping", 2**64 - 40)]:
        g(f"key-{name}", "PastEnd", "a key longer than the file", gguf([struct.pack("<Q", claimed) + b"x" * 50]))
        g(f"text-{name}", "PastEnd", "a text longer than the file", gguf([pair("a", TEXT, struct.pack("<Q", claimed) + b"x" * 50)]))
        g(f"text-in-array-{name}", "PastEnd", "the same in an array",
          gguf([pair("a", ARRAY, array(TEXT, 1, struct.pack("<Q", claimed) + b"x" * 50))]))
    g("text-to-the-end", "sound", "a text as long as the rest of the file", gguf([pair("a", TEXT, struct.pack("<Q", 50) + b"x" * 50)]))
    g("key-empty", "EmptyKey", "a key without a character", gguf([pair("", U32, 1)]))
    g("key-not-utf8", "NotUtf8", "bytes that are no text", gguf([pair(b"\xff", U8, 1)]))
    g("text-not-utf8", "NotUtf8", "llama.cpp takes them, but they would not be written as they were", gguf([pair("a", TEXT, text(b"\xff"))]))
    g("text-surrogate", "NotUtf8", "half of a character", gguf([pair("a", TEXT, text(b"\xed\xa0\x80"))]))
    g("text-in-array-not-utf8", "NotUtf8", "the same in an array", gguf([pair("a", ARRAY, array(TEXT, 2, text("b") + text(b"\xc3")))]))
    g("text-nul", "sound", "a zero byte is a character", gguf([pair("a", TEXT, text("b\0c"))]))
    one = pair("a", U8, 1)
    g("key-twice", "DuplicateKey", "the same twice", gguf([one, one]))
    g("key-twice-of-other-types", "DuplicateKey", "the last would win silently", gguf([one, pair("a", TEXT, text("b"))]))
    g("key-twice-apart", "DuplicateKey", "with others between them", gguf([one, pair("b", U8, 1), pair("aa", U8, 1), one]))
    g("key-alike", "sound", "other capitals are another key", gguf([one, pair("A", U8, 1), pair("a ", U8, 1)]))

    # What takes the most memory for each byte: opening may allocate four times the file.
    g("dense-keys", "sound", "the shortest keys with the shortest values", gguf([pair(chr(1 + i), BOOL, 1) for i in range(120)]))
    g("dense-texts", "sound", "texts without a character", gguf([pair("a", ARRAY, array(TEXT, 250, text("") * 250))]))
    g("dense-arrays", "sound", "arrays without an element", gguf([pair("a", ARRAY, array(ARRAY, 150, array(U8, 0) * 150))]))
    g("dense-tensors", "sound", "scalars of an unknown type, without bytes", gguf([], [info(chr(1 + i), (), 1000) for i in range(75)], b""))

    values = b"\0" * 60
    g("value-of-last-type", "sound", "type 12", gguf([pair("a", F64, b"\0" * 8)]))
    g("value-of-no-type", "UnknownValueType", "type 13", gguf([pair("a", 13, values)]))
    g("value-of-huge-type", "UnknownValueType", "type 2^32 - 1", gguf([pair("a", 2**32 - 1, values)]))
    for kind, size in [(U8, 1), (I8, 1), (U16, 2), (I16, 2), (U32, 4), (I32, 4), (F32, 4), (BOOL, 1), (TEXT, 8), (ARRAY, 12), (U64, 8), (I64, 8), (F64, 8)]:
        key = "a key so long that there would be room for another"
        g(f"value-cut-{kind}", "PastEnd", "a byte less than the value takes", gguf([pair(key, kind, b"\0" * (size - 1))]))
        g(f"array-full-{kind}", "sound", "as many elements as there is room for", gguf([pair("a", ARRAY, array(kind, 4, b"\0" * 4 * size))]))
        g(f"array-one-more-{kind}", "CountPastEnd", "one element more than there is room for",
          gguf([pair("a", ARRAY, array(kind, 4, b"\0" * (4 * size - 1)))]))
        g(f"array-huge-{kind}", "CountPastEnd", "2^64 - 1 elements", gguf([pair("a", ARRAY, array(kind, 2**64 - 1, values))]))
        if size > 1:
            g(f"array-wrapping-{kind}", "CountPastEnd", "elements whose bytes wrap to few", gguf([pair("a", ARRAY, array(kind, 2**64 // size + 1, values))]))
    g("array-of-no-type", "UnknownValueType", "elements of type 13", gguf([pair("a", ARRAY, array(13, 0, values))]))
    g("array-in-array-of-no-type", "UnknownValueType", "the same one deeper", gguf([pair("a", ARRAY, array(ARRAY, 1, array(13, 0)))]))
    g("array-in-array-huge", "CountPastEnd", "a short array of a long one", gguf([pair("a", ARRAY, array(ARRAY, 1, array(U8, 2**40)))]))

    def deep(depth):
        inner = array(U8, 1, b"x")
        for _ in range(depth - 1):
            inner = array(ARRAY, 1, inner)
        return gguf([pair("a", ARRAY, inner)])

    g("depth-2", "sound", "llama.cpp has none of these, gguf-py has", deep(2))
    g("depth-at-limit", "sound", "8 arrays in each other", deep(8))
    g("depth-over-limit", "TooDeep", "9 of them", deep(9))
    g("depth-20000", "TooDeep", "they must not overflow the stack", deep(20_000))
    g("bool-2", "NoTruthValue", "llama.cpp takes it as true, but it would not be written as it was", gguf([pair("a", BOOL, 2)]))
    g("bool-255", "NoTruthValue", "nor would this", gguf([pair("a", BOOL, 255)]))
    g("bool-in-array-2", "NoTruthValue", "nor in an array", gguf([pair("a", ARRAY, array(BOOL, 3, b"\0\1\2"))]))

    def aligned(kind, value, data=None, alignment=32):
        return gguf([pair("general.alignment", kind, value)], [] if data is None else [info()], data, alignment=alignment)

    g("alignment-0", "Alignment", "a division by zero elsewhere", aligned(U32, 0, four))
    g("alignment-33", "Alignment", "no power of two", aligned(U32, 33, four))
    g("alignment-odd-and-huge", "Alignment", "2^32 - 1", aligned(U32, 2**32 - 1, four))
    g("alignment-1", "sound", "no padding at all", aligned(U32, 1, four, 1))
    g("alignment-4096", "sound", "a page", aligned(U32, 4096, four, 4096))
    g("alignment-largest", "sound", "2^31, and nothing to be aligned to it", aligned(U32, 2**31))
    g("alignment-largest-of-a-tensor", "NoRoomForPadding", "2^31, in a short file", aligned(U32, 2**31, four))
    g("alignment-not-kept", "NoRoomForPadding", "a file aligned to 32 that says 4096", aligned(U32, 4096, four))
    for name, kind, value in [("u64", U64, 32), ("i32", I32, 32), ("u8", U8, 32), ("bool", BOOL, 1), ("text", TEXT, text("32")), ("array", ARRAY, array(U32, 1, b"\x20\0\0\0"))]:
        g(f"alignment-{name}", "WrongType", "an alignment is u32", aligned(kind, value, four))
    g("alignment-twice", "DuplicateKey", "which of them", gguf([pair("general.alignment", U32, 32), pair("general.alignment", U32, 64)], [info()], four))

    def t(name, expect, comment, *infos, data=four):
        g(f"tensor-{name}", expect, comment, gguf([], infos, data))

    long = info("a name so long that there would be room for another tensor" * 2)[:-1]
    whole = info("n" * 60)
    for cut in [4, 8 + 30, 8 + 60 + 2, 8 + 60 + 4 + 7, 8 + 60 + 4 + 8 + 3, 8 + 60 + 4 + 8 + 4 + 7]:
        kind = "CountPastEnd" if cut < 24 else "PastEnd"
        g(f"tensor-cut-at-{cut}", kind, "a cut download", gguf([], [whole[:cut]]))
    t("name-at-limit", "sound", "63 bytes", info("n" * 63))
    t("name-over-limit", "NameTooLong", "64, which leave llama.cpp no room for a zero byte", info("n" * 64))
    t("name-over-limit-in-bytes", "NameTooLong", "32 characters of 2 bytes", info("\u00e9" * 32))
    t("name-long", "NameTooLong", "and as many as there are", long, data=b"x" * 32)
    t("name-not-utf8", "NotUtf8", "bytes that are no text", info(b"\xff"))
    t("name-twice", "DuplicateTensor", "which of them", info("a"), info("a", offset=32), data=padded(four) + four)
    t("name-twice-apart", "DuplicateTensor", "with another between them", info("b"), info("a", offset=32), info("b", offset=64),
      data=padded(four) * 2 + four)
    t("dimensions-0", "sound", "a scalar", info(shape=()))
    t("dimensions-at-limit", "sound", "4", info(shape=(1, 1, 1, 1)))
    t("dimensions-over-limit", "TooManyDimensions", "5", info(shape=(1, 1, 1, 1, 1)))
    t("dimensions-huge", "TooManyDimensions", "2^32 - 1", info(dimensions=2**32 - 1))
    t("shape-wraps", "ShapeOverflow", "2^33 * 2^33 * 2 wraps to 0", info(shape=(2**33, 2**33, 2)))
    t("shape-wraps-to-the-right-size", "ShapeOverflow", "3 times its inverse modulo 2^64 wraps to 1", info(shape=(3, (2**65 + 1) // 3)))
    t("shape-overflow-hidden-by-zero", "ShapeOverflow", "a zero behind the overflow does not excuse it", info(shape=(2**63, 4, 0)), data=b"")
    t("shape-bytes-overflow", "ShapeOverflow", "the elements fit, their bytes do not", info(shape=(2**62,)))
    t("shape-largest", "TensorPastEnd", "the most that does not overflow", info(shape=(2**62 - 1,)))
    t("shape-negative", "ShapeOverflow", "-1 for those who read it signed", info(shape=(2**64 - 1,)))
    t("shape-zero", "sound", "no elements", info(shape=(0, 5)), data=b"")
    t("shape-zero-in-cut-file", "NoRoomForPadding", "no elements, but no place for them either", info(shape=(0, 5)), data=None)

    for kind, name, bytes_of_64 in [(0, "f32", 256), (1, "f16", 128), (2, "q4_0", 36), (8, "q8_0", 68), (20, "iq4_nl", 36), (24, "i8", 64),
                                    (28, "f64", 512), (30, "bf16", 128), (39, "mxfp4", 34), (40, "nvfp4", 36)]:
        t(f"{name}-full", "sound", "64 elements", info(shape=(64,), kind=kind), data=b"x" * bytes_of_64)
        t(f"{name}-short", "TensorPastEnd", "64 elements in a byte less", info(shape=(64,), kind=kind), data=b"x" * (bytes_of_64 - 1))
    t("torn-block", "TornBlock", "33 elements in blocks of 32", info(shape=(33,), kind=2), data=b"x" * 36)
    t("torn-row", "TornBlock", "rows of 16, in all 32", info(shape=(16, 2), kind=2), data=b"x" * 18)
    t("torn-scalar", "TornBlock", "a scalar is no block", info(shape=(), kind=8), data=b"x" * 34)
    t("torn-superblock", "TornBlock", "255 elements in blocks of 256", info(shape=(255,), kind=12), data=b"x" * 144)
    t("whole-superblock", "sound", "256 of them", info(shape=(256,), kind=12), data=b"x" * 144)
    t("type-unknown", "sound", "carried as the bytes that are there", info(shape=(7,), kind=1000), data=b"x" * 77)
    t("type-removed", "sound", "Q4_2 is known no more", info(shape=(32,), kind=4), data=b"x" * 18)
    t("type-unknown-before-another", "sound", "up to where the other begins", info(kind=1000), info("b", offset=96), data=b"x" * 100)
    t("type-unknown-shape-overflow", "ShapeOverflow", "a shape is one, whatever the type", info(shape=(2**40, 2**40), kind=1000))
    t("type-unknown-past-end", "TensorPastEnd", "nothing is there", info(kind=1000), info("b", kind=1000, offset=128), data=b"x" * 100)

    two = padded(four) + four
    t("two", "sound", "the control of those that follow", info(), info("b", offset=32), data=two)
    t("overlap", "Overlap", "both begin at 0", info(), info("b"))
    t("overlap-in-part", "Overlap", "the second begins within the first", info(shape=(16,)), info("b", offset=32), data=b"x" * 64)
    t("reversed", "Hole", "the second lies before the first", info(offset=32), info("b"), data=two)
    t("misaligned", "Misaligned", "right behind the first, without padding", info(), info("b", offset=4), data=four * 2)
    t("misaligned-first", "Misaligned", "the first, by a byte", info(offset=1), data=b"x" * 5)
    t("hole", "Hole", "room for another file inside", info(), info("b", offset=64), data=b"x" * 68)
    t("hole-at-start", "Hole", "nobody's bytes before the first", info(offset=32), data=two)
    t("offset-past-end", "Hole", "the first, behind the end of the file", info(offset=2**40))
    t("offset-huge", "Misaligned", "2^64 - 6, so that the end wraps for those who add 8", info(offset=2**64 - 6))
    t("offset-wraps", "TensorPastEnd", "the end wraps to 32", info(shape=(16,), offset=2**64 - 32), data=b"x" * 64)
    t("data-short", "TensorPastEnd", "the last byte is missing", info(), data=four[:3])
    t("data-missing", "TensorPastEnd", "all of it is missing", info(), data=b"")
    t("data-missing-with-padding", "NoRoomForPadding", "and the padding in front of it", info(), data=None)
    t("data-long", "TrailingBytes", "a byte behind the last padding", info(), data=padded(four) + b"x")
    t("data-file-behind", "TrailingBytes", "a file behind the file", info(), data=padded(four) + sound)
    t("data-without-tensors", "TrailingBytes", "bytes and no tensor to own them", data=b"x")


safetensors_cases()
perturbation_cases()
index_cases()
gguf_cases()
print(sum(1 for path in OUT.rglob("*") if path.is_file()), "files")
