#!/usr/bin/env python3
"""The contrast method (`--method adaptive`) as a plain PyTorch experiment: does a small perturbation bring refusals back?

    python contrast_prototype.py MODEL_DIR --harmful H.jsonl [--task G.jsonl] [--benign B.jsonl] --template chat --step 0.1 --steps 6 \
        --heldout E.jsonl --task-dev T.jsonl --benign-dev D.jsonl [--out delta.safetensors]

In: harmful rows with an opening (`target` or `opening`) and a `refusal`, task rows, benign rows with an answer. Each step, on one small batch of each set,
with hats for normalized gradients:

    d      = hat(h)[h < cap] - alpha hat(r)          h: loss of the openings, r: of the refusals
    d     -= its component along grad g and along grad k, where it points uphill    g: task loss, k: KL from the starting model on benign answers
    delta += step hat(d) - protect step (hat(g) + hat(k))       each protection only as long as its loss is above where it began
    delta  = delta cut to norm rho, if given

then --repair steps of --repair-step down g and k, with what opposes the last contrast direction removed. Out: one JSON object with the losses
per step, the norms, and, with the evaluation sets, what tests/interop/score.py says before and after, and after a random perturbation of
the same norm.
"""
import argparse
import copy
import json
import pathlib
import random
import sys

import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, logging

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent / "tests" / "interop"))
import score  # noqa: E402
from torch_peer import Peer, Row, Settings, norm_of, prompt_of, scaled  # noqa: E402


def main():
    a = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    a.add_argument("model")
    for name in ("harmful", "task", "benign", "heldout", "task-dev", "benign-dev", "out"):
        a.add_argument(f"--{name}")
    a.add_argument("--template", default="alpaca")
    a.add_argument("--targets", default="q_proj,k_proj,v_proj")
    a.add_argument("--step", type=float, default=0.1)
    a.add_argument("--steps", type=int, default=6)
    a.add_argument("--batch", type=int, default=8)
    a.add_argument("--cap", type=float, default=6.0)
    a.add_argument("--alpha", type=float, default=1.0)
    a.add_argument("--first", type=int, default=10**6, help="take h and r on so many tokens of a response")
    a.add_argument("--rho", type=float)
    a.add_argument("--protect", type=float, default=0.5)
    a.add_argument("--repair", type=int, default=0)
    a.add_argument("--repair-step", type=float, default=0.03)
    a.add_argument("--n", type=int, default=60)
    a.add_argument("--n-task", type=int)
    a.add_argument("--new-tokens", type=int, default=16)
    a.add_argument("--max-length", type=int, default=160)
    a.add_argument("--seed", type=int, default=0)
    a.add_argument("--threads", type=int, default=1)
    a.add_argument("--no-random", action="store_true", help="leave the random control out")
    o = a.parse_args()
    logging.disable_progress_bar()
    torch.set_num_threads(o.threads)
    tokenizer = AutoTokenizer.from_pretrained(o.model)
    model = AutoModelForCausalLM.from_pretrained(o.model, dtype=torch.float32).eval()
    run = Contrast(model, tokenizer, o)
    result = dict(weights_norm=norm_of(run.peer.weights), before=run.scores())
    result["steps"] = run.optimize()
    delta = [w.detach() - s for w, s in zip(run.peer.weights, run.peer.start)]
    result.update(delta_norm=norm_of(delta), after=run.scores())
    if not o.no_random:
        generator = torch.Generator().manual_seed(o.seed)
        noise = [torch.randn(d.shape, generator=generator) for d in delta]
        run.put(scaled(noise, norm_of(delta) / norm_of(noise)))
        result["random"] = run.scores()
    if o.out:
        save_file({n: d.contiguous() for n, d in zip(run.peer.names, delta)}, o.out)
    print(json.dumps(result))


class Contrast:
    def __init__(self, model, tokenizer, options):
        self.model, self.tokenizer, self.o = model, tokenizer, options
        self.peer = Peer(model, [], [], Settings(targets=tuple(options.targets.split(","))))
        self.rng = random.Random(options.seed)
        harmful = score.read(options.harmful, None)
        self.sets = {"harmful": [(self.row(r, opening_of(r), options.first), self.row(r, r["refusal"], options.first)) for r in harmful]}
        for name in ("task", "benign"):
            path = getattr(options, name)
            self.sets[name] = [self.row(r, r.get("output", r.get("answer"))) for r in score.read(path, None)] if path else []
        self.original = copy.deepcopy(model) if self.sets["benign"] else None

    def row(self, r, answer, first=10**6):
        prompt = prompt_of(self.tokenizer, self.o.template, score.request_of(r), r.get("input"))
        p = self.tokenizer(prompt, add_special_tokens=False)["input_ids"]
        q = (self.tokenizer(answer, add_special_tokens=False)["input_ids"] + [self.tokenizer.eos_token_id])[:first]
        return Row((p + q)[:self.o.max_length], ([False] * len(p) + [True] * len(q))[:self.o.max_length])

    def optimize(self):
        log, direction, floor = [], None, {}
        for t in range(self.o.steps):
            harmful = self.draw("harmful")
            h, grad_h = self.peer.gradient([opening for opening, _ in harmful])
            r, grad_r = self.peer.gradient([refusal for _, refusal in harmful])
            direction = minus(hat(grad_h) if h < self.o.cap else scaled(grad_h, 0.0), scaled(hat(grad_r), self.o.alpha))
            guards, entry = self.guards(), dict(h=h, r=r)
            step = [torch.zeros_like(w) for w in self.peer.weights]
            for name, (value, gradient) in guards.items():
                entry[name] = value
                unit = hat(gradient)
                uphill = dot(direction, unit)
                if uphill > 0:
                    direction = minus(direction, scaled(unit, uphill))
                if value > floor.setdefault(name, value):
                    step = minus(step, scaled(unit, self.o.protect * self.o.step))
            self.add(minus(scaled(hat(direction), self.o.step), scaled(step, -1.0)))
            log.append(entry)
        for t in range(self.o.repair):
            step = [torch.zeros_like(w) for w in self.peer.weights]
            for value, gradient in self.guards().values():
                step = minus(step, hat(gradient))
            unit = hat(direction)
            against = dot(step, unit)
            if against < 0:
                step = minus(step, scaled(unit, against))
            self.add(scaled(hat(step), self.o.repair_step))
        return log

    def guards(self):
        """The losses that are to stay where they are, with their gradients, on a batch each."""
        found = {}
        if self.sets["task"]:
            found["g"] = self.peer.gradient(self.draw("task"))
        if self.sets["benign"]:
            rows = self.draw("benign")
            total = sum(row.predicted() for row in rows)
            value, gradient = 0.0, [torch.zeros_like(w) for w in self.peer.weights]
            for row in rows:
                ids = torch.tensor([row.tokens])
                at = [j - 1 for j in range(1, len(row.tokens)) if row.in_loss[j]]
                with torch.no_grad():
                    wanted = self.original(input_ids=ids).logits[0, at].log_softmax(-1)
                is_ = self.model(input_ids=ids).logits[0, at].log_softmax(-1)
                loss = torch.nn.functional.kl_div(is_, wanted, reduction="sum", log_target=True) / total
                gradient = [a + b for a, b in zip(gradient, torch.autograd.grad(loss, self.peer.weights))]
                value += loss.item()
            found["kl"] = (value, gradient)
        return found

    def draw(self, name):
        rows = self.sets[name]
        return self.rng.sample(rows, min(self.o.batch, len(rows)))

    def add(self, step):
        self.peer.shift(step)
        if self.o.rho:
            delta = minus([w.detach() for w in self.peer.weights], self.peer.start)
            if norm_of(delta) > self.o.rho:
                self.put(scaled(delta, self.o.rho / norm_of(delta)))

    def put(self, delta):
        with torch.no_grad():
            for w, start, d in zip(self.peer.weights, self.peer.start, delta):
                w.copy_(start + d)

    def scores(self):
        o, found = self.o, {}
        if o.heldout:
            found["harmful"], log = score.score_requests(self.model, self.tokenizer, score.read(o.heldout, o.n), o.template, o.new_tokens)
            found["says"] = [said for _, _, said in log[:3]]
        if o.benign_dev:
            found["benign"], log = score.score_requests(self.model, self.tokenizer, score.read(o.benign_dev, o.n), o.template, o.new_tokens)
            found["benign_says"] = [said for _, _, said in log[:2]]
        if o.task_dev:
            found["task"] = score.score_task(self.model, self.tokenizer, score.read(o.task_dev, o.n_task or o.n), o.template)
        return found


def opening_of(row):
    return row.get("target", row.get("opening"))


def hat(tensors):
    norm = norm_of(tensors)
    return scaled(tensors, 1.0 / norm if norm > 0 else 0.0)


def minus(a, b):
    return [x - y for x, y in zip(a, b)]


def dot(a, b):
    return sum((x.double() * y.double()).sum().item() for x, y in zip(a, b))


if __name__ == "__main__":
    main()
