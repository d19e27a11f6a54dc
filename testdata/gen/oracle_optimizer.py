#!/usr/bin/env python3
"""Writes testdata/oracle/optimizer: whole runs of the paper's method on the checkpoint testdata/oracle/llama-tied.

    python oracle_optimizer.py [--out ../oracle]

In: that checkpoint (run oracle.py first) and benches/torch_peer.py, which does the arithmetic. Out, in the folder `optimizer`:

    harmful.json, task.json    rows, as in the other cases' rows.json; more than one batch, and not a multiple of it
    task-likely.json           the task of the run `partly-clipped`: responses that the model itself gives, so that gradients are small
    <run>.json                 {"settings": {..}, "steps": [{"g", "h", "h_eps", "grad_h", "clip"}, ..], "h_final", "grad_h_final", ..}
    <run>.safetensors          "drift.<weight name>" = w_T - w_0 and "eps.<weight name>", F32

`clip` is the factor that the clipping to norm 1 applied. Each row runs alone, with eager attention, in f32 on one thread. Before it
writes, the generator runs everything again padded and with fused attention: `disagreement` is the relative L2 distance of the two
results, so a test knows what f32 can promise.
"""
import argparse
import dataclasses
import json
import pathlib
import sys

import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, logging

ROOT = pathlib.Path(__file__).resolve().parent.parent.parent
sys.path[:0] = [str(ROOT / "benches"), str(ROOT / "testdata" / "gen")]
from oracle import VOCABULARY, rows_as_text  # noqa: E402
from torch_peer import Peer, Row, Settings  # noqa: E402

ALL_LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
RUNS = {
    "eps-alone": Settings(rho=1.0, steps=0, batch=2),
    "whole": Settings(rho=0.5, lamb=0.5, lr=2e-3, steps=3, batch=2),
    "partly-clipped": Settings(rho=0.5, lamb=0.001, lr=1e-3, steps=3, batch=2),
    "last-batch": Settings(rho=0.5, lamb=0.001, lr=1e-3, steps=3, batch=2, final_eps="last-batch"),
    "all-linear": Settings(rho=0.3, lamb=1.0, lr=1e-3, steps=2, batch=3, targets=ALL_LINEAR),
}


def main():
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("--out", type=pathlib.Path, default=ROOT / "testdata" / "oracle")
    options = arguments.parse_args()
    torch.set_num_threads(1)
    logging.disable_progress_bar()
    folder = options.out / "optimizer"
    folder.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(102)
    harmful, task = (random_rows(generator, lengths) for lengths in ([12, 7, 16, 9, 5], [8, 15, 6]))
    likely = likely_rows(options.out / "llama-tied", random_rows(generator, [8] * 200))
    for name, rows in [("harmful", harmful), ("task", task), ("task-likely", likely)]:
        (folder / f"{name}.json").write_text(rows_as_text([(row.tokens, row.in_loss) for row in rows]))
    for name, settings in RUNS.items():
        task_of_run = likely if name == "partly-clipped" else task
        result, drift, eps = run(options.out / "llama-tied", harmful, task_of_run, settings, "eager")
        padded = dataclasses.replace(settings, padded=True)
        _, drift_again, eps_again = run(options.out / "llama-tied", harmful, task_of_run, padded, "sdpa")
        for step in result["steps"]:
            del step["seconds"]
        result.pop("seconds_final", None)
        result["disagreement"] = dict(drift=distance(drift, drift_again), eps=distance(eps, eps_again))
        given = {f.name: getattr(settings, f.name) for f in dataclasses.fields(settings) if f.name not in ("padded", "adapter", "weight_decay")}
        given["lambda"] = given.pop("lamb")
        given["task"] = "task-likely.json" if name == "partly-clipped" else "task.json"
        if settings.steps and (name == "partly-clipped") != (max(step["clip"] for step in result["steps"]) == 1.0):
            raise SystemExit(f"{name}: clipped by {[step['clip'] for step in result['steps']]}, not what it is there for")
        (folder / f"{name}.json").write_text(json.dumps(dict(settings=given) | result, indent=2) + "\n")
        save_file({f"{kind}.{n}": t.contiguous() for kind, part in (("drift", drift), ("eps", eps)) for n, t in sorted(part.items())},
                  str(folder / f"{name}.safetensors"))
        print(name, json.dumps(result))


def run(checkpoint, harmful, task, settings, attention):
    model = AutoModelForCausalLM.from_pretrained(str(checkpoint), dtype=torch.float32, attn_implementation=attention).eval()
    return Peer(model, harmful, task, dataclasses.replace(settings, padded=attention != "eager")).run()


def random_rows(generator, lengths):
    rows = []
    for length in lengths:
        tokens = torch.randint(3, VOCABULARY, (length,), generator=generator).tolist()
        rows.append(Row(tokens, [j >= length // 2 for j in range(length)]))
    return rows


def likely_rows(checkpoint, rows):
    """The three of `rows` that the model is surest about once the tokens in the loss are replaced by the most likely ones."""
    model = AutoModelForCausalLM.from_pretrained(str(checkpoint), dtype=torch.float32, attn_implementation="eager").eval()
    sure = []
    for row in rows:
        tokens, loss = list(row.tokens), 0.0
        with torch.no_grad():
            for i in (i for i, marked in enumerate(row.in_loss) if marked):
                next_token = model(input_ids=torch.tensor([tokens[:i]]), use_cache=False).logits[0, -1].log_softmax(0).max(0)
                tokens[i] = next_token.indices.item()
                loss -= next_token.values.item()
        sure.append((loss, Row(tokens, row.in_loss)))
    return [row for _, row in sorted(sure, key=lambda pair: pair[0])[:3]]


def distance(a, b):
    """Relative L2 distance of two sets of tensors; 0 where both are 0."""
    square = lambda tensors: sum(t.double().square().sum().item() for t in tensors)
    return (square([a[n] - b[n] for n in a]) / max(square(a.values()), 1e-30)) ** 0.5


if __name__ == "__main__":
    main()
