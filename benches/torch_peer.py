#!/usr/bin/env python3
"""`panacea-patch optimize --method panacea` in PyTorch: the opponent in benchmarks and the judge of results.

    python torch_peer.py MODEL_DIR [--adapter PEFT_DIR] --harmful H.jsonl [--task G.jsonl] --steps 3 --batch 4 --out delta.safetensors --json

In: a checkpoint that transformers loads, and rows. A row is text, {"instruction", "input"?, "output"} or {"prompt", "target"|"response"},
or it is encoded already, {"tokens", "in_loss"}; a file is JSON lines or one object {"rows": [..]}, and `FILE#split=eval` keeps the
rows whose field `split` is `eval`. Text is rendered by --template; prompt and response are tokenized apart without special tokens, the
end-of-sequence token follows, and the loss is the mean over those response tokens.

Out: one JSON object. `steps` has g, h, h_eps, grad_h, clip (the factor of clipping) and seconds for each step; then the seconds of a step (median of all but the first),
the whole harmful set's loss before and after, the norms, and the peak resident memory. --out takes the perturbation, w_T - w_0 + eps,
under the weights' own names, in F32; --parts the same in two parts, `drift.<name>` and `eps.<name>`.

The method, with eps(v) = rho v / |v|, one norm over all targeted tensors, which are the model's own, without weight decay, or with
--adapter every A and B of that LoRA adapter, under the names that PEFT saves them by, with the reference code's weight decay of 0.1:

    w <- AdamW(w, clip_1(grad g(w) - lambda (grad h(w + eps(grad h(w))) - grad h(w))), lr)        T times
    delta = w_T - w_0 + eps(grad H(w_T)), H being the whole harmful set, or with --final-eps last-batch the eps of the last step

Batches are rows in file order and wrap around. Only logits that a loss needs are computed, so the opponent is not a strawman.
"""
import argparse
import dataclasses
import json
import pathlib
import resource
import statistics
import time

import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, logging

ALPACA = ("Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
          "### Instruction:\n{instruction}\n\n### Response:\n")
ALPACA_WITH_INPUT = ("Below is an instruction that describes a task, paired with an input that provides further context. Write a response "
                     "that appropriately completes the request.\n\n### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n")


@dataclasses.dataclass
class Settings:
    rho: float = 1.0
    lamb: float = 0.001
    lr: float = 2e-5
    steps: int = 4
    batch: int = 4
    targets: tuple = ("q_proj", "k_proj", "v_proj")
    final_eps: str = "whole"
    weight_decay: float = 0.0
    adapter: bool = False  # the targets are the A and B of the LoRA modules in the model
    padded: bool = True  # False: every row alone, for an oracle that must not depend on padding


@dataclasses.dataclass
class Row:
    tokens: list
    in_loss: list

    def predicted(self):
        return sum(self.in_loss[1:])


class Peer:
    """A model, two sets of rows, and the method's arithmetic on the targeted weights."""

    def __init__(self, model, harmful, task, settings):
        self.model, self.harmful, self.task, self.settings = model, harmful, task, settings
        self.names, self.weights = [], []
        for name, weight in model.named_parameters():
            if settings.adapter:
                wanted = ".lora_A." in name or ".lora_B." in name
            else:
                wanted = any(name.endswith(f".{target}.weight") for target in settings.targets)
            weight.requires_grad_(wanted)
            if wanted:
                self.names.append("base_model.model." + name.replace(".default.", ".") if settings.adapter else name)
                self.weights.append(weight)
        self.start = [w.detach().clone() for w in self.weights]

    def run(self):
        s, log, eps = self.settings, [], None
        optimizer = torch.optim.AdamW(self.weights, lr=s.lr, weight_decay=s.weight_decay)
        for t in range(s.steps):
            began = time.perf_counter()
            task, harmful = batch_at(self.task, t, s.batch), batch_at(self.harmful, t, s.batch)
            g, grad_g = self.gradient(task)
            h, grad_h = self.gradient(harmful)
            norm = norm_of(grad_h)
            eps = scaled(grad_h, s.rho / norm)
            kept = [w.detach().clone() for w in self.weights]
            self.shift(eps)
            h_eps, grad_h_eps = self.gradient(harmful)
            with torch.no_grad():
                for w, k in zip(self.weights, kept):
                    w.copy_(k)
            wanted = [dg - s.lamb * (there - here) for dg, there, here in zip(grad_g, grad_h_eps, grad_h)]
            clip = min(1.0, 1.0 / max(norm_of(wanted), 1e-30))
            for w, d in zip(self.weights, wanted):
                w.grad = d * clip
            optimizer.step()
            self.model.zero_grad(set_to_none=True)
            if self.weights[0].is_cuda:
                torch.cuda.synchronize()
            log.append(dict(g=g, h=h, h_eps=h_eps, grad_h=norm, clip=clip, seconds=time.perf_counter() - began))
        result = dict(steps=log)
        if s.final_eps == "whole" or eps is None:
            began = time.perf_counter()
            h, grad_h = self.whole_gradient()
            norm = norm_of(grad_h)
            eps = scaled(grad_h, s.rho / norm)
            result.update(h_final=h, grad_h_final=norm, seconds_final=time.perf_counter() - began)
        drift = [w.detach() - before for w, before in zip(self.weights, self.start)]
        self.shift(eps)
        with torch.no_grad():
            total = sum(row.predicted() for row in self.harmful)
            result["h_final_eps"] = sum(self.summed_loss(part).item() for part in parts_of(self.harmful, s.batch)) / total
        result.update(eps_norm=norm_of(eps), drift_norm=norm_of(drift), delta_norm=norm_of([d + e for d, e in zip(drift, eps)]))
        return result, dict(zip(self.names, drift)), dict(zip(self.names, eps))

    def gradient(self, rows):
        """The mean loss per predicted token of `rows`, and its gradient in the order of `self.names`."""
        total = sum(row.predicted() for row in rows)
        groups = [rows] if self.settings.padded else [[row] for row in rows]
        value, gradient = 0.0, None
        for group in groups:
            loss = self.summed_loss(group) / total
            part = torch.autograd.grad(loss, self.weights)
            gradient = list(part) if gradient is None else [a + b for a, b in zip(gradient, part)]
            value += loss.item()
        return value, gradient

    def whole_gradient(self):
        """`gradient` over all harmful rows, as many at a time as a batch has."""
        total = sum(row.predicted() for row in self.harmful)
        value, gradient = 0.0, [torch.zeros_like(w) for w in self.weights]
        for part in parts_of(self.harmful, self.settings.batch):
            share = sum(row.predicted() for row in part) / total
            h, grad_h = self.gradient(part)
            value += share * h
            gradient = [a + share * b for a, b in zip(gradient, grad_h)]
        return value, gradient

    def summed_loss(self, rows):
        width, device = max(len(row.tokens) for row in rows), self.weights[0].device
        ids = torch.tensor([row.tokens + [0] * (width - len(row.tokens)) for row in rows], device=device)
        real = torch.tensor([[1] * len(row.tokens) + [0] * (width - len(row.tokens)) for row in rows], device=device)
        where = [(i, j) for i, row in enumerate(rows) for j in range(1, len(row.tokens)) if row.in_loss[j]]
        row_of, place = (torch.tensor(x, device=device) for x in zip(*where))
        hidden = self.model.model(input_ids=ids, attention_mask=real, use_cache=False).last_hidden_state
        logits = self.model.lm_head(hidden[row_of, place - 1])
        return torch.nn.functional.cross_entropy(logits.float(), ids[row_of, place], reduction="sum")

    def shift(self, by):
        with torch.no_grad():
            for w, d in zip(self.weights, by):
                w += d


def norm_of(tensors):
    return sum(t.double().square().sum().item() for t in tensors) ** 0.5


def scaled(tensors, factor):
    return [t * factor for t in tensors]


def batch_at(rows, t, size):
    return [rows[(t * size + k) % len(rows)] for k in range(size)]


def parts_of(rows, size):
    return [rows[i:i + size] for i in range(0, len(rows), size)]


def read_rows(path, render, max_length):
    """Rows of `path`, encoded; `render` turns a text row into (prompt tokens, response tokens)."""
    path, _, condition = path.partition("#")
    text = pathlib.Path(path).read_text()
    try:
        rows = json.loads(text)
        rows = rows if isinstance(rows, list) else rows["rows"] if "rows" in rows else [rows]
    except json.JSONDecodeError:
        rows = [json.loads(line) for line in text.splitlines() if line.strip()]
    if condition:
        field, _, value = condition.partition("=")
        rows = [row for row in rows if str(row.get(field)) == value]
    encoded = []
    for row in rows:
        if "tokens" in row:
            row = Row(row["tokens"], row["in_loss"])
        else:
            prompt, response = render(row)
            row = Row((prompt + response)[:max_length], ([False] * len(prompt) + [True] * len(response))[:max_length])
        encoded.append(row)
    if not encoded or any(row.predicted() == 0 for row in encoded):
        raise SystemExit(f"`{path}`: no rows, or a row without a response token within {max_length} tokens")
    return encoded


def renderer(folder, template):
    """A function from a text row to (prompt tokens, response tokens with the end of sequence)."""
    tokenizer = None

    def render(row):
        nonlocal tokenizer
        tokenizer = tokenizer or AutoTokenizer.from_pretrained(folder)  # not wanted for encoded rows
        request = row.get("instruction", row.get("prompt", row.get("request")))
        answer = row.get("output", row.get("target", row.get("response", row.get("opening"))))
        prompt = prompt_of(tokenizer, template, request, row.get("input"))
        return (tokenizer(prompt, add_special_tokens=False)["input_ids"],
                tokenizer(answer, add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id])

    return render


def prompt_of(tokenizer, template, request, extra=None):
    if template == "alpaca":
        return ALPACA_WITH_INPUT.format(instruction=request, input=extra) if extra else ALPACA.format(instruction=request)
    content = f"{request}\n\n{extra}" if extra else request
    if template == "raw":
        return content
    return tokenizer.apply_chat_template([dict(role="user", content=content)], tokenize=False, add_generation_prompt=True)


def main():
    a = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    a.add_argument("model")
    a.add_argument("--harmful", required=True)
    a.add_argument("--task")
    a.add_argument("--template", choices=["alpaca", "chat", "raw"], default="alpaca")
    a.add_argument("--max-length", type=int, default=256)
    a.add_argument("--rho", type=float, default=Settings.rho)
    a.add_argument("--lambda", dest="lamb", type=float, default=Settings.lamb)
    a.add_argument("--lr", type=float, default=Settings.lr)
    a.add_argument("--steps", type=int, default=Settings.steps)
    a.add_argument("--batch", type=int, default=Settings.batch)
    a.add_argument("--adapter", help="a PEFT directory over the model: its A and B are the targets")
    a.add_argument("--weight-decay", type=float, help="default: 0, with --adapter 0.1")
    a.add_argument("--targets", help=f"default: {','.join(Settings.targets)}; not with --adapter")
    a.add_argument("--final-eps", choices=["whole", "last-batch"], default="whole")
    a.add_argument("--rows-alone", action="store_true", help="no padding: each row is a batch of its own")
    a.add_argument("--attention", default="sdpa", help="transformers' attn_implementation")
    a.add_argument("--device", default="cpu")
    a.add_argument("--threads", type=int)
    a.add_argument("--out", help="the perturbation, F32 safetensors")
    a.add_argument("--parts", help="the same as drift.<name> and eps.<name>")
    a.add_argument("--json", action="store_true", help="print nothing but the JSON object")
    o = a.parse_args()
    if o.steps and not o.task:
        a.error("--steps above 0 needs --task")
    if o.adapter and o.targets:
        a.error("--targets has no effect with --adapter")
    logging.disable_progress_bar()
    if o.threads:
        torch.set_num_threads(o.threads)
    render = renderer(o.model, o.template)
    harmful = read_rows(o.harmful, render, o.max_length)
    task = read_rows(o.task, render, o.max_length) if o.task else []
    model = AutoModelForCausalLM.from_pretrained(o.model, dtype=torch.float32, attn_implementation=o.attention).to(o.device).eval()
    if o.adapter:
        from peft import PeftModel
        # The LoRA modules are put into the model itself, which then computes as any other.
        model = PeftModel.from_pretrained(model, o.adapter, is_trainable=True).get_base_model().eval()
    decay = o.weight_decay if o.weight_decay is not None else 0.1 if o.adapter else 0.0
    targets = tuple(o.targets.split(",")) if o.targets else Settings.targets
    settings = Settings(o.rho, o.lamb, o.lr, o.steps, o.batch, targets, o.final_eps, decay, bool(o.adapter), not o.rows_alone)
    result, drift, eps = Peer(model, harmful, task, settings).run()
    seconds = [step["seconds"] for step in result["steps"]]
    result["seconds_per_step"] = statistics.median(seconds[1:] or seconds) if seconds else None
    result["peak_rss_mib"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
    if o.out:
        save_file({n: (drift[n] + eps[n]).cpu().contiguous() for n in eps}, o.out)
    if o.parts:
        save_file({f"{kind}.{n}": t.cpu().contiguous() for kind, part in (("drift", drift), ("eps", eps)) for n, t in part.items()}, o.parts)
    if not o.json:
        for t, step in enumerate(result["steps"]):
            print(f"step {t}: g {step['g']:.6f}  h {step['h']:.6f}  h(w+eps) {step['h_eps']:.6f}  |grad h| {step['grad_h']:.6f}  {step['seconds']:.2f} s")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
