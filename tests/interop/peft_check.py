#!/usr/bin/env python3
"""Asks PEFT whether `optimize --peft` writes what `apply` adds: the base under the adapter is the patched checkpoint. Exit code 1 when not.

    python peft_check.py PROGRAM CHECKPOINT

CHECKPOINT (testdata/tiny-chat will do) is widened to F32, so that nothing is lost to rounding. For noise of several ranks and targets,
checked: PEFT loads the adapter without a word; the modules that it adapts are exactly the perturbed ones; merged, every weight is that of
the patched checkpoint to the last bits of F32; the logits of base and adapter are the patched checkpoint's, and not the base's.
Out: one JSON object with what was found. Packages: requirements.txt.
"""
import argparse
import json
import pathlib
import shutil
import subprocess
import sys
import tempfile
import warnings

import torch
from peft import PeftModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, logging

CASES = {
    "default": ["--as-lora", "4"],
    "some blocks": ["--as-lora", "2", "--targets", r"model\.layers\.1\.(self_attn\.(q|v)_proj|mlp\.down_proj)"],
    # More than the keys and values of grouped heads can use, so that ranks differ.
    "full rank": ["--as-lora", "100000", "--targets", "q_proj,k_proj,o_proj"],
}


def main():
    a = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    a.add_argument("program", type=pathlib.Path)
    a.add_argument("checkpoint", type=pathlib.Path)
    o = a.parse_args()
    logging.disable_progress_bar()
    faults, found = [], {}
    with tempfile.TemporaryDirectory() as folder:
        folder = pathlib.Path(folder)
        base = folder / "base"
        shutil.copytree(o.checkpoint, base)
        widened = {name: tensor.float() for name, tensor in load_file(base / "model.safetensors").items()}
        save_file(widened, base / "model.safetensors", metadata={"format": "pt"})
        config = json.loads((base / "config.json").read_text())
        (base / "config.json").write_text(json.dumps(config | {"dtype": "float32", "torch_dtype": "float32"}))
        for number, (name, flags) in enumerate(CASES.items()):
            wrong, found[name] = check(o.program.resolve(), base, folder / str(number), flags)
            faults += [f"{name}: {fault}" for fault in wrong]
    print(json.dumps(found | dict(faults=faults)))
    sys.exit(1 if faults else 0)


def check(program, base, folder, flags):
    folder.mkdir()
    perturbation, adapter, patched = folder / "p.safetensors", folder / "adapter", folder / "patched"
    noise = ["--method", "random", "--rho", "5"]
    run(program, "optimize", base, *noise, *flags, "-o", perturbation, "--peft", adapter)
    run(program, "apply", base, "--perturbation", perturbation, "-o", patched)

    faults = []
    ids = torch.arange(2, 42).reshape(2, 20)
    wanted, before = logits(load(patched), ids), logits(load(base), ids)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        model = PeftModel.from_pretrained(load(base), str(adapter))
    # What libraries say of their own future is no matter of the adapter's.
    faults += [f"PEFT warns: {warning.message}" for warning in said if not issubclass(warning.category, (FutureWarning, DeprecationWarning))]
    adapted = {name.removeprefix("base_model.model.").removesuffix(".lora_A.default") for name, _ in model.named_modules() if name.endswith("lora_A.default")}
    with safe_open(str(perturbation), "pt") as file:
        perturbed = {name.removesuffix(".weight.lora_A") for name in file.keys() if name.endswith(".lora_A")}
    if not perturbed or adapted != perturbed:
        faults.append(f"other modules are adapted: {sorted(adapted ^ perturbed)[:8]}")
    under = logits(model, ids)
    off, moved = (under - wanted).abs().max().item(), (before - wanted).abs().max().item()
    # A sum over a hundred inputs in another order.
    if not off < 1e-4 * moved:
        faults.append(f"logits differ by {off}, and from the base's by {moved}")
    merged, apart = model.merge_and_unload().state_dict(), 0.0
    for name, tensor in load_file(patched / "model.safetensors").items():
        apart = max(apart, ((merged[name] - tensor).abs().max() / tensor.abs().max()).item())
    if not apart < 1e-6:
        faults.append(f"merged weights differ by {apart} of the largest")
    settings = json.loads((adapter / "adapter_config.json").read_text())
    found = dict(modules=len(adapted), targets=settings["target_modules"], ranks=sorted({settings["r"], *settings["rank_pattern"].values()}),
                 logits_off=off, logits_moved=moved, weights_off=apart)
    return faults, found


def run(program, *words):
    subprocess.run([program, *map(str, words), "--quiet"], check=True, stdout=subprocess.DEVNULL)


def load(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@torch.no_grad()
def logits(model, ids):
    return model(input_ids=ids).logits


if __name__ == "__main__":
    main()
