#!/usr/bin/env python3
"""Writes testdata/peft/<case>: tiny LoRA adapters saved by PEFT, and what PEFT and PyTorch say about them.

    python adapters.py [--out ../peft]

In: the checkpoints testdata/oracle/llama-tied, testdata/oracle/llama3-rope (run oracle.py first) and testdata/tiny-chat, and the rows of
testdata/oracle/optimizer. Out, for each case, a folder with

    adapter/                   adapter_config.json and adapter_model.safetensors, as `save_pretrained` writes them; the base's path is
                               relative to this folder
    rows.json                  {"rows": [{"tokens": [..], "in_loss": [..]}, ..]}
    expected.json              {"loss", "predicted", "ranks": {module: r}, "scales": {module: factor}}
    expected.safetensors       "logits" (predicted, vocab) in the order of the rows, then "grad.<tensor of the adapter>", F32
    merged-f32.safetensors     every tensor that `merge_and_unload` changed in the base, under its name there
    merged-bf16.safetensors    the same of the base rounded to BF16
    run.json                   two steps of the paper's method on A and B, with weight decay: {"settings", "steps", "h_final", ..}
    run.safetensors            "drift.<tensor>" = w_T - w_0 and "eps.<tensor>", F32

`tiny-chat/` holds an adapter alone, over a model with a tokenizer: the whole path is tried on it. `fields.json` lists every field of
PEFT's LoraConfig. The arithmetic of the run is written out here and shared with nothing. Every row runs alone, in f32 with eager
attention on one thread. Each setting that a reader could overlook moves the logits by more than 0.01 when it is put back to its default.
"""
import argparse
import dataclasses
import json
import pathlib
import shutil
import sys

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, logging

ROOT = pathlib.Path(__file__).resolve().parent.parent.parent
sys.path.append(str(ROOT / "testdata" / "gen"))
from oracle import random_rows, rows_as_text  # noqa: E402

ORACLE = ROOT / "testdata" / "oracle"
CASES = {
    # The first pattern that matches counts: `q_proj` of block 1 has its own alpha, the others that of the second pattern.
    "patterns": dict(
        base="llama-tied", neutral=dict(alpha_pattern={}),
        r=3, lora_alpha=6, target_modules=["q_proj", "k_proj", "v_proj", "down_proj"],
        rank_pattern={"down_proj": 2, r"layers\.[02]\.self_attn\.v_proj": 5},
        alpha_pattern={"1.self_attn.q_proj": 1.5, "[a-q]_proj": 9}),
    "rank-stabilized": dict(
        base="llama3-rope", neutral=dict(use_rslora=False),
        r=4, lora_alpha=2, use_rslora=True, target_modules="all-linear", exclude_modules=["gate_proj", "down_proj"]),
    "one-layer": dict(
        base="llama-tied", neutral=dict(layers_to_transform=None, layers_pattern=None),
        r=2, lora_alpha=8, target_modules=["q_proj", "o_proj", "up_proj"], layers_to_transform=[1], layers_pattern="layers"),
    "saved-head": dict(
        base="llama3-rope", neutral=dict(modules_to_save=None),
        r=2, lora_alpha=4, target_modules=r".*\.(q|v)_proj", modules_to_save=["lm_head"]),
}
RUN = dict(rho=0.5, lamb=0.5, lr=2e-3, steps=2, batch=2, weight_decay=0.1)


def main():
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("--out", type=pathlib.Path, default=ROOT / "testdata" / "peft")
    options = arguments.parse_args()
    logging.disable_progress_bar()
    torch.set_num_threads(1)
    shutil.rmtree(options.out, ignore_errors=True)
    for seed, (case, settings) in enumerate(CASES.items(), 201):
        write_case(options.out / case, torch.Generator().manual_seed(seed), **settings)
    write_tiny_chat(options.out / "tiny-chat")
    fields = sorted(field.name for field in dataclasses.fields(LoraConfig))
    (options.out / "fields.json").write_text(json.dumps(fields, indent=1) + "\n")
    for path in options.out.rglob("*.safetensors"):
        path.chmod(0o644)


def write_case(folder, generator, base, neutral, **settings):
    folder.mkdir(parents=True)
    save_adapter(folder / "adapter", ORACLE / base, f"../../../oracle/{base}", generator, 0.4, **settings)
    rows = random_rows(generator)
    (folder / "rows.json").write_text(rows_as_text(rows))

    model = PeftModel.from_pretrained(load_base(base), str(folder / "adapter"), is_trainable=True).eval()
    names = adapter_names(model)
    loss, logits, gradients = loss_and_gradients(model, names, rows)
    layers = {n.removeprefix("base_model.model."): m for n, m in model.named_modules() if hasattr(m, "lora_A") and hasattr(m, "scaling")}
    (folder / "expected.json").write_text(json.dumps(dict(
        loss=loss, predicted=sum(sum(marks[1:]) for _, marks in rows),
        ranks={n: m.r["default"] for n, m in sorted(layers.items())},
        scales={n: m.scaling["default"] for n, m in sorted(layers.items())}), indent=2) + "\n")
    save_file(dict(logits=logits) | {f"grad.{n}": g for n, g in sorted(gradients.items())}, str(folder / "expected.safetensors"))
    check_that_the_case_is_one(folder, base, neutral, logits, rows)
    for dtype, name in [(torch.float32, "f32"), (torch.bfloat16, "bf16")]:
        save_file(merged(folder, base, dtype), str(folder / f"merged-{name}.safetensors"))
    write_run(folder, base)
    print(folder.name, loss, len(layers), "modules")


def write_tiny_chat(folder):
    """An adapter that leaves the model much as it is: B is small, as after a short training."""
    save_adapter(folder, ROOT / "testdata" / "tiny-chat", "../../tiny-chat", torch.Generator().manual_seed(200), 0.02,
                 r=8, lora_alpha=16, lora_dropout=0.05, target_modules=["q_proj", "k_proj", "v_proj"])


def save_adapter(folder, base, base_name, generator, size_of_b, **settings):
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(str(base), dtype=torch.float32), LoraConfig(task_type="CAUSAL_LM", **settings))
    with torch.no_grad():
        for name, p in sorted(model.named_parameters()):
            if ".lora_A." in name:
                p.copy_(torch.randn(p.shape, generator=generator) / p.shape[1] ** 0.5)
            elif ".lora_B." in name:
                p.copy_(torch.randn(p.shape, generator=generator) * size_of_b)
            elif ".modules_to_save." in name:
                p.add_(torch.randn(p.shape, generator=generator) * 0.1)
    model.peft_config["default"].base_model_name_or_path = base_name
    model.save_pretrained(str(folder))
    (folder / "README.md").unlink()
    # Sets have no order; sorted, two runs write the same.
    path = folder / "adapter_config.json"
    config = json.loads(path.read_text())
    for field in ["target_modules", "exclude_modules"]:
        if isinstance(config[field], list):
            config[field].sort()
    path.write_text(json.dumps(config, indent=2) + "\n")


def load_base(base, dtype=torch.float32):
    return AutoModelForCausalLM.from_pretrained(str(ORACLE / base), dtype=dtype, attn_implementation="eager").eval()


def adapter_names(model):
    """The parameters A and B by the names that the saved file gives them."""
    return {n.replace(".default.", "."): p for n, p in model.named_parameters() if ".lora_A." in n or ".lora_B." in n}


def loss_and_gradients(model, names, rows):
    total = sum(sum(marks[1:]) for _, marks in rows)
    loss, logits, gradients = 0.0, [], {n: torch.zeros_like(p) for n, p in names.items()}
    for tokens, marks in rows:
        where = [i for i in range(1, len(tokens)) if marks[i]]
        out = model(input_ids=torch.tensor([tokens]), use_cache=False).logits[0, [i - 1 for i in where]]
        part = torch.nn.functional.cross_entropy(out, torch.tensor([tokens[i] for i in where]), reduction="sum") / total
        for (n, _), g in zip(names.items(), torch.autograd.grad(part, list(names.values()))):
            gradients[n] += g
        loss += part.item()
        logits.append(out.detach())
    return loss, torch.cat(logits).contiguous(), gradients


def check_that_the_case_is_one(folder, base, neutral, logits, rows):
    """With each special setting back at its default the logits must move, or the case tests nothing."""
    other = folder / "neutral"
    shutil.copytree(folder / "adapter", other)
    config = json.loads((other / "adapter_config.json").read_text())
    (other / "adapter_config.json").write_text(json.dumps(config | neutral))
    if "modules_to_save" in neutral:
        tensors = load_file(str(other / "adapter_model.safetensors"))
        save_file({n: t for n, t in tensors.items() if ".lora_" in n}, str(other / "adapter_model.safetensors"), {"format": "pt"})
    model = load_base(base)
    if "layers_to_transform" in neutral:
        # More layers would be adapted, with random A and zero B; nothing moves, but PEFT must make them.
        count = len(adapter_names(PeftModel.from_pretrained(model, str(other))))
        if count <= len(load_file(str(folder / "adapter" / "adapter_model.safetensors"))):
            raise SystemExit(f"{folder.name}: all layers are adapted")
    else:
        model = PeftModel.from_pretrained(model, str(other)).eval()
        again = torch.cat([model(input_ids=torch.tensor([tokens])).logits[0, [i - 1 for i in range(1, len(tokens)) if marks[i]]]
                           for tokens, marks in rows])
        moved = (again.detach() - logits).abs().max().item()
        if moved < 1e-2:
            raise SystemExit(f"{folder.name}: without {neutral} the logits move by {moved} only")
    shutil.rmtree(other)


def merged(folder, base, dtype):
    """What merging changed in the base, as `save_pretrained` stores it."""
    model = PeftModel.from_pretrained(load_base(base, dtype), str(folder / "adapter")).merge_and_unload()
    before = dict(load_base(base, dtype).named_parameters())
    return {n: p.detach().contiguous() for n, p in sorted(model.named_parameters()) if not torch.equal(p, before[n])}


def write_run(folder, base):
    """The paper's method, line by line."""
    rows_of = lambda name: [(row["tokens"], row["in_loss"]) for row in json.loads((ORACLE / "optimizer" / name).read_text())["rows"]]
    harmful, task = rows_of("harmful.json"), rows_of("task.json")
    rho, lamb, steps, batch = (RUN[name] for name in ["rho", "lamb", "steps", "batch"])

    def run(weight_decay):
        model = PeftModel.from_pretrained(load_base(base), str(folder / "adapter"), is_trainable=True).eval()
        names = adapter_names(model)
        w = list(names.values())
        start = [p.detach().clone() for p in w]
        optimizer = torch.optim.AdamW(w, lr=RUN["lr"], weight_decay=weight_decay)
        at = lambda rows, t: [rows[(t * batch + k) % len(rows)] for k in range(batch)]
        norm = lambda v: sum(x.double().square().sum().item() for x in v) ** 0.5

        def gradient(rows):
            loss, _, found = loss_and_gradients(model, names, rows)
            return loss, list(found.values())

        log = []
        for t in range(steps):
            g, grad_g = gradient(at(task, t))
            h, grad_h = gradient(at(harmful, t))
            eps = [rho * x / norm(grad_h) for x in grad_h]
            kept = [p.detach().clone() for p in w]
            with torch.no_grad():
                for p, e in zip(w, eps):
                    p.add_(e)
            h_eps, grad_h_eps = gradient(at(harmful, t))
            with torch.no_grad():
                for p, k in zip(w, kept):
                    p.copy_(k)
            d = [a - lamb * (c - b) for a, b, c in zip(grad_g, grad_h, grad_h_eps)]
            clip = min(1.0, 1.0 / (norm(d) + 1e-6))
            for p, x in zip(w, d):
                p.grad = x * clip
            optimizer.step()
            log.append(dict(g=g, h=h, h_eps=h_eps, grad_h=norm(grad_h), clip=clip))
        h, grad_h = gradient(harmful)
        eps = [rho * x / norm(grad_h) for x in grad_h]
        drift = [p.detach() - s for p, s in zip(w, start)]
        with torch.no_grad():
            for p, e in zip(w, eps):
                p.add_(e)
        h_eps = gradient(harmful)[0]
        result = dict(steps=log, h_final=h, grad_h_final=norm(grad_h), h_final_eps=h_eps, eps_norm=norm(eps), drift_norm=norm(drift))
        return result, dict(zip(names, drift)), dict(zip(names, eps))

    result, drift, eps = run(RUN["weight_decay"])
    _, without, _ = run(0.0)
    size = lambda tensors: sum(t.double().square().sum().item() for t in tensors) ** 0.5
    if size([drift[n] - without[n] for n in drift]) < 3e-3 * size(drift.values()):
        raise SystemExit(f"{folder.name}: weight decay hardly moves the result")
    settings = {("lambda" if k == "lamb" else k): v for k, v in RUN.items()}
    (folder / "run.json").write_text(json.dumps(dict(settings=settings) | result, indent=2) + "\n")
    save_file({f"{kind}.{n}": t.contiguous() for kind, part in (("drift", drift), ("eps", eps)) for n, t in sorted(part.items())},
              str(folder / "run.safetensors"))


if __name__ == "__main__":
    main()
