#!/usr/bin/env python3
"""The paper's eps (T = 0) of a 7B-shaped checkpoint: wall time and peak memory of `panacea-patch optimize`.

    python large_model.py --binary panacea-patch --harmful H.jsonl [--rows 8] [--blocks 32] [--scratch DIR] [--keep] [--binary-flag=--memory=20G]

Makes the checkpoint on the spot: Llama 2 7B's sizes, BF16, matrices of small Gaussian numbers (one random stretch of 32 MiB, repeated), norms of
1, the byte-level tokenizer of testdata/tiny-chat: 13.5 GB in --scratch, which it removes again. Out: one JSON object. Memory is the
kernel's count of the child's resident pages, those of the mapped file included, at its highest. Standard library only.
"""
import argparse
import array
import json
import os
import pathlib
import random
import shutil
import struct
import sys
import tempfile
import time

HERE = pathlib.Path(__file__).resolve().parent
HIDDEN, INNER, HEADS, VOCABULARY = 4096, 11008, 32, 32000


def main():
    a = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    a.add_argument("--binary", required=True)
    a.add_argument("--harmful", required=True)
    a.add_argument("--rows", type=int, default=8)
    a.add_argument("--blocks", type=int, default=32)
    a.add_argument("--scratch", type=pathlib.Path, default=pathlib.Path(tempfile.gettempdir()))
    a.add_argument("--keep", action="store_true", help="leave the checkpoint, and take one that is there")
    a.add_argument("--binary-flag", action="append", default=[])
    o = a.parse_args()
    folder = o.scratch / f"llama-7b-shaped-{o.blocks}"
    if not (folder / "model.safetensors").exists():
        make(folder, o.blocks)
    try:
        print(json.dumps(run(o, folder)))
    finally:
        if not o.keep:
            shutil.rmtree(folder)


def run(o, folder):
    rows = folder / "rows.jsonl"
    rows.write_text("".join(pathlib.Path(o.harmful).read_text().splitlines(keepends=True)[:o.rows]))
    out = folder.with_name(f"{folder.name}.eps.safetensors")
    command = [o.binary, "optimize", str(folder), "--method", "panacea", "--steps", "0", "--rho", "1", "--harmful", str(rows), "--template", "alpaca",
               "--output", str(out), "--force", "--json", *o.binary_flag]
    began = time.perf_counter()
    child = os.posix_spawnp(command[0], command, dict(os.environ), file_actions=[(os.POSIX_SPAWN_OPEN, 1, str(folder / "report.json"),
                                                                               os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)])
    _, status, usage = os.wait4(child, 0)
    out.unlink(missing_ok=True)
    if code := os.waitstatus_to_exitcode(status):
        raise SystemExit(f"exit code {code}")
    report = json.loads((folder / "report.json").read_text())
    return dict(blocks=o.blocks, rows=o.rows, checkpoint_gib=(folder / "model.safetensors").stat().st_size / 2**30,
                seconds=time.perf_counter() - began, peak_gib=usage.ru_maxrss / (1 if sys.platform == "darwin" else 2**-10) / 2**30,
                results=report.get("results"))


def make(folder, blocks):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(dict(
        model_type="llama", architectures=["LlamaForCausalLM"], hidden_act="silu", hidden_size=HIDDEN, intermediate_size=INNER,
        num_hidden_layers=blocks, num_attention_heads=HEADS, num_key_value_heads=HEADS, vocab_size=VOCABULARY, rms_norm_eps=1e-5,
        max_position_embeddings=4096, tie_word_embeddings=False, torch_dtype="bfloat16")))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(HERE.parent / "testdata" / "tiny-chat" / name, folder)
    shapes = {"model.embed_tokens.weight": [VOCABULARY, HIDDEN]}
    for block in range(blocks):
        at = f"model.layers.{block}."
        shapes[at + "input_layernorm.weight"] = shapes[at + "post_attention_layernorm.weight"] = [HIDDEN]
        for name in "qkvo":
            shapes[f"{at}self_attn.{name}_proj.weight"] = [HIDDEN, HIDDEN]
        shapes[at + "mlp.gate_proj.weight"] = shapes[at + "mlp.up_proj.weight"] = [INNER, HIDDEN]
        shapes[at + "mlp.down_proj.weight"] = [HIDDEN, INNER]
    shapes |= {"model.norm.weight": [HIDDEN], "lm_head.weight": [VOCABULARY, HIDDEN]}
    header, end = {}, 0
    for name, shape in shapes.items():
        size = 2 * shape[0] * (shape[1] if len(shape) == 2 else 1)
        header[name] = dict(dtype="BF16", shape=shape, data_offsets=[end, end + size])
        end += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    noise = bfloat16(random.Random(7), 1 << 24)
    one = struct.pack("<H", 0x3F80)
    with open(folder / "model.safetensors", "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for name, shape in shapes.items():
            left = header[name]["data_offsets"][1] - header[name]["data_offsets"][0]
            if len(shape) == 1:
                file.write(one * shape[0])
                continue
            while left:
                file.write(noise[:min(left, len(noise))])
                left -= min(left, len(noise))


def bfloat16(generator, count):
    """`count` numbers of N(0, 0.02^2), the upper half of each f32's bits; a quarter of a million drawn and shuffled by blocks."""
    drawn = array.array("f", (generator.gauss(0.0, 0.02) for _ in range(1 << 18)))
    stretch = drawn.tobytes()
    narrow = b"".join(stretch[i + 2:i + 4] for i in range(0, len(stretch), 4))
    blocks = [narrow[i:i + 1024] for i in range(0, len(narrow), 1024)]
    out = bytearray()
    while len(out) < 2 * count:
        generator.shuffle(blocks)
        out += b"".join(blocks)
    return bytes(out[:2 * count])


if __name__ == "__main__":
    main()
