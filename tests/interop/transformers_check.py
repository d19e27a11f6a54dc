#!/usr/bin/env python3
"""Asks transformers whether a checkpoint that this program wrote is one: it loads, completely, and speaks. Exit code 1 when not.

    python transformers_check.py OUT_DIR [--base IN_DIR] [--prompt TEXT] [--new-tokens 16]

Checked: every tensor the architecture wants is there and none is left over; no weight is NaN or infinite; greedy generation gives the same
tokens twice; and, with --base, the same tensor names, shapes and dtypes as in the checkpoint it was made from, at least one of them changed,
and the side files (everything but weights, manifest and signature) byte for byte the same.
Out: one JSON object with what was found.
"""
import argparse
import json
import pathlib
import sys

import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer, logging

OURS = {"panacea.manifest.json", "model.sig"}


def main():
    a = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    a.add_argument("out", type=pathlib.Path)
    a.add_argument("--base", type=pathlib.Path)
    a.add_argument("--prompt", default="Once upon a time")
    a.add_argument("--new-tokens", type=int, default=16)
    o = a.parse_args()
    logging.disable_progress_bar()
    faults, found = [], {}
    model, info = AutoModelForCausalLM.from_pretrained(o.out, dtype="auto", output_loading_info=True)
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"):
        if info.get(kind):
            faults.append(f"{kind}: {sorted(map(str, info[kind]))[:8]}")
    bad = [n for n, p in model.named_parameters() if not torch.isfinite(p).all()]
    if bad:
        faults.append(f"not finite: {bad[:8]}")
    found.update(architecture=type(model).__name__, parameters=sum(p.numel() for p in model.parameters()), dtype=str(model.dtype))
    tokenizer = AutoTokenizer.from_pretrained(o.out)
    ids = tokenizer(o.prompt, return_tensors="pt")["input_ids"]
    speak = lambda: model.eval().generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=o.new_tokens, do_sample=False,
                                          pad_token_id=tokenizer.pad_token_id or tokenizer.eos_token_id)[0, ids.shape[1]:].tolist()
    tokens = speak()
    if not tokens or tokens != speak():
        faults.append("generation is empty or not repeatable")
    found["says"] = tokenizer.decode(tokens)
    if o.base:
        faults += compare(o.base, o.out, found)
    print(json.dumps(found | dict(faults=faults)))
    sys.exit(1 if faults else 0)


def compare(base, out, found):
    faults, before, after = [], tensors_of(base), tensors_of(out)
    if list(before) != list(after):
        faults.append(f"tensor names differ: {sorted(set(before) ^ set(after))[:8]}")
    changed = 0
    for name in sorted(set(before) & set(after)):
        x, y = (open_tensor(*where) for where in (before[name], after[name]))
        if x.shape != y.shape or x.dtype != y.dtype:
            faults.append(f"`{name}`: {list(x.shape)} {x.dtype} became {list(y.shape)} {y.dtype}")
        else:
            changed += not torch.equal(x.contiguous().view(torch.uint8), y.contiguous().view(torch.uint8))
    found.update(tensors=len(after), tensors_changed=changed)
    if not changed:
        faults.append("no tensor changed")
    for file in sorted(p for p in base.iterdir() if p.is_file() and p.suffix not in (".safetensors", ".sig") and p.name not in OURS):
        if file.suffix in (".bin", ".pt"):
            continue  # left out on purpose: pickled weights would still be the unpatched ones
        if not (out / file.name).is_file() or (out / file.name).read_bytes() != file.read_bytes():
            faults.append(f"side file `{file.name}` is missing or changed")
    return faults


def tensors_of(folder):
    """Tensor name -> (file, name), in order of name."""
    where = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(str(file), "pt") as f:
            where.update({name: (file, name) for name in f.keys()})
    return dict(sorted(where.items()))


def open_tensor(file, name):
    with safe_open(str(file), "pt") as f:
        return f.get_tensor(name)


if __name__ == "__main__":
    main()
