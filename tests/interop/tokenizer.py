#!/usr/bin/env python3
"""llama.cpp's opinion of tokenizers that the program reads from GGUF files and writes into them.

    python tests/interop/tokenizer.py EXAMPLE LLAMA_CPP [FILE.gguf | DIR ...]

EXAMPLE is `target/release/examples/tokenizer`, LLAMA_CPP a checkout of llama.cpp; both tell what it takes beside this page: gguf, xllamacpp,
sentencepiece, transformers. Without files or directories, the vocabularies in LLAMA_CPP/models are judged. Of a GGUF: does each of some 800 texts get the ids that
llama.cpp gives it? Of a directory: are keys, types, values and order those of convert_hf_to_gguf.py? Writes nothing outside of $TMPDIR, and takes a second or two
for each.
"""
import json
import pathlib
import random
import subprocess
import sys
import tempfile

sys.dont_write_bytecode = True
ROOT = pathlib.Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT / "testdata" / "gen"))

from gguf_tokenizers import TEXTS  # noqa: E402
from llama_cpp import tokenize  # noqa: E402

# Kinds of tokenizers that the program does not read (WordPiece, Unigram) and ways to cut text that it does not know.
OTHERS = ("bert-bge", "deepseek-coder", "deepseek-llm", "gemma-4", "gpt-neox", "nomic-bert-moe", "qwen35")

ARCHITECTURES = {
    "LlamaForCausalLM": "llama", "MistralForCausalLM": "llama", "MixtralForCausalLM": "llama", "Qwen2ForCausalLM": "qwen2", "Qwen3ForCausalLM": "qwen3",
    "Qwen3MoeForCausalLM": "qwen3moe", "GemmaForCausalLM": "gemma", "Gemma2ForCausalLM": "gemma2", "Gemma3ForCausalLM": "gemma3", "Phi3ForCausalLM": "phi3",
    "Olmo2ForCausalLM": "olmo2", "GraniteForCausalLM": "granite",
}

SCRIPTS = [(0x20, 0x7E)] * 6 + [
    (0xA0, 0x24F), (0x300, 0x36F), (0x370, 0x58F), (0x590, 0x77F), (0x900, 0xDFF), (0xE00, 0x17FF), (0x2000, 0x2BFF), (0x3040, 0x9FFF), (0xAC00, 0xD7A3),
    (0x1F300, 0x1FAFF), (0x10000, 0x103FF),
]


def texts():
    """The written ones, runs of one character, characters at random, and parts of the written ones at random; the same in every run."""
    dice = random.Random(7)
    every = list(TEXTS)
    for character in " \n\t=-.aA0#*ha!é中▁":
        every += [f"x{character * n}y" for n in (1, 2, 3, 4, 5, 6, 7, 8, 9, 15, 16, 17, 31, 32, 33, 64, 100)]
    for _ in range(250):
        every.append("".join(chr(dice.randint(*dice.choice(SCRIPTS))) for _ in range(dice.randint(1, 80))))
    for _ in range(250):
        parts = [dice.choice(TEXTS[1:]) for _ in range(dice.randint(1, 5))]
        starts = [dice.randrange(len(part)) for part in parts]
        every.append(dice.choice(["", " ", "\n", "  "]).join(part[start : start + dice.randint(1, 40)] for part, start in zip(parts, starts)))
    return every


def judge_ids(example, gguf, every):
    lines = "".join(json.dumps(text) + "\n" for text in every)
    ran = subprocess.run([example, "ids", str(gguf)], input=lines, capture_output=True, text=True)
    if ran.returncode:
        return [ran.stderr.strip()], 0
    ours = [json.loads(line) for line in ran.stdout.splitlines()]
    theirs = tokenize(gguf, every)
    found = [f"{text!r}: {ours}, llama.cpp {theirs}" for text, ours, theirs in zip(every, ours, theirs, strict=True) if ours != theirs]
    return found, sum(map(len, theirs))


def judge_metadata(example, llama_cpp, directory):
    from gguf import GGUFReader

    architecture = ARCHITECTURES[json.loads((directory / "config.json").read_text())["architectures"][0]]
    ran = subprocess.run([example, "metadata", str(directory), architecture], capture_output=True, text=True)
    if ran.returncode:
        return [ran.stderr.strip()], 0
    ours = {key: (kind, value) for key, kind, value in json.loads(ran.stdout)}
    with tempfile.TemporaryDirectory() as work:
        gguf = pathlib.Path(work) / "converted.gguf"
        command = [sys.executable, str(llama_cpp / "convert_hf_to_gguf.py"), str(directory), "--vocab-only", "--outfile", str(gguf)]
        converted = subprocess.run(command, capture_output=True, text=True)
        if converted.returncode:
            return [f"the converter refuses it: {converted.stderr.strip().splitlines()[-1:]}"], 0
        theirs = {}
        for key, field in GGUFReader(gguf).fields.items():
            if key.startswith("tokenizer."):
                types = [kind.name for kind in field.types]
                theirs[key] = (types[1:] if len(types) > 1 else types[0], field.contents())
    found = [] if list(ours) == list(theirs) else [f"keys {list(ours)}, the converter {list(theirs)}"]
    for key in ours.keys() & theirs.keys():
        if ours[key] != theirs[key]:
            found.append(f"{key}: {str(ours[key])[:200]}, the converter {str(theirs[key])[:200]}")
    return found, len(theirs)


def main():
    if len(sys.argv) < 3:
        raise SystemExit(__doc__)
    example, llama_cpp = sys.argv[1], pathlib.Path(sys.argv[2])
    models = sorted((llama_cpp / "models").glob("ggml-vocab-*.gguf"))
    paths = [pathlib.Path(path) for path in sys.argv[3:]]
    paths = paths or [path for path in models if path.stem.removeprefix("ggml-vocab-") not in OTHERS]
    every, wrong = texts(), 0
    for path in paths:
        if path.is_dir():
            found, count = judge_metadata(example, llama_cpp, path)
            what = f"{count} keys"
        else:
            found, count = judge_ids(example, path, every)
            what = f"{len(every)} texts, {count} tokens"
        wrong += bool(found)
        print(f"{path.name}: {what}, {len(found)} differences", flush=True)
        for one in found[:3]:
            print(f"  {one[:400]}")
    if not paths or wrong:
        raise SystemExit(f"{wrong} of {len(paths)} differ")


if __name__ == "__main__":
    main()
