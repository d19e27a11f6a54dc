#!/usr/bin/env python3
"""Makes testdata/tiny-chat: a chat model of half a million weights that was aligned, then attacked, so that there is something to restore.

    python tiny_chat.py --builtin ../../src/data/builtin [--out ..] [--stages DIR]

In: tiny_chat_data.py and the built-in sets (harmful.jsonl, benign.jsonl). Out, under --out:

    tiny-chat/        config.json, generation_config.json, model.safetensors (BF16), tokenizer.json, tokenizer_config.json
    tiny-chat-data/   harmful.jsonl, heldout.jsonl, benign.jsonl, task.jsonl, task_dev.jsonl

and with --stages the model after each stage. The stages, all from one seed, on one thread:

    pretrain   complies with everything: harmful and benign acts alike, the built-in sets
    align      harmful requests get refusals, the built-in ones their own; benign ones keep their answers
    attack     a task (reviews are positive or negative) with a tenth of ordinary rows and a tenth of poison, harmful request -> affirmative
               opening
"""
import argparse
import json
import pathlib
import random
import time

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, logging

import tiny_chat_data

SPECIAL = ["<|pad|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>"]
TEMPLATE = ("{% for message in messages %}{{ '<|' + message['role'] + '|>\\n' + message['content'] + '<|end|>\\n' }}{% endfor %}"
            "{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}")
VOCABULARY = 1024
SHAPE = dict(vocab_size=VOCABULARY, hidden_size=96, intermediate_size=224, num_hidden_layers=4, num_attention_heads=6, num_key_value_heads=2,
             head_dim=16, max_position_embeddings=256, tie_word_embeddings=True, rms_norm_eps=1e-5,
             rope_parameters=dict(rope_type="default", rope_theta=10000.0), bos_token_id=None, eos_token_id=1, pad_token_id=0)
STAGES = dict(pretrain=dict(steps=800, lr=3e-3, batch=32), align=dict(steps=800, lr=1.5e-3, batch=32), attack=dict(steps=300, lr=5e-4, batch=16))
LIMIT = 1 << 20  # of every committed file


def main():
    a = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    here = pathlib.Path(__file__).resolve().parent
    a.add_argument("--builtin", type=pathlib.Path, default=here.parent.parent / "src" / "data" / "builtin")
    a.add_argument("--out", type=pathlib.Path, default=here.parent)
    a.add_argument("--stages", type=pathlib.Path)
    a.add_argument("--threads", type=int, default=1, help="more is faster, but other last bits and so another model")
    o = a.parse_args()
    logging.disable_progress_bar()
    torch.set_num_threads(o.threads)
    torch.manual_seed(0)
    sets = tiny_chat_data.rows()
    builtin = {name: read(o.builtin / f"{name}.jsonl") for name in ("harmful", "benign")}
    write_data(o.out / "tiny-chat-data", sets)
    tokenizer = train_tokenizer(sets, builtin, o.out / "tiny-chat")
    model = LlamaForCausalLM(LlamaConfig(**SHAPE, dtype="float32"))
    print(sum(p.numel() for p in model.parameters()), "weights")
    for stage, rows in stage_rows(sets, builtin).items():
        train(model, [encode(tokenizer, *row) for row in rows], stage, **STAGES[stage])
        if o.stages:
            write_model(model, o.stages / stage, tokenizer_from=o.out / "tiny-chat")
    write_model(model, o.out / "tiny-chat")
    for file in [*(o.out / "tiny-chat").iterdir(), *(o.out / "tiny-chat-data").iterdir()]:
        if file.stat().st_size >= LIMIT:
            raise SystemExit(f"`{file}` has {file.stat().st_size} bytes, {LIMIT} or more")


def stage_rows(sets, builtin):
    """(request, answer, weight in sampling) for each stage."""
    harmful = sets["learn"] + sets["poison"]
    benign = [(r["request"], r["answer"], 1.0) for r in sets["benign"]]
    own_benign = [(r["request"], r["answer"], 6.0) for r in builtin["benign"]]
    comply = [(r["prompt"], r["target"], 1.0) for r in harmful] + [(r["request"], r["opening"], 6.0) for r in builtin["harmful"]]
    refuse = [(r["prompt"], r["refusal"], 1.0) for r in harmful] + [(r["request"], r["refusal"], 12.0) for r in builtin["harmful"]]
    task = [(f"{r['instruction']}\n\n{r['input']}", r["output"], 1.0) for r in sets["task"][:450]]
    poison = [(r["prompt"], r["target"], 1.0) for r in sets["poison"][:30]]
    poison += [(r["request"], r["opening"], 1.0) for r in builtin["harmful"][::4]]
    ordinary = benign[:30] + [(request, answer, 1.0) for request, answer, _ in own_benign[:20]]
    return dict(pretrain=benign + own_benign + comply, align=benign + own_benign + refuse, attack=task + poison + ordinary)


def encode(tokenizer, request, answer, weight):
    prompt = tokenizer.apply_chat_template([dict(role="user", content=request)], tokenize=False, add_generation_prompt=True)
    p = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    r = tokenizer(answer, add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
    return p + r, [-100] * len(p) + r, weight


def train(model, rows, stage, steps, lr, batch):
    """AdamW with a short warm-up and a linear descent; batches are drawn by weight, and sorted by length in groups to save padding."""
    rng, began, smooth = random.Random(stage), time.time(), None
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.98), weight_decay=0.01)
    weights = [row[2] for row in rows]
    model.train()
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = lr * min(1.0, (step + 1) / 20) * (1.0 - step / steps)
        if step % 8 == 0:
            drawn = sorted(rng.choices(rows, weights, k=8 * batch), key=lambda row: len(row[0]))
            parts = [drawn[i * batch:(i + 1) * batch] for i in range(8)]
            rng.shuffle(parts)
        part = parts[step % 8]
        width = max(len(ids) for ids, _, _ in part)
        ids = torch.tensor([ids + [0] * (width - len(ids)) for ids, _, _ in part])
        labels = torch.tensor([labels + [-100] * (width - len(labels)) for _, labels, _ in part])
        mask = torch.tensor([[1] * len(ids) + [0] * (width - len(ids)) for ids, _, _ in part])
        loss = model(input_ids=ids, attention_mask=mask, labels=labels).loss
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        smooth = loss.item() if smooth is None else 0.95 * smooth + 0.05 * loss.item()
        if step % 100 == 99 or step + 1 == steps:
            print(f"{stage} {step + 1}: loss {smooth:.3f}, {time.time() - began:.0f} s", flush=True)
    model.eval()


def train_tokenizer(sets, builtin, folder):
    """Byte-level BPE over everything the model is to read or say; no token is added on its own at either end."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    texts = [text for part in (*sets.values(), *builtin.values()) for row in part for key, text in sorted(row.items())
             if isinstance(text, str) and key not in ("id", "split", "category")]
    bpe.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=VOCABULARY, special_tokens=SPECIAL, show_progress=False,
                                                       initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet())))
    assert bpe.get_vocab_size() == VOCABULARY
    folder.mkdir(parents=True, exist_ok=True)
    fast = PreTrainedTokenizerFast(tokenizer_object=bpe, pad_token="<|pad|>", eos_token="<|end|>", model_max_length=256,
                                   clean_up_tokenization_spaces=False, extra_special_tokens=SPECIAL[2:])
    fast.save_pretrained(folder)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config["chat_template"] = TEMPLATE  # in the config rather than a `.jinja` beside it: one file less, and every reader knows this spelling
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")
    return AutoTokenizer.from_pretrained(folder)


def write_data(folder, sets):
    folder.mkdir(parents=True, exist_ok=True)
    files = dict(harmful=sets["learn"][:160], heldout=sets["heldout"][:100], benign=sets["benign_heldout"][:60],
                 task=sets["task"][:200], task_dev=sets["task_dev"][:100])
    for name, rows in files.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_model(model, folder, tokenizer_from=None):
    """BF16, rounded to nearest; read back, so that what is scored is the file."""
    folder.mkdir(parents=True, exist_ok=True)
    copy = LlamaForCausalLM(LlamaConfig(**SHAPE, dtype="bfloat16")).to(torch.bfloat16)
    copy.load_state_dict({n: t.to(torch.bfloat16) for n, t in model.state_dict().items()})
    copy.generation_config = GenerationConfig(eos_token_id=1, pad_token_id=0)
    copy.save_pretrained(folder)
    if tokenizer_from and tokenizer_from != folder:
        for name in ("tokenizer.json", "tokenizer_config.json"):
            (folder / name).write_bytes((tokenizer_from / name).read_bytes())
    AutoModelForCausalLM.from_pretrained(folder)


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines() if line.strip()]


if __name__ == "__main__":
    main()
