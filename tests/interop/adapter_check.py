#!/usr/bin/env python3
"""Asks PEFT whether an adapter that this program patched is one, and whether a merged model is what PEFT makes of it. Exit code 1 when not.

    python adapter_check.py ADAPTER_DIR --base BASE_DIR --patched OUT_DIR [--merged MERGED_DIR] [--perturbation FILE]

Checked of --patched: the same tensor names, shapes and dtypes as in the adapter it was made from, at least one of them changed; every side file
(all but weights, manifest and signature) byte for byte the same; PEFT loads it over the base, every tensor into its place and none left
over. With --perturbation, a dense file: each A and B is the old one plus the file's, rounded once.

Checked of --merged, which must come from the same perturbation: against `merge_and_unload` of the patched adapter over the base in the base's
own dtype, each element of BF16 and F16 is equal or the next value, or where the base and what is added almost cancel, off by at most 1e-6 of
the base's element, which is what f32 promises of the product; each tensor of F32 agrees to 1e-6 of its norm; what PEFT leaves alone is byte for byte
the base's; and transformers loads it completely.

An adapter stored in F32 loses nothing between patching and merging, so that both ways round once. One in BF16 or F16 is rounded when it is
patched, and merged as it was before that: there, ask for --patched alone.
Out: one JSON object with what was found.
"""
import argparse
import json
import pathlib
import sys

import torch
from peft import PeftModel, get_peft_model_state_dict
from safetensors import safe_open
from transformers import AutoModelForCausalLM, logging

OURS = {"panacea.manifest.json", "model.sig"}


def main():
    a = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    a.add_argument("adapter", type=pathlib.Path)
    a.add_argument("--base", type=pathlib.Path, required=True)
    a.add_argument("--patched", type=pathlib.Path, required=True)
    a.add_argument("--merged", type=pathlib.Path)
    a.add_argument("--perturbation", type=pathlib.Path)
    o = a.parse_args()
    logging.disable_progress_bar()
    found = {}
    faults = compare_files(o.adapter, o.patched, o.perturbation, found)
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(o.base, dtype="auto"), str(o.patched))
    faults += compare_loaded(model, o.patched)
    if o.merged:
        faults += compare_merged(model.merge_and_unload(), o.base, o.merged, found)
    print(json.dumps(found | dict(faults=faults)))
    sys.exit(1 if faults else 0)


def compare_files(adapter, patched, perturbation, found):
    """Names, shapes, dtypes and side files; and the sums, where the perturbation is at hand."""
    faults, changed, wrong = [], 0, 0
    before, after = tensors_of(adapter / "adapter_model.safetensors"), tensors_of(patched / "adapter_model.safetensors")
    deltas = tensors_of(perturbation) if perturbation else {}
    if list(before) != list(after):
        return [f"tensor names differ: {sorted(set(before) ^ set(after))[:8]}"]
    for name, old in before.items():
        new = after[name]
        if old.shape != new.shape or old.dtype != new.dtype:
            faults.append(f"`{name}` was {old.dtype} {list(old.shape)} and is {new.dtype} {list(new.shape)}")
            continue
        changed += not torch.equal(old, new)
        if perturbation:
            step = deltas.get(name, torch.zeros(old.shape))
            wrong += int((((old.float() + step).to(old.dtype)) != new).sum())
    if not changed:
        faults.append("no tensor changed")
    if wrong:
        faults.append(f"{wrong} elements are not the sum of old and perturbation")
    names = lambda folder: {p.name for p in folder.iterdir() if p.is_file() and p.suffix != ".safetensors" and p.name not in OURS}
    if names(adapter) != names(patched):
        faults.append(f"side files differ: {sorted(names(adapter) ^ names(patched))}")
    faults += [f"side file `{n}` changed" for n in sorted(names(adapter) & names(patched)) if (adapter / n).read_bytes() != (patched / n).read_bytes()]
    found.update(tensors=len(before), changed=changed)
    return faults


def compare_loaded(model, patched):
    """Whether PEFT put every stored tensor into its place."""
    stored, loaded = tensors_of(patched / "adapter_model.safetensors"), get_peft_model_state_dict(model)
    if set(stored) != set(loaded):
        return [f"PEFT has other tensors than the file: {sorted(set(stored) ^ set(loaded))[:8]}"]
    return [f"PEFT has other values in `{n}`" for n, t in stored.items() if not torch.equal(loaded[n].float(), t.float())]


def compare_merged(theirs, base, merged, found):
    ours, info = AutoModelForCausalLM.from_pretrained(merged, dtype="auto", output_loading_info=True)
    faults = [f"{kind}: {sorted(map(str, info[kind]))[:8]}" for kind in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs") if info.get(kind)]
    before = dict(AutoModelForCausalLM.from_pretrained(base, dtype="auto").named_parameters())
    theirs, elements, next_to, cancelled, worst, changed = dict(theirs.named_parameters()), 0, 0, 0, 0.0, 0
    for name, x in ours.named_parameters():
        y = theirs[name]
        if x.dtype != before[name].dtype or x.shape != before[name].shape:
            faults.append(f"`{name}` is {x.dtype} {list(x.shape)}, the base's {before[name].dtype} {list(before[name].shape)}")
        elif torch.equal(y, before[name]):
            if not torch.equal(x, before[name]):
                faults.append(f"`{name}` changed, and PEFT leaves it alone")
        elif x.dtype == torch.float32:
            changed += 1
            error = ((x - y).double().norm() / y.double().norm()).item()
            worst = max(worst, error)
            if not error <= 1e-6:
                faults.append(f"`{name}` is off by {error:.2g} of its norm")
        else:
            changed += 1
            distance = (ordered(x) - ordered(y)).abs()
            elements, next_to = elements + distance.numel(), next_to + int((distance == 1).sum())
            far = (distance > 1) & ((x.float() - y.float()).abs() > 1e-6 * before[name].float().abs())
            cancelled += int((distance > 1).sum()) - int(far.sum())
            if far.any():
                faults.append(f"`{name}`: {int(far.sum())} elements are further than the next value")
    if not changed:
        faults.append("merging changed nothing")
    found.update(merged=changed, elements=elements, next_value=next_to, cancelled=cancelled, worst_f32=worst)
    return faults


def ordered(tensor):
    """Halves as integers whose difference counts the values between them."""
    bits = tensor.detach().contiguous().view(torch.int16).int()
    return torch.where(bits < 0, -(bits & 0x7FFF), bits)


def tensors_of(path):
    with safe_open(path, "pt") as file:
        return {name: file.get_tensor(name) for name in sorted(file.keys())}


if __name__ == "__main__":
    main()
