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


safetensors_cases()
perturbation_cases()
index_cases()
print(sum(1 for path in OUT.rglob("*") if path.is_file()), "files")
