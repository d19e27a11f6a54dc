#!/usr/bin/env python3
"""Takes a tiny checkpoint of every model family through the program, and asks transformers what came out. Exit code 1 when not all is well.

    python families_check.py --program PANACEA_PATCH --logits LOGITS [--work DIR] [CASE ...]

In: the program; `examples/logits.rs`, compiled (`LOGITS DIR ROWS.json OUT.safetensors` writes our `logits` of a checkpoint's rows); and the
cases of testdata/gen/oracle.py, which are generated here with the vocabulary of testdata/tiny-chat, whose tokenizer they get. Out: one line
for each case and check.

Each case is patched in three ways, each output verified against its manifest:

    bare      `panacea-patch DIR`: default method, built-in sets, default targets
    paper     `--method panacea`, two outer steps on rows of testdata/tiny-chat-data, all projections as targets, stored as F32
    two-step  `optimize`, then `apply`, the same on the BF16 copy of the checkpoint

and held to this, for each of the outputs:

- transformers loads it: no key is missing, unexpected or of another shape
- tensors have the names, shapes, dtypes and order of the input's, and all but projections have their bytes; some projection changed in
  every block, and with all projections as targets every one of them did
- the config and the tokenizer have the input's bytes
- transformers' logits of it (F32, eager) and ours differ by 1e-4 of their norm at most, in the Euclidean norm; and the patch moved them by
  ten times that at least, so that logits of the input would not pass

Then every file of testdata/configs is loaded by transformers, and its model has as many parameters as the README there says.
"""
import argparse
import json
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, logging

TESTDATA = pathlib.Path(__file__).resolve().parent.parent.parent / "testdata"
sys.path.insert(0, str(TESTDATA / "gen"))
from oracle import CASES, PROJECTION, expert_margin, loss_and_gradients, model_and_rows, rows_as_text, write_checkpoint  # noqa: E402

TOLERANCE = 1e-4
LEAST_EFFECT = 10 * TOLERANCE
# Norm of the perturbations: large enough that F32 logits of the input and of the output cannot be confused.
RHO = "0.5"
# Whole module paths of all projections, under the names of all families.
ALL_PROJECTIONS = r".*(_proj|\.w[123])"
# A multimodal checkpoint's vision tower has projections, too, which the text never meets.
DECODER_BLOCK = re.compile(r"^(?:language_model\.|model\.language_model\.)?(?:model\.)?layers\.(\d+)\.")
SIDE_FILES = ["config.json", "tokenizer.json", "tokenizer_config.json"]


class Fault(Exception):
    """What is wrong with an output, in words."""


def main():
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("--program", type=pathlib.Path, required=True)
    arguments.add_argument("--logits", type=pathlib.Path, required=True)
    arguments.add_argument("--work", type=pathlib.Path, help="an empty or new directory that is kept; else one that is removed")
    arguments.add_argument("cases", nargs="*", metavar="CASE")
    options = arguments.parse_args()
    if unknown := set(options.cases) - set(CASES):
        arguments.error(f"no such case: {', '.join(sorted(unknown))}")
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    with tempfile.TemporaryDirectory() as temporary:
        work = options.work or pathlib.Path(temporary)
        judge = Judge(options.program.resolve(), options.logits.resolve(), work)
        for case in options.cases or CASES:
            judge.family(case)
        if not options.cases:
            judge.configs()
    print(f"{judge.passed} checks passed, {judge.failed} failed")
    sys.exit(1 if judge.failed or not judge.passed else 0)


class Judge:
    def __init__(self, program, logits, work):
        self.program, self.logits, self.work = program, logits, work
        self.passed = self.failed = 0
        work.mkdir(parents=True, exist_ok=True)
        for name in ["harmful", "task"]:
            rows = (TESTDATA / "tiny-chat-data" / f"{name}.jsonl").read_text().splitlines(keepends=True)
            (work / f"{name}.jsonl").write_text("".join(rows[:12]))

    def check(self, case, what, look):
        """One line: what `look` has to say, or the fault that it found."""
        try:
            said, word = look(), "ok"
            self.passed += 1
        except Fault as fault:
            said, word = fault, "FAILED"
            self.failed += 1
        print(f"{case:24} {what:9} {word:6} {said}", flush=True)

    def family(self, case):
        folder = self.work / case
        vocabulary = json.loads((TESTDATA / "tiny-chat" / "config.json").read_text())["vocab_size"]
        model, self.rows = model_and_rows(case, vocabulary)
        (self.work / "rows.json").write_text(rows_as_text(self.rows))
        for kind in ["f32", "bf16"]:
            write_checkpoint(folder / kind, case, model)
            (folder / kind / "config.old.json").unlink()
            for name in ["tokenizer.json", "tokenizer_config.json"]:
                shutil.copy(TESTDATA / "tiny-chat" / name, folder / kind / name)
        weights = load_file(folder / "bf16" / "model.safetensors")
        save_file({n: w.bfloat16() for n, w in weights.items()}, folder / "bf16" / "model.safetensors", {"format": "pt"})

        paper = ["--method", "panacea", "--steps", "2", "--batch", "4", "--rho", RHO, "--targets", ALL_PROJECTIONS,
                 "--harmful", self.work / "harmful.jsonl", "--task", self.work / "task.jsonl"]
        f32, bf16, delta = folder / "f32", folder / "bf16", folder / "delta.safetensors"
        bare, whole, two_step = folder / "bare", folder / "paper", folder / "two-step"
        self.check(case, "bare", lambda: self.patch_and_compare(f32, bare, [[f32, "-o", bare]], all_projections=False))
        self.check(case, "paper", lambda: self.patch_and_compare(f32, whole, [[f32, *paper, "-o", whole]], all_projections=True))
        self.check(case, "two-step", lambda: self.patch_and_compare(bf16, two_step, [
            ["optimize", bf16, *paper, "-o", delta], ["apply", bf16, "--perturbation", delta, "-o", two_step]], all_projections=True))

    def patch_and_compare(self, base, out, commands, all_projections):
        for command in commands:
            self.run(*command)
        self.run("verify", out)
        changed, of = compare_files(base, out, all_projections)
        model = load(out)
        theirs = loss_and_gradients(model, self.rows)[1]
        ours = self.our_logits(out)
        if ours.shape != theirs.shape:
            raise Fault(f"our logits have the shape {list(ours.shape)}, transformers' {list(theirs.shape)}")
        moved = distance(loss_and_gradients(load(base), self.rows)[1], theirs)
        if not moved > LEAST_EFFECT:
            raise Fault(f"the patch moves the logits by {moved:.1e} only")
        off, margin = distance(ours, theirs), expert_margin(model, self.rows)
        near_tie = f", where an expert is chosen by {margin:.1e}" if margin < float("inf") else ""
        if not off <= TOLERANCE:
            raise Fault(f"our logits are off by {off:.1e}, allowed are {TOLERANCE:.0e}{near_tie}")
        return f"{changed} of {of} tensors changed, logits moved by {moved:.1e} and ours off by {off:.1e}{near_tie}"

    def our_logits(self, folder):
        out = self.work / "logits.safetensors"
        self.run(folder, self.work / "rows.json", out, program=self.logits)
        return load_file(out)["logits"]

    def run(self, *arguments, program=None):
        done = subprocess.run([str(program or self.program), *map(str, arguments)], capture_output=True, text=True)
        if done.returncode != 0:
            words = " / ".join(line.strip() for line in done.stderr.splitlines() if re.match(r"\s*(error|because|hint|Error|thread)", line))
            raise Fault(f"`{(program or self.program).name} {arguments[0]}` exits {done.returncode}: {words or done.stderr[-300:]}")

    def configs(self):
        table = (TESTDATA / "configs" / "README.md").read_text()
        files = sorted((TESTDATA / "configs").glob("*.json"))
        for file in files:
            self.check(file.stem, "config", lambda: count_parameters(file, table))


def compare_files(base, out, all_projections):
    """Holds `out` to what a patch may change of `base`; gives how many tensors changed, and how many there are."""
    for name in SIDE_FILES:
        if not (out / name).is_file() or (out / name).read_bytes() != (base / name).read_bytes():
            raise Fault(f"`{name}` is missing or changed")
    before, after = (header_and_tensors(folder / "model.safetensors") for folder in (base, out))
    if before[0] != after[0]:
        raise Fault("tensors have other names, dtypes, shapes or places than in the input")
    projections = {n: int(DECODER_BLOCK.match(n)[1]) for n in before[1] if PROJECTION.search(n) and DECODER_BLOCK.match(n)}
    changed = {n for n, t in before[1].items() if not torch.equal(t.view(torch.uint8), after[1][n].view(torch.uint8))}
    if stray := sorted(changed - set(projections)):
        raise Fault(f"changed without being a projection of the decoder: {stray[:4]}")
    if not_finite := sorted(n for n in changed if not torch.isfinite(after[1][n]).all()):
        raise Fault(f"not finite: {not_finite[:4]}")
    if all_projections and (same := sorted(set(projections) - changed)):
        raise Fault(f"unchanged though targets: {same[:4]}")
    if same := set(projections.values()) - {projections[n] for n in changed}:
        raise Fault(f"no projection changed in blocks {sorted(same)}")
    return len(changed), len(before[1])


def header_and_tensors(file):
    """The file's own header, as text without the metadata but in its order, and its tensors by name."""
    data = file.read_bytes()
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    header.pop("__metadata__", None)
    with safe_open(str(file), "pt") as f:
        return json.dumps(header), {name: f.get_tensor(name).contiguous() for name in header}


def load(folder):
    """The folder as transformers reads it, in F32, all keys accounted for."""
    config = AutoConfig.from_pretrained(folder)
    config._experts_implementation = "eager"
    model, info = AutoModelForCausalLM.from_pretrained(
        folder, config=config, attn_implementation="eager", dtype=torch.float32, output_loading_info=True)
    for kind in ["missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"]:
        if info.get(kind):
            raise Fault(f"{kind}: {sorted(map(str, info[kind]))[:4]}")
    return model.eval()


def distance(found, wanted):
    return ((found.double() - wanted.double()).norm() / wanted.double().norm()).item()


def count_parameters(file, table):
    row = next((line for line in table.splitlines() if line.startswith(f"| `{file.stem}` ")), None)
    if row is None:
        raise Fault("the README beside it has no line for it")
    with torch.device("meta"):
        found = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(file)).num_parameters()
    wanted = int(row.split("|")[-2].replace(",", ""))
    if found != wanted:
        raise Fault(f"a model of {found:,} parameters, where {wanted:,} are stated")
    return f"{found:,} parameters"


if __name__ == "__main__":
    main()
