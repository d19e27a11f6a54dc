#!/usr/bin/env python3
"""Writes testdata/oracle/<case>: tiny random checkpoints of the llama family, and what PyTorch says about them.

    python oracle.py [--out ../oracle] [CASE ...]

In: nothing but the table CASES below. Out, for each case, a folder with

    config.json            as transformers writes it (`rope_parameters`)
    config.old.json        the same model in the older spelling (`rope_theta`, `rope_scaling` at the top level)
    model.safetensors      the weights, F32
    rows.json              {"rows": [{"tokens": [..], "in_loss": [..]}, ..]}
    expected.json          {"loss", "predicted", "row_losses", "row_predicted"}
    expected.safetensors   "logits" (predicted, vocab) in the order of the rows, then "grad.<weight name>" with the weight's shape

The loss is the mean, over every marked token but a row's first, of the cross-entropy in nats. Each row runs alone, so nothing here
depends on padding or packing. Attention is transformers' "eager" one; everything is f32.
"""
import argparse
import json
import pathlib

import torch
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM, logging

VOCABULARY = 97
COMMON = dict(vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
              num_key_value_heads=2, max_position_embeddings=256, hidden_act="silu", rms_norm_eps=1e-5, initializer_range=0.02,
              bos_token_id=1, eos_token_id=2, pad_token_id=0, attention_bias=False, mlp_bias=False, tie_word_embeddings=False)

# Every value that a reader could overlook differs from its default, so that overlooking it changes the numbers.
CASES = {
    "llama-tied": dict(
        model_type="llama", tie_word_embeddings=True, num_hidden_layers=3,
        rope_parameters=dict(rope_type="default", rope_theta=5000.0)),
    "llama3-rope": dict(
        model_type="llama", hidden_size=40, head_dim=16, num_key_value_heads=1, rms_norm_eps=1e-6,
        rope_parameters=dict(rope_type="llama3", rope_theta=50000.0, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
                             original_max_position_embeddings=32)),
    "mistral-window": dict(
        model_type="mistral", sliding_window=6, rope_parameters=dict(rope_type="default", rope_theta=1000.0)),
    "llama-biases": dict(
        model_type="llama", attention_bias=True, mlp_bias=True, num_key_value_heads=4,
        rope_parameters=dict(rope_type="default", rope_theta=10000.0)),
    "llama-linear-rope": dict(
        model_type="llama", rope_parameters=dict(rope_type="linear", rope_theta=10000.0, factor=3.0)),
    "llama-yarn-rope": dict(
        model_type="llama", tie_word_embeddings=True, head_dim=12,
        rope_parameters=dict(rope_type="yarn", rope_theta=10000.0, factor=4.0, beta_fast=32.0, beta_slow=1.0,
                             original_max_position_embeddings=64)),
}
ROW_LENGTHS = [9, 2, 23, 14]


def main():
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("--out", type=pathlib.Path, default=pathlib.Path(__file__).resolve().parent.parent / "oracle")
    arguments.add_argument("cases", nargs="*", default=list(CASES))
    options = arguments.parse_args()
    logging.disable_progress_bar()
    torch.set_num_threads(1)  # the order of summation, and with it the last bit, depends on the number of threads
    for case in options.cases:
        folder = options.out / case
        folder.mkdir(parents=True, exist_ok=True)
        write_case(folder, seed=list(CASES).index(case) + 1, **CASES[case])
        print(case, json.loads((folder / "expected.json").read_text())["loss"])


def write_case(folder, seed, **changes):
    settings = COMMON | changes
    config = AutoConfig.for_model(settings.pop("model_type"), **settings, dtype="float32")
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager", dtype=torch.float32).eval()
    generator = torch.Generator().manual_seed(seed)
    randomize(model, generator)
    rows = random_rows(generator)
    losses, logits, gradients = loss_and_gradients(model, rows)

    model.save_pretrained(folder)  # for config.json; the weights again, without transformers' own sorting of shards
    (folder / "generation_config.json").unlink(missing_ok=True)
    save_file({n: p.detach().contiguous() for n, p in sorted(model.named_parameters())}, str(folder / "model.safetensors"), {"format": "pt"})
    (folder / "config.old.json").write_text(json.dumps(older_spelling(json.loads((folder / "config.json").read_text())), indent=2) + "\n")
    (folder / "rows.json").write_text(rows_as_text(rows))
    predicted = [sum(marks[1:]) for _, marks in rows]
    (folder / "expected.json").write_text(json.dumps(dict(
        loss=sum(losses) / sum(predicted), predicted=sum(predicted),
        row_losses=[loss / max(n, 1) for loss, n in zip(losses, predicted)], row_predicted=predicted), indent=2) + "\n")
    save_file({"logits": logits} | {f"grad.{n}": g for n, g in sorted(gradients.items())}, str(folder / "expected.safetensors"))
    check_both_spellings(folder, logits, rows)
    check_that_the_case_is_one(folder, logits, rows)


def randomize(model, generator):
    """Weights large enough that attention is far from uniform; norms and biases away from 1 and 0."""
    with torch.no_grad():
        for name, p in sorted(model.named_parameters()):
            noise = torch.randn(p.shape, generator=generator)
            if name.endswith("norm.weight"):
                p.copy_(1.0 + 0.2 * noise)
            elif p.dim() == 1:
                p.copy_(0.3 * noise)
            elif "embed_tokens" in name:
                p.copy_(0.5 * noise)
            else:
                p.copy_(noise * 1.4 / p.shape[1] ** 0.5)


def random_rows(generator):
    """(tokens, marks): a response at the end of most rows, and in the last one a mask with holes that also marks the first token."""
    rows = []
    for i, length in enumerate(ROW_LENGTHS):
        tokens = torch.randint(3, VOCABULARY, (length,), generator=generator).tolist()
        prompt = max(1, length // 2)
        marks = [j >= prompt for j in range(length)]
        if i + 1 == len(ROW_LENGTHS):
            marks = [j % 3 != 1 for j in range(length)]
        rows.append((tokens, marks))
    return rows


def loss_and_gradients(model, rows):
    """Per row the summed loss, all predicted logits, and the gradient of the mean loss over all rows."""
    total = sum(sum(marks[1:]) for _, marks in rows)
    model.zero_grad(set_to_none=True)
    losses, logits = [], []
    for tokens, marks in rows:
        ids = torch.tensor([tokens])
        before = torch.tensor([i - 1 for i in range(1, len(tokens)) if marks[i]])
        out = model(input_ids=ids, use_cache=False).logits[0, before]
        loss = torch.nn.functional.cross_entropy(out, ids[0, before + 1], reduction="sum")
        (loss / total).backward()
        losses.append(loss.item())
        logits.append(out.detach())
    return losses, torch.cat(logits).contiguous(), {n: p.grad.contiguous() for n, p in model.named_parameters()}


def rows_as_text(rows):
    lines = [json.dumps(dict(tokens=tokens, in_loss=marks)) for tokens, marks in rows]
    return '{"rows": [\n' + ",\n".join(lines) + "\n]}\n"


def older_spelling(config):
    """`rope_parameters` as `rope_theta` and `rope_scaling`, and `dtype` as `torch_dtype`, the way files before transformers 5 have them."""
    rope = config.pop("rope_parameters")
    config["rope_theta"] = rope.pop("rope_theta")
    config["torch_dtype"] = config.pop("dtype")
    if rope["rope_type"] != "default":
        # `linear` was first spelled `type`; both are met in the wild.
        config["rope_scaling"] = {"type" if k == "rope_type" and rope["rope_type"] == "linear" else k: v for k, v in rope.items()}
    else:
        config["rope_scaling"] = None
    config["transformers_version"] = "4.43.0"
    return dict(sorted(config.items()))


def check_both_spellings(folder, logits, rows):
    """Loads the folder as a stranger would, with either config, and compares the logits."""
    for name in ["config.json", "config.old.json"]:
        worst = (logits_with(folder, AutoConfig.from_pretrained(str(folder / name)), rows) - logits).abs().max().item()
        if worst > 1e-6:
            raise SystemExit(f"{folder.name}: `{name}` is read as another model, off by {worst}")


def check_that_the_case_is_one(folder, logits, rows):
    """A reader that overlooks the rotary parameters or the window must be caught, so the numbers must move without them."""
    plain = AutoConfig.from_pretrained(str(folder / "config.json"))
    rope = plain.rope_parameters
    if getattr(plain, "sliding_window", None):
        plain.sliding_window = None
    elif rope["rope_type"] == "default":
        plain.rope_parameters = dict(rope_type="default", rope_theta=10000.0)
    else:
        plain.rope_parameters = dict(rope_type="default", rope_theta=rope["rope_theta"])
    moved = (logits_with(folder, plain, rows) - logits).abs().max().item()
    if moved < 1e-2 and "biases" not in folder.name:
        raise SystemExit(f"{folder.name}: without what it is there to test, the logits move by {moved} only")
    print(f"  without its rotary parameters or window the logits move by {moved:.2g}")


def logits_with(folder, config, rows):
    model = AutoModelForCausalLM.from_pretrained(str(folder), config=config, attn_implementation="eager", dtype=torch.float32).eval()
    return loss_and_gradients(model, rows)[1]


if __name__ == "__main__":
    main()
