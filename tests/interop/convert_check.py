#!/usr/bin/env python3
"""Holds GGUF files of the program against those of llama.cpp's converter and of llama-quantize. Exit code 1 when any differs.

    python convert_check.py --program PANACEA_PATCH --llama-cpp TREE [--quantize LLAMA_QUANTIZE] [--work DIR] [MODEL ...]

In: the program, llama.cpp's source tree, whose `conversion/` and `gguf-py/` are imported, and directories of models. Besides these, a
tiny checkpoint of every family is made as in testdata/gen/oracle.py, in F32 and in BF16, with the tokenizer of testdata/tiny-chat. Out: one
line for each comparison.

- `f32`, `f16`, `bf16`, `q8_0`: the converter's file of the same directory. Same keys with the same types and values, in the same order;
  same tensors with the same types, shapes and bytes. The order of tensors may differ.
- the other types: what llama-quantize makes of the converter's `f32` file. Same types, shapes and bytes of tensors; of keys, those that
  differ from the converter's.
- back: the directory that the program makes of its own `f32` file has the tensors of the source, bit for bit, where the source is F32 or
  BF16, and transformers loads it.

The tiny checkpoints' tokenizer has no name in llama.cpp. The converter is to leave it alone, the program is told one, and its keys are not
compared; those of a MODEL are.
"""
import argparse
import contextlib
import io
import json
import logging
import pathlib
import shutil
import subprocess
import sys
import tempfile

TESTDATA = pathlib.Path(__file__).resolve().parent.parent.parent / "testdata"
CONVERTED = ["f32", "f16", "bf16", "q8_0"]
QUANTIZED = ["q4_0", "q4_1", "q5_0", "q5_1", "q2_k", "q3_k_s", "q3_k_m", "q3_k_l", "q4_k_s", "q4_k_m", "q5_k_s", "q5_k_m", "q6_k"]
# What llama.cpp has no place for, and both programs refuse or would drop.
REFUSED = {"qwen3-moe": "layers without experts", "qwen3-moe-plain": "layers without experts"}


class Fault(Exception):
    """What is wrong, in words."""


def main():
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("--program", type=pathlib.Path, required=True)
    arguments.add_argument("--llama-cpp", type=pathlib.Path, required=True)
    arguments.add_argument("--quantize", default="-")
    arguments.add_argument("--work", type=pathlib.Path, help="an empty or new directory that is kept; else one that is removed")
    arguments.add_argument("--cases", default=None, help="names of tiny checkpoints, separated by commas; all of them if not given")
    arguments.add_argument("--types", default=None, help="types to be compared, separated by commas; all of them if not given")
    arguments.add_argument("models", nargs="*", type=pathlib.Path, metavar="MODEL")
    options = arguments.parse_args()
    sys.path[:0] = [str(options.llama_cpp), str(options.llama_cpp / "gguf-py"), str(TESTDATA / "gen")]
    logging.disable(logging.WARNING)
    from transformers import logging as of_transformers
    of_transformers.disable_progress_bar()
    with tempfile.TemporaryDirectory() as temporary:
        work = options.work or pathlib.Path(temporary)
        work.mkdir(parents=True, exist_ok=True)
        judge = Judge(options, work)
        for model in options.models:
            judge.model(model.name, model, tiny=False)
        for case in cases(options.cases):
            for kind in ["f32", "bf16"]:
                judge.model(f"{case} {kind}", make(case, kind, work), tiny=True)
    print(f"{judge.passed} comparisons without a difference, {judge.failed} with one; "
          f"{judge.tensors} tensors of {judge.bytes:,} bytes, {judge.keys} keys; {judge.wrong_bytes:,} bytes differ")
    sys.exit(1 if judge.failed or not judge.passed else 0)


# Of the widths that quantized types want, with as many blocks as it takes to see which of them get finer types.
WIDE = dict(hidden_size=256, intermediate_size=512, num_attention_heads=8, num_key_value_heads=2, num_hidden_layers=9, head_dim=32)
EXTRA = {
    "llama-wide": ("llama-tied", WIDE | dict(tie_word_embeddings=False)),
    "mixtral-wide": ("mixtral", WIDE | dict(num_local_experts=8, num_hidden_layers=4)),
    "qwen3-moe-wide": ("qwen3-moe", WIDE | dict(num_hidden_layers=3, decoder_sparse_step=1, moe_intermediate_size=256, num_experts=4)),
    "qwen2-narrow": ("qwen2-yarn", dict(hidden_size=96, intermediate_size=160, num_attention_heads=2, num_hidden_layers=3)),
    "phi3-wide": ("phi3-longrope-mixed", WIDE | dict(num_key_value_heads=8, rope_parameters=dict(
        rope_type="longrope", rope_theta=500.0, partial_rotary_factor=1.0, original_max_position_embeddings=13,
        short_factor=[1.0 + i / 16 for i in range(16)], long_factor=[2.0 + i / 4 for i in range(16)]))),
    "gemma2-wide": ("gemma2", WIDE | dict(query_pre_attn_scalar=32)),
    "granite-wide": ("granite", {key: value for key, value in WIDE.items() if key != "head_dim"}),
}


def cases(names):
    import oracle
    from oracle import CASES
    # No logits are compared, so that no choice of experts has to be clear.
    oracle.LEAST_MARGIN = -1.0
    for name, (like, changes) in EXTRA.items():
        CASES[name] = CASES[like] | changes
        oracle.OLDER[name] = oracle.OLDER.get(like, {})
    return [name for name in CASES if names is None or name in names.split(",")]


def make(case, kind, work):
    """A tiny checkpoint of a family, with a tokenizer."""
    from oracle import model_and_rows, write_checkpoint
    from safetensors.torch import load_file, save_file
    folder = work / case / kind
    vocabulary = json.loads((TESTDATA / "tiny-chat" / "config.json").read_text())["vocab_size"]
    write_checkpoint(folder, case, model_and_rows(case, vocabulary)[0])
    (folder / "config.old.json").unlink()
    for name in ["tokenizer.json", "tokenizer_config.json"]:
        shutil.copy(TESTDATA / "tiny-chat" / name, folder / name)
    if kind == "bf16":
        weights = load_file(folder / "model.safetensors")
        save_file({n: w.bfloat16() for n, w in weights.items()}, folder / "model.safetensors", {"format": "pt"})
    return folder


class Judge:
    def __init__(self, options, work):
        self.program, self.work = options.program.resolve(), work
        self.quantize = None if options.quantize == "-" else options.quantize
        self.types = options.types.split(",") if options.types else CONVERTED + QUANTIZED
        self.passed = self.failed = self.tensors = self.bytes = self.keys = self.wrong_bytes = 0

    def check(self, name, what, look):
        try:
            said, word = look(), "ok"
            self.passed += 1
        except Fault as fault:
            said, word = fault, "DIFFERS"
            self.failed += 1
        print(f"{name:28} {what:8} {word:8} {said}", flush=True)

    def model(self, name, folder, tiny):
        theirs, ours = self.work / "theirs.gguf", self.work / "ours.gguf"
        base = self.work / "base.gguf"
        if tiny and name.split()[0] in REFUSED:
            self.check(name, "", lambda: self.both_refuse(folder, base))
            return
        for kind in [kind for kind in CONVERTED if kind in self.types]:
            self.check(name, kind, lambda: self.converted(folder, kind, ours, theirs, tiny))
            if kind == "f32":
                self.check(name, "back", lambda: self.back(folder, ours, tiny))
        if self.quantize and any(kind in QUANTIZED for kind in self.types):
            convert(folder, "f32", base, tiny)
            for kind in [kind for kind in QUANTIZED if kind in self.types]:
                self.check(name, kind, lambda: self.quantized(folder, kind, ours, theirs, base, tiny))
        for path in [theirs, ours, base]:
            path.unlink(missing_ok=True)

    def converted(self, folder, kind, ours, theirs, tiny):
        convert(folder, kind, theirs, tiny)
        self.ours(folder, kind, ours, tiny)
        return self.compare(ours, theirs, tiny)

    def quantized(self, folder, kind, ours, theirs, base, tiny):
        done = subprocess.run([self.quantize, base, theirs, kind], capture_output=True, text=True)
        if done.returncode != 0:
            raise Fault(f"llama-quantize exits {done.returncode}: {done.stderr[-200:]}")
        self.ours(folder, kind, ours, tiny)
        return self.compare(ours, theirs, tiny)

    def ours(self, folder, kind, out, tiny):
        # `default` is what a tokenizer without a known way of cutting text is told to have.
        pre = ["--pre", "default"] if tiny else []
        self.run("convert", folder, "--type", kind, "-o", out, "--force", *pre)

    def run(self, *arguments):
        done = subprocess.run([str(self.program), *map(str, arguments)], capture_output=True, text=True)
        if done.returncode != 0:
            raise Fault(f"`{' '.join(map(str, arguments))}` exits {done.returncode}: {' / '.join(done.stderr.splitlines()[-3:])}")

    def both_refuse(self, folder, out):
        try:
            convert(folder, "f32", out, True)
        except Exception as error:
            reason = str(error)
        else:
            raise Fault("the converter converts it")
        done = subprocess.run([self.program, "convert", folder, "-o", out, "--pre", "default"], capture_output=True, text=True)
        if done.returncode != 3:
            raise Fault(f"the program exits {done.returncode}")
        return f"both refuse it: {reason}"

    def compare(self, ours, theirs, tiny):
        from gguf import GGUFReader
        ours, theirs = GGUFReader(ours), GGUFReader(theirs)
        mine, other = keys(ours, tiny), keys(theirs, tiny)
        wrong = [key for key in {**mine, **other} if mine.get(key) != other.get(key)]
        if wrong:
            shown = "; ".join(f"{key}: {short(mine.get(key))} here, {short(other.get(key))} there" for key in wrong[:5])
            raise Fault(f"{len(wrong)} of {len(other)} keys differ: {shown}")
        if list(mine) != list(other):
            first = next(i for i, (a, b) in enumerate(zip(mine, other)) if a != b)
            raise Fault(f"key {first} is {list(mine)[first]} here, {list(other)[first]} there")
        mine, other = ({t.name: t for t in reader.tensors} for reader in (ours, theirs))
        if set(mine) != set(other):
            raise Fault(f"tensors differ: {sorted(set(mine) ^ set(other))[:6]}")
        wrong, wrong_bytes = [], 0
        for name, tensor in other.items():
            here = mine[name]
            if here.tensor_type != tensor.tensor_type or list(here.shape) != list(tensor.shape):
                wrong.append(f"{name} is {here.tensor_type.name} {list(here.shape)} here, {tensor.tensor_type.name} {list(tensor.shape)} there")
                continue
            a, b = (t.data.reshape(-1).view("uint8") for t in (here, tensor))
            if count := int((a != b).sum()):
                wrong.append(f"{count} of {len(b)} bytes of {name}, {tensor.tensor_type.name}")
                wrong_bytes += count
            self.bytes += len(b)
        self.tensors += len(other)
        self.keys += len(keys(theirs, tiny))
        self.wrong_bytes += wrong_bytes
        if wrong:
            raise Fault(f"{len(wrong)} of {len(other)} tensors: {'; '.join(wrong[:4])}")
        return f"{len(keys(theirs, tiny))} keys and {len(other)} tensors are the same"

    def back(self, folder, ours, tiny):
        """The directory that the program makes of its own file."""
        import torch
        from safetensors.torch import load_file
        from transformers import AutoModelForCausalLM
        out = self.work / "back"
        source = {}
        for file in folder.glob("*.safetensors"):
            source.update(load_file(file))
        source = decoder(source)
        kind = {torch.float32: "f32", torch.bfloat16: "bf16"}.get(next(iter(source.values())).dtype, "f16")
        self.run("convert", ours, "--type", kind, "-o", out, "--force")
        found = load_file(out / "model.safetensors")
        if set(found) != set(source):
            raise Fault(f"tensors differ: {sorted(set(found) ^ set(source))[:6]}")
        # An offset that was added and taken away again may cost the last bit.
        offset = "gemma" in json.loads((folder / "config.json").read_text())["model_type"]
        wrong = [name for name, tensor in source.items() if not (
            torch.allclose(found[name].float(), tensor.float(), rtol=0, atol=1.2e-7) if offset and name.endswith("norm.weight")
            else torch.equal(found[name], tensor))]
        if wrong:
            raise Fault(f"{len(wrong)} of {len(source)} tensors differ: {wrong[:4]}")
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            _, info = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
        for what in ["missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"]:
            if info.get(what):
                raise Fault(f"transformers: {what}: {sorted(map(str, info[what]))[:4]}")
        return f"{len(source)} tensors as they were, and transformers loads them"


def decoder(tensors):
    """Those of the decoder of text, as a model with one tower calls them."""
    if not any("language_model" in name for name in tensors):
        return tensors
    return {name.replace("language_model.", ""): t for name, t in tensors.items() if "language_model" in name}


def convert(folder, kind, out, tiny):
    """The converter's file."""
    import torch
    from conversion import ModelBase, ModelType, get_model_architecture, get_model_class
    from gguf import LlamaFileType
    types = {"f32": LlamaFileType.ALL_F32, "f16": LlamaFileType.MOSTLY_F16, "bf16": LlamaFileType.MOSTLY_BF16, "q8_0": LlamaFileType.MOSTLY_Q8_0}
    out.unlink(missing_ok=True)
    with torch.inference_mode(), contextlib.redirect_stderr(io.StringIO()):
        hparams = ModelBase.load_hparams(folder, False)
        kind_of_model = get_model_class(get_model_architecture(hparams, ModelType.TEXT))
        model = kind_of_model(folder, types[kind], out)
        if tiny:
            model.set_vocab = lambda: None
        model.write()


def keys(reader, tiny):
    """Keys with types and values, in order."""
    found = {}
    for field in reader.fields.values():
        if field.name.startswith("GGUF.") or tiny and field.name.startswith("tokenizer."):
            continue
        found[field.name] = ([kind.name for kind in field.types], field.contents())
    # The directory's name is no property of the file's content.
    return found


def short(value):
    return str(value)[:60]


if __name__ == "__main__":
    main()
