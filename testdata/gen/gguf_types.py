#!/usr/bin/env python3
"""Writes testdata/gguf-metadata/types.json: the element types that llama-quantize chooses for the tensors of several models.

    python gguf_types.py --quantize LLAMA_QUANTIZE [--out ../gguf-metadata]

In: the program llama-quantize, and the table CASES. Out: for each case

    "metadata"   {key: number} without the architecture's name, and "architecture"
    "tensors"    [[name, [rows, columns]], ..] outermost dimension first; `{}` stands for the number of a block
    "types"      {type of file: {tensor: "TYPE*times .."}}: of all blocks in order

Each case is written as a GGUF file of zeros, F16 and F32 as the converter has it, and shown to `llama-quantize --dry-run`.
"""
import argparse
import itertools
import json
import pathlib
import re
import subprocess
import tempfile

import gguf
import numpy

TESTDATA = pathlib.Path(__file__).resolve().parent.parent
FILES = "q4_0 q4_1 q5_0 q5_1 q2_k q3_k_s q3_k_m q3_k_l q4_k_s q4_k_m q5_k_s q5_k_m q6_k q8_0".split()


def case(architecture, blocks, heads, keys, width=256, inner=256, experts=0, tied=False, fused=False, norms=True, **more):
    attention = {"attn_qkv": (heads + 2 * keys, width)} if fused else {
        "attn_q": (32, width), "attn_k": (16, width), "attn_v": (16, width)}
    stack = (experts,) if experts else ()
    suffix = "_exps" if experts else ""
    layers = {**attention, "attn_output": (width, 32 if width < 64 else width), f"ffn_gate{suffix}": (*stack, inner, width),
              f"ffn_up{suffix}": (*stack, inner, width), f"ffn_down{suffix}": (*stack, width, inner)}
    if fused:
        del layers["ffn_gate"]
    tensors = [("token_embd.weight", (32, width))] + ([] if tied else [("output.weight", (32, width))])
    tensors += [(f"blk.{{}}.{name}.weight", shape) for name, shape in layers.items()]
    if experts:
        tensors.append(("blk.{}.ffn_gate_inp.weight", (experts, width)))
    if norms:
        tensors += [("output_norm.weight", (width,)), ("blk.{}.attn_norm.weight", (width,))]
    metadata = {"block_count": blocks, "context_length": 64, "embedding_length": width, "feed_forward_length": inner,
                "attention.head_count": heads, "attention.head_count_kv": keys, "vocab_size": 32, **more}
    if experts:
        metadata |= {"expert_count": experts, "expert_used_count": 2}
    return architecture, metadata, tensors


CASES = {
    "llama": case("llama", 32, 8, 2),
    "llama-mha-tied": case("llama", 22, 4, 4, tied=True),
    "llama-70b": case("llama", 80, 8, 1, norms=False),
    "llama-65b": case("llama", 80, 4, 4, norms=False),
    "qwen2-72b": case("qwen2", 80, 8, 1, norms=False),
    "mixtral": case("llama", 32, 8, 2, experts=8),
    "qwen3moe-4": case("qwen3moe", 12, 8, 2, experts=4),
    "qwen3moe-8": case("qwen3moe", 12, 8, 4, experts=8),
    "phi3": case("phi3", 32, 8, 8, fused=True),
    "gemma2": case("gemma2", 26, 8, 4, tied=True),
    "narrow-tied": case("llama", 30, 9, 3, width=96, inner=512, tied=True),
    "narrow": case("llama", 10, 4, 2, width=96, inner=96),
    "odd": case("llama", 4, 4, 2, width=48, inner=256),
    "few-blocks": case("llama", 3, 4, 2),
}


def main():
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("--quantize", type=pathlib.Path, required=True)
    arguments.add_argument("--out", type=pathlib.Path, default=TESTDATA / "gguf-metadata")
    options = arguments.parse_args()
    found = {}
    for name, (architecture, metadata, tensors) in CASES.items():
        with tempfile.TemporaryDirectory() as work:
            path = pathlib.Path(work) / "model.gguf"
            write(path, architecture, metadata, tensors)
            types = {file: chosen(options.quantize, path, file, tensors, metadata["block_count"]) for file in FILES}
        found[name] = {"architecture": architecture, "metadata": metadata, "tensors": tensors, "types": types}
    lines = (f"{json.dumps(name)}: {json.dumps(it)}" for name, it in found.items())
    (options.out / "types.json").write_text("{\n" + ",\n".join(lines) + "\n}\n")


def write(path, architecture, metadata, tensors):
    writer = gguf.GGUFWriter(path, architecture)
    for key, value in metadata.items():
        writer.add_uint32(f"{architecture}.{key}", value)
    writer.add_float32(f"{architecture}.attention.layer_norm_rms_epsilon", 1e-5)
    if architecture == "gemma2":
        writer.add_float32("gemma2.attn_logit_softcapping", 50.0)
    for name, shape in tensors:
        for block in range(metadata["block_count"] if "{}" in name else 1):
            kind = numpy.float32 if len(shape) < 2 or "gate_inp" in name else numpy.float16
            writer.add_tensor(name.format(block), numpy.zeros(shape, kind))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def chosen(program, path, file, tensors, blocks):
    done = subprocess.run([program, "--dry-run", path, file], capture_output=True, text=True)
    if done.returncode != 0:
        raise SystemExit(done.stdout + done.stderr)
    types = {}
    for line in (done.stdout + done.stderr).splitlines():
        # Of a tensor that falls back, warnings stand on the same line.
        if match := re.match(r"\[ *\d+/ *\d+\] (\S+) .*?type = +(\w+), .*?MiB(?: -> .*?MiB \((\w+)\))?", line):
            types[match[1]] = (match[3] or match[2]).upper()
    found = {}
    for name, _ in tensors:
        runs = itertools.groupby(types[name.format(block)] for block in range(blocks if "{}" in name else 1))
        found[name] = " ".join(f"{kind}*{len(list(run))}" for kind, run in runs)
    return found


if __name__ == "__main__":
    main()
