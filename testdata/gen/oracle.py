#!/usr/bin/env python3
"""Writes testdata/oracle/<case>: tiny random checkpoints of every model family, and what PyTorch says about them.

    python oracle.py [--out ../oracle] [CASE ...]

In: nothing but the tables CASES, OLDER and MATTERS below. Out, for each case, a folder with

    config.json            as transformers 5 writes it (`rope_parameters`, `layer_types`)
    config.old.json        the same model in the spelling that its family's files have on the Hub from before that
    model.safetensors      the weights, F32, under the names that transformers' `save_pretrained` writes
    rows.json              {"rows": [{"tokens": [..], "in_loss": [..]}, ..]}
    expected.json          {"loss", "predicted", "row_losses", "row_predicted"}
    expected.safetensors   "logits" (predicted, vocab) in the order of the rows, then "grad.<weight name>" with the weight's shape,
                           for the projection matrices of attention, feed-forward layers and experts

The loss is the mean, over every marked token but a row's first, of the cross-entropy in nats. Each row runs alone, so nothing here
depends on padding or packing. Attention and experts are transformers' "eager" ones; everything is f32.

Before it is content with a case, the program loads it again with either config, and then once for every line of MATTERS: without that
setting the logits must move, or the case would not catch a reader who overlooks it.
"""
import argparse
import json
import math
import pathlib
import re

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, logging
from transformers.core_model_loading import revert_weight_conversion

VOCABULARY = 97
SIZES = dict(vocab_size=VOCABULARY, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=256,
             initializer_range=0.02, bos_token_id=1, eos_token_id=2, pad_token_id=0, tie_word_embeddings=False)
LLAMA = SIZES | dict(hidden_size=32, intermediate_size=48, hidden_act="silu", rms_norm_eps=1e-5, attention_bias=False, mlp_bias=False)
# A norm's epsilon of 0.03 is no model's, but one that cannot be overlooked.
SMALL = SIZES | dict(hidden_size=24, intermediate_size=20, rms_norm_eps=0.03)
GEMMA = SMALL | dict(hidden_size=16, head_dim=6, rms_norm_eps=0.1, tie_word_embeddings=True)
GEMMA3 = GEMMA | dict(
    num_hidden_layers=3, query_pre_attn_scalar=3, sliding_window=6, hidden_activation="gelu_pytorch_tanh",
    rope_parameters=dict(full_attention=dict(rope_type="linear", rope_theta=50000.0, factor=4.0),
                         sliding_attention=dict(rope_type="default", rope_theta=300.0)))

# Every value that a reader could overlook differs from its default, so that overlooking it changes the numbers.
CASES = {
    "llama-tied": LLAMA | dict(
        model_type="llama", tie_word_embeddings=True, num_hidden_layers=3,
        rope_parameters=dict(rope_type="default", rope_theta=5000.0)),
    "llama3-rope": LLAMA | dict(
        model_type="llama", hidden_size=40, head_dim=16, num_key_value_heads=1, rms_norm_eps=1e-6,
        rope_parameters=dict(rope_type="llama3", rope_theta=50000.0, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
                             original_max_position_embeddings=32)),
    "mistral-window": LLAMA | dict(
        model_type="mistral", sliding_window=6, rope_parameters=dict(rope_type="default", rope_theta=1000.0)),
    "llama-biases": LLAMA | dict(
        model_type="llama", attention_bias=True, mlp_bias=True, num_key_value_heads=4,
        rope_parameters=dict(rope_type="default", rope_theta=10000.0)),
    "llama-linear-rope": LLAMA | dict(
        model_type="llama", rope_parameters=dict(rope_type="linear", rope_theta=10000.0, factor=3.0)),
    "llama-yarn-rope": LLAMA | dict(
        model_type="llama", tie_word_embeddings=True, head_dim=12,
        rope_parameters=dict(rope_type="yarn", rope_theta=10000.0, factor=4.0, beta_fast=32.0, beta_slow=1.0,
                             original_max_position_embeddings=64)),
    "qwen2-window": SMALL | dict(
        model_type="qwen2", num_hidden_layers=3, use_sliding_window=True, sliding_window=5,
        layer_types=["full_attention", "sliding_attention", "sliding_attention"],
        rope_parameters=dict(rope_type="default", rope_theta=700.0)),
    "qwen2-yarn": SMALL | dict(
        model_type="qwen2", hidden_size=32, num_attention_heads=2, num_key_value_heads=1, tie_word_embeddings=True,
        max_position_embeddings=64,
        rope_parameters=dict(rope_type="yarn", rope_theta=3000.0, factor=4.0, original_max_position_embeddings=16)),
    "qwen3": SMALL | dict(
        model_type="qwen3", head_dim=10, tie_word_embeddings=True, rope_parameters=dict(rope_type="default", rope_theta=500.0)),
    "gemma": GEMMA | dict(
        model_type="gemma", num_hidden_layers=3, num_key_value_heads=1, hidden_act="gelu_pytorch_tanh",
        rope_parameters=dict(rope_type="default", rope_theta=500.0)),
    "gemma2": GEMMA | dict(
        model_type="gemma2", num_hidden_layers=3, hidden_activation="gelu_pytorch_tanh", query_pre_attn_scalar=3, sliding_window=6,
        attn_logit_softcapping=1.5, final_logit_softcapping=3.0, rope_parameters=dict(rope_type="default", rope_theta=500.0)),
    "gemma3-text": GEMMA3 | dict(
        model_type="gemma3_text", layer_types=["sliding_attention", "full_attention", "sliding_attention"]),
    "gemma3-multimodal": dict(
        model_type="gemma3", tie_word_embeddings=True, boi_token_index=94, eoi_token_index=95, image_token_index=96,
        mm_tokens_per_image=1,
        text_config=GEMMA3 | dict(layer_types=["sliding_attention", "sliding_attention", "full_attention"]),
        vision_config=dict(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2, image_size=8, patch_size=4,
                           vision_use_head=False)),
    "phi3-window": SMALL | dict(
        model_type="phi3", sliding_window=6, hidden_act="silu", original_max_position_embeddings=256,
        rope_parameters=dict(rope_type="default", rope_theta=500.0, partial_rotary_factor=1.0)),
    # As long as the longest row: none is longer, so the short factors hold for all.
    "phi3-longrope-short": SMALL | dict(
        model_type="phi3", num_attention_heads=3, num_key_value_heads=1, hidden_act="silu", tie_word_embeddings=True,
        original_max_position_embeddings=23,
        rope_parameters=dict(rope_type="longrope", rope_theta=500.0, partial_rotary_factor=0.75, original_max_position_embeddings=23,
                             short_factor=[1.0, 1.7, 2.9], long_factor=[1.3, 4.1, 9.7])),
    # One row is longer by a single token, one by many, two are shorter: each chooses by its own length.
    "phi3-longrope-mixed": SMALL | dict(
        model_type="phi3", num_key_value_heads=4, hidden_act="silu", original_max_position_embeddings=13,
        rope_parameters=dict(rope_type="longrope", rope_theta=500.0, partial_rotary_factor=1.0, original_max_position_embeddings=13,
                             short_factor=[1.1, 1.6, 2.3], long_factor=[1.5, 4.3, 8.9])),
    "olmo2": SMALL | dict(model_type="olmo2", hidden_act="silu", rope_parameters=dict(rope_type="default", rope_theta=500.0)),
    "granite": SMALL | dict(
        model_type="granite", hidden_act="silu", tie_word_embeddings=True, attention_bias=True, mlp_bias=True,
        embedding_multiplier=3.0, attention_multiplier=0.7, residual_multiplier=0.4, logits_scaling=0.6,
        rope_parameters=dict(rope_type="default", rope_theta=500.0)),
    "mixtral": SMALL | dict(
        model_type="mixtral", hidden_size=16, intermediate_size=12, num_local_experts=4, num_experts_per_tok=2, sliding_window=6,
        hidden_act="silu", rope_parameters=dict(rope_type="default", rope_theta=500.0)),
    "qwen3-moe": SMALL | dict(
        model_type="qwen3_moe", hidden_size=16, num_hidden_layers=3, intermediate_size=20, moe_intermediate_size=12, head_dim=6,
        num_experts=4, num_experts_per_tok=2, norm_topk_prob=True, decoder_sparse_step=2, mlp_only_layers=[],
        rope_parameters=dict(rope_type="default", rope_theta=500.0)),
    "qwen3-moe-plain": SMALL | dict(
        model_type="qwen3_moe", hidden_size=16, num_hidden_layers=2, intermediate_size=20, moe_intermediate_size=8, head_dim=6,
        num_experts=5, num_experts_per_tok=2, norm_topk_prob=False, decoder_sparse_step=1, mlp_only_layers=[0],
        tie_word_embeddings=True, rope_parameters=dict(rope_type="default", rope_theta=500.0)),
}

# What `config.old.json` says otherwise than the rules of `older_spelling` would have it. ABSENT is left out, as its family's files do.
ABSENT = object()
GEMMA2_OLD = dict(tie_word_embeddings=ABSENT, hidden_act="gelu_pytorch_tanh", cache_implementation="hybrid")
GEMMA3_OLD = dict(tie_word_embeddings=ABSENT, _sliding_window_pattern=ABSENT, cache_implementation="hybrid")
OLDER = {
    "qwen2-window": dict(max_window_layers=1),
    # A window that is switched off.
    "qwen2-yarn": dict(use_sliding_window=False, sliding_window=4, max_window_layers=1),
    "qwen3": dict(use_sliding_window=False, sliding_window=None, max_window_layers=2, attention_bias=False),
    # `gelu` was written, and the tanh approximation was always meant.
    "gemma": dict(tie_word_embeddings=ABSENT, hidden_act="gelu", hidden_activation=None),
    "gemma2": GEMMA2_OLD | dict(sliding_window_size=6),
    "gemma3-text": GEMMA3_OLD | dict(sliding_window_pattern=2),
    "gemma3-multimodal": GEMMA3_OLD | dict(sliding_window_pattern=3),
    "phi3-window": dict(attention_bias=False),
    "phi3-longrope-short": dict(attention_bias=False),
    "phi3-longrope-mixed": dict(attention_bias=False),
    "qwen3-moe": dict(max_window_layers=3, num_local_experts=ABSENT, num_experts=4),
    "qwen3-moe-plain": dict(max_window_layers=2, num_local_experts=ABSENT, num_experts=5),
}
ROPE_TYPE_SPELLED_TYPE = ["llama-linear-rope", "qwen2-yarn", "phi3-longrope-short", "phi3-longrope-mixed"]

# What each case is there for: a setting (its path in the config) and its neutral value, or the end of a weight's name and a function.
EPSILON = {"rms_norm_eps": 1e-6}
THETA = {"rope_parameters.rope_theta": 10000.0}
ALL_FULL = {"layer_types": ["full_attention"] * 3}
NO_BIASES = (".bias", torch.zeros_like)
NO_PLUS_ONE = ("norm.weight", lambda w: w - 1)
NO_Q_NORM, NO_K_NORM = ("q_norm.weight", torch.ones_like), ("k_norm.weight", torch.ones_like)
LLAMA_MATTERS = {"epsilon": EPSILON, "theta": THETA}
EXPERTS_MATTER = LLAMA_MATTERS | {"more than one expert": {"num_experts_per_tok": 1}, "the router": (".mlp.gate.weight", torch.zeros_like)}
GEMMA_MATTERS = LLAMA_MATTERS | {"the 1 added to a norm's weight": NO_PLUS_ONE, "the embedding's scale": ("embed_scale", torch.ones_like)}
GELU_BY_TANH = "the tanh in gelu"
GEMMA2_MATTERS = {"the window": ALL_FULL, "layers without it": {"layer_types": ["sliding_attention"] * 3},
                  "the attention's scale": {"query_pre_attn_scalar": 6}, "gelu": {"hidden_activation": "silu"},
                  GELU_BY_TANH: {"hidden_activation": "gelu"}, "norms behind layers": ("post_feedforward_layernorm.weight", torch.zeros_like)}
GEMMA3_MATTERS = GEMMA_MATTERS | GEMMA2_MATTERS | {
    "theta": {"rope_parameters.full_attention.rope_theta": 300.0},
    "the local theta": {"rope_parameters.sliding_attention.rope_theta": 50000.0},
    "global scaling": {"rope_parameters.full_attention.factor": 1.0},
    "that scaling is only global": {"rope_parameters.sliding_attention": dict(rope_type="linear", rope_theta=300.0, factor=4.0)},
    "q_norm": ("q_norm.weight", torch.zeros_like), "k_norm": ("k_norm.weight", torch.zeros_like)}
def longrope_factor(trained_on):
    return math.sqrt(1 + math.log(SIZES["max_position_embeddings"] / trained_on) / math.log(trained_on))


LONGROPE_MATTERS = LLAMA_MATTERS | {"its factor on cosines and sines": {"rope_parameters.attention_factor": 1.0}}
PLAIN_ROPE = {"rope_parameters.rope_type": "default"}
MATTERS = {
    "llama-tied": {"theta": THETA},
    "llama3-rope": {"rope scaling": PLAIN_ROPE},
    "mistral-window": {"the window": {"sliding_window": None}},
    "llama-biases": {"biases": NO_BIASES},
    "llama-linear-rope": {"rope scaling": PLAIN_ROPE},
    "llama-yarn-rope": {"rope scaling": PLAIN_ROPE},
    "qwen2-window": LLAMA_MATTERS | {
        "biases": NO_BIASES, "the window": ALL_FULL, "layers without it": {"layer_types": ["sliding_attention"] * 3}},
    "qwen2-yarn": LLAMA_MATTERS | {
        "biases": NO_BIASES, "rope scaling": PLAIN_ROPE, "yarn's factor on cosines and sines": {"rope_parameters.attention_factor": 1.0},
        "the length it was trained on": {"rope_parameters.original_max_position_embeddings": 64}},
    "qwen3": LLAMA_MATTERS | {"q_norm": NO_Q_NORM, "k_norm": NO_K_NORM},
    "gemma": GEMMA_MATTERS | {"gelu": {"hidden_act": "silu"}, GELU_BY_TANH: {"hidden_act": "gelu"}},
    "gemma2": GEMMA_MATTERS | GEMMA2_MATTERS | {
        "capped attention": {"attn_logit_softcapping": None}, "capped logits": {"final_logit_softcapping": None}},
    "gemma3-text": GEMMA3_MATTERS,
    "gemma3-multimodal": GEMMA3_MATTERS,
    "phi3-window": LLAMA_MATTERS | {"the window": {"sliding_window": None}},
    "phi3-longrope-short": LONGROPE_MATTERS | {
        "the short factors": {"rope_parameters.short_factor": [1.0, 1.0, 1.0]},
        "that a row of 23 is not long": {"original_max_position_embeddings": 22, "rope_parameters.attention_factor": longrope_factor(23)},
        "the partial rotation": {"rope_parameters.partial_rotary_factor": 1.0, "rope_parameters.short_factor": [1.0, 1.7, 2.9, 2.9],
                                 "rope_parameters.long_factor": [1.0, 1.0, 1.0, 1.0]}},
    "phi3-longrope-mixed": LONGROPE_MATTERS | {
        "the short factors": {"rope_parameters.short_factor": [1.5, 4.3, 8.9]},
        "the long factors": {"rope_parameters.long_factor": [1.1, 1.6, 2.3]},
        "that a row of 14 is long": {"original_max_position_embeddings": 14, "rope_parameters.attention_factor": longrope_factor(13)}},
    "olmo2": LLAMA_MATTERS | {"q_norm": NO_Q_NORM, "k_norm": NO_K_NORM,
                              "norms behind layers": ("post_feedforward_layernorm.weight", torch.ones_like)},
    "granite": LLAMA_MATTERS | {
        "biases": NO_BIASES, "the embedding's scale": {"embedding_multiplier": 1.0}, "the attention's scale": {"attention_multiplier": 6**-0.5},
        "the residuals' scale": {"residual_multiplier": 1.0}, "the logits' scale": {"logits_scaling": 1.0}},
    "mixtral": EXPERTS_MATTER | {"the window": {"sliding_window": None}},
    "qwen3-moe": EXPERTS_MATTER | {"q_norm": NO_Q_NORM, "k_norm": NO_K_NORM, "weights that sum to 1": {"norm_topk_prob": False}},
    "qwen3-moe-plain": EXPERTS_MATTER | {"q_norm": NO_Q_NORM, "k_norm": NO_K_NORM, "weights that do not": {"norm_topk_prob": True}},
}
# Nothing less than this counts as the logits having moved: the norm of the difference over their norm. Readers are held to 1e-4.
LEAST_MOVE = 1e-2
LEAST_MOVE_OF_GELU = 1.5e-4  # its two forms differ by 5e-4 at most
# Least distance between the last expert that is chosen and the first that is not, in the router's logits.
LEAST_MARGIN = 0.04
# Every projection of attention, feed-forward layer and expert, alone or fused, under the names of all families.
PROJECTION = re.compile(r"\.([qkvo]|qkv|gate|up|down|gate_up)_proj\.weight$|\.w[123]\.weight$")
ROW_LENGTHS = [9, 2, 23, 14]


def main():
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("--out", type=pathlib.Path, default=pathlib.Path(__file__).resolve().parent.parent / "oracle")
    arguments.add_argument("cases", nargs="*", default=list(CASES))
    options = arguments.parse_args()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    torch.set_num_threads(1)  # the order of summation, and with it the last bit, depends on the number of threads
    for case in options.cases:
        folder = options.out / case
        folder.mkdir(parents=True, exist_ok=True)
        write_case(folder, case)


def write_case(folder, case):
    model, rows = model_and_rows(case)
    losses, logits, gradients = loss_and_gradients(model, rows)
    write_checkpoint(folder, case, model)
    (folder / "rows.json").write_text(rows_as_text(rows))
    predicted = [sum(marks[1:]) for _, marks in rows]
    (folder / "expected.json").write_text(json.dumps(dict(
        loss=sum(losses) / sum(predicted), predicted=sum(predicted),
        row_losses=[loss / max(n, 1) for loss, n in zip(losses, predicted)], row_predicted=predicted), indent=2) + "\n")
    save_file({"logits": logits} | {f"grad.{n}": g for n, g in sorted(gradients.items())}, str(folder / "expected.safetensors"))
    print(f"{case}: loss {sum(losses) / sum(predicted):.6f}, {expert_margin(model, rows)}")
    check_both_spellings(folder, logits, rows)
    check_that_the_case_is_one(folder, MATTERS[case], logits, rows)
    check_that_gradients_can_be_compared(folder, gradients)


def model_and_rows(case, vocabulary=VOCABULARY):
    """The case's model with random weights, and its rows. With experts: the first draw that leaves no choice of them in doubt."""
    settings = dict(CASES[case])
    for sizes in [settings, settings.get("text_config", {})]:
        sizes.update({"vocab_size": vocabulary} if "vocab_size" in sizes else {})
    config = AutoConfig.for_model(settings.pop("model_type"), **settings, dtype="float32")
    config._experts_implementation = "eager"
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager", dtype=torch.float32).eval()
    for draw in range(10_000):
        generator = torch.Generator().manual_seed(list(CASES).index(case) + 1 + 1000 * draw)
        randomize(model, generator)
        rows = random_rows(generator, getattr(config, "boi_token_index", vocabulary))
        if expert_margin(model, rows) > LEAST_MARGIN:
            return model, rows
    raise SystemExit(f"{case}: no draw of the weights keeps its experts {LEAST_MARGIN} apart")


def write_checkpoint(folder, case, model):
    """The configs and the weights, under the names and in the form that transformers gives them on disk."""
    model.save_pretrained(folder)
    (folder / "generation_config.json").unlink(missing_ok=True)
    # The weights again, in order of name.
    save_file(dict(sorted(load_file(folder / "model.safetensors").items())), str(folder / "model.safetensors"), {"format": "pt"})
    older = older_spelling(case, json.loads((folder / "config.json").read_text()))
    (folder / "config.old.json").write_text(json.dumps(older, indent=2) + "\n")


def randomize(model, generator):
    """Weights large enough that attention is far from uniform; norms and biases away from 1 (or what is added to it from 0) and 0."""
    gemma = model.config.model_type.startswith("gemma")
    with torch.no_grad():
        for name, p in sorted(model.named_parameters()):
            noise = torch.randn(p.shape, generator=generator)
            if name.endswith("norm.weight"):
                p.copy_(0.3 * noise if gemma else 1.0 + 0.2 * noise)
            elif p.dim() == 1:
                p.copy_(0.3 * noise)
            elif "embed_tokens" in name:
                p.copy_((0.3 if gemma else 0.5) * noise)
            else:
                p.copy_(noise * (3.0 if name.endswith(".mlp.gate.weight") else 1.4) / p.shape[-1] ** 0.5)


def random_rows(generator, vocabulary):
    """(tokens, marks): a response at the end of most rows, and in the last one a mask with holes that also marks the first token."""
    rows = []
    for i, length in enumerate(ROW_LENGTHS):
        tokens = torch.randint(3, vocabulary, (length,), generator=generator).tolist()
        prompt = max(1, length // 2)
        marks = [j >= prompt for j in range(length)]
        if i + 1 == len(ROW_LENGTHS):
            marks = [j % 3 != 1 for j in range(length)]
        rows.append((tokens, marks))
    return rows


def loss_and_gradients(model, rows):
    """Per row the summed loss, all predicted logits, and the gradient of the mean loss over all rows, by the weights' names on disk."""
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
    in_memory = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    on_disk = revert_weight_conversion(model, in_memory)
    return losses, torch.cat(logits).contiguous(), {n: g.contiguous() for n, g in on_disk.items() if PROJECTION.search(n)}


def expert_margin(model, rows):
    """How far the closest choice of experts is from another one; 0 where an expert is never chosen, infinite without experts."""
    margin, chosen = float("inf"), {}

    def look(router, _, out):
        nonlocal margin
        logits, _, indices = out
        largest = logits.sort(dim=-1, descending=True).values
        margin = min(margin, (largest[:, router.top_k - 1] - largest[:, router.top_k]).min().item())
        chosen.setdefault(router, set()).update(indices.unique().tolist())

    routers = [module for module in model.modules() if type(module).__name__.endswith("TopKRouter")]
    hooks = [router.register_forward_hook(look) for router in routers]
    with torch.no_grad():
        for tokens, _ in rows if routers else []:
            model(input_ids=torch.tensor([tokens]), use_cache=False)
    for hook in hooks:
        hook.remove()
    return margin if all(len(chosen[router]) == router.num_experts for router in routers) else 0.0


def rows_as_text(rows):
    lines = [json.dumps(dict(tokens=tokens, in_loss=marks)) for tokens, marks in rows]
    return '{"rows": [\n' + ",\n".join(lines) + "\n]}\n"


def older_spelling(case, config):
    """The way files before transformers 5 have it: `rope_theta` and `rope_scaling` at the top level, `torch_dtype`, no `layer_types`."""
    text = config.get("text_config", config)
    config["torch_dtype"] = config.pop("dtype")
    config["transformers_version"] = "4.43.0"
    if text is not config:
        text.pop("dtype", None)
    text.pop("layer_types", None)
    rope = text.pop("rope_parameters")
    if "full_attention" in rope:
        text["rope_local_base_freq"] = rope["sliding_attention"]["rope_theta"]
        rope = rope["full_attention"]
    text["rope_theta"] = rope.pop("rope_theta")
    if "original_max_position_embeddings" in text:  # phi3, where it was never a part of the scaling
        rope.pop("original_max_position_embeddings", None)
        text["partial_rotary_factor"] = rope.pop("partial_rotary_factor")
    if rope["rope_type"] != "default":
        # `rope_type` was first spelled `type`; both are met in the wild.
        text["rope_scaling"] = {"type" if k == "rope_type" and case in ROPE_TYPE_SPELLED_TYPE else k: v for k, v in rope.items()}
        if case == "phi3-longrope-short":
            text["rope_scaling"]["type"] = "su"  # its first name
    else:
        text["rope_scaling"] = None
    for key, value in OLDER.get(case, {}).items():
        text.pop(key, None)
        text.update({key: value} if value is not ABSENT else {})
    return {key: dict(sorted(value.items())) if value is text else value for key, value in sorted(config.items())}


def check_both_spellings(folder, logits, rows):
    """Loads the folder as a stranger would, with either config, and compares the logits."""
    for name in ["config.json", "config.old.json"]:
        settings = json.loads((folder / name).read_text())
        if (settings.get("rope_scaling") or {}).get("type") == "su":
            settings["rope_scaling"]["type"] = "longrope"  # what transformers did with it until 5
        model = loaded(folder, AutoConfig.for_model(settings.pop("model_type"), **settings))
        worst = (loss_and_gradients(model, rows)[1] - logits).abs().max().item()
        if worst > 1e-6:
            raise SystemExit(f"{folder.name}: `{name}` is read as another model, off by {worst}")


def check_that_the_case_is_one(folder, matters, logits, rows):
    """A reader that overlooks a setting must be caught, so the numbers must move without it."""
    for what, change in matters.items():
        config = AutoConfig.from_pretrained(str(folder / "config.json"))
        if isinstance(change, dict):
            for path, value in change.items():
                put(config.get_text_config(), path.split("."), value)
        model = loaded(folder, config)
        if isinstance(change, tuple):
            with torch.no_grad():
                for name, value in [*model.named_parameters(), *model.named_buffers()]:
                    if name.endswith(change[0]):
                        value.copy_(change[1](value))
        moved = ((loss_and_gradients(model, rows)[1] - logits).norm() / logits.norm()).item()
        if moved < (LEAST_MOVE_OF_GELU if what == GELU_BY_TANH else LEAST_MOVE):
            raise SystemExit(f"{folder.name}: without {what} the logits move by {moved} only")
        print(f"  without {what} the logits move by {moved:.2g}")


def check_that_gradients_can_be_compared(folder, gradients):
    """A gradient of (nearly) nothing has no relative error."""
    name, least = min(((n, g.norm().item()) for n, g in gradients.items()), key=lambda pair: pair[1])
    if least < 1e-4:
        raise SystemExit(f"{folder.name}: the gradient of `{name}` has a norm of {least} only")


def put(config, path, value):
    for key in path[:-1]:
        config = config[key] if isinstance(config, dict) else getattr(config, key)
    if isinstance(config, dict):
        config[path[-1]] = value
    else:
        setattr(config, path[-1], value)


def loaded(folder, config):
    config._experts_implementation = "eager"
    return AutoModelForCausalLM.from_pretrained(str(folder), config=config, attn_implementation="eager", dtype=torch.float32).eval()


if __name__ == "__main__":
    main()
