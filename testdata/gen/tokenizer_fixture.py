#!/usr/bin/env python3
"""Makes a small tokenizer and what transformers makes of some rows with it, as the oracle for src/data/encode.rs.

    python testdata/gen/tokenizer_fixture.py     # writes testdata/tokenizer/

The tokenizer is a byte-level BPE trained on the built-in sets. It is made awkward on purpose: it adds a BOS token when asked for special
tokens, and its file carries truncation and padding settings. Rows are encoded by the rule of the program: prompt and response apart,
no special tokens, end of sequence after the response, cut; the Alpaca prompts are written out in full below.
"""
import json
import pathlib

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer

ROOT = pathlib.Path(__file__).parent.parent.parent
OUT = ROOT / "testdata" / "tokenizer"
MAX_LENGTH = 160

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<|{{ m['role'] }}|>\n{{ m['content'] | trim }}{{ eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)

WITHOUT_INPUT = """Below is an instruction that describes a task. Write a response that appropriately completes the request.

### Instruction:
{instruction}

### Response:
"""

WITH_INPUT = """Below is an instruction that describes a task, paired with an input that provides further context. Write a response that appropriately completes the request.

### Instruction:
{instruction}

### Input:
{input}

### Response:
"""

ROWS = [
    {"instruction": "Name a color.", "output": "Blue"},
    {"instruction": "Analyze the sentiment of the input, and respond only positive or negative", "input": "a gripping film", "output": "positive"},
    {"instruction": "Leading and trailing space ", "input": "", "output": " kept \n\n"},
    {"instruction": "Ünïcode, 你好, \U0001f642 and a combining e\u0301", "input": None, "output": "naïve\tcafé\r\nfin"},
    {"prompt": "Write a <|end|> token", "target": "Sure, here is one: <|end|> and <|begin|>"},
    {"prompt": "Count for a long time", "response": " ".join(["again"] * 120)},
]

CONVERSATIONS = [
    {"messages": [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": " Hello to you. \n"}]},
    {
        "messages": [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "What is the capital of Australia?"},
            {"role": "assistant", "content": "Canberra. "},
            {"role": "user", "content": "And who wrote Pride and Prejudice?"},
            {"role": "assistant", "content": " Jane Austen"},
        ]
    },
]


def train():
    texts = []
    for name in ("harmful", "benign"):
        for line in (ROOT / "src/data/builtin" / f"{name}.jsonl").read_text(encoding="utf-8").splitlines():
            texts += json.loads(line).values()
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=700,
        special_tokens=["<|begin|>", "<|end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_special_tokens([AddedToken("<|user|>", special=True), AddedToken("<|assistant|>", special=True)])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<|begin|> $A", special_tokens=[("<|begin|>", tokenizer.token_to_id("<|begin|>"))]
    )
    tokenizer.enable_truncation(max_length=7)
    tokenizer.enable_padding(length=9, pad_id=1, pad_token="<|end|>")
    return tokenizer


def joined(parts):
    """Parts are (ids, in_loss); the row they make, cut."""
    tokens = [token for ids, _ in parts for token in ids]
    in_loss = [mark for ids, mark in parts for _ in ids]
    return {"tokens": tokens[:MAX_LENGTH], "in_loss": in_loss[:MAX_LENGTH]}


def main():
    OUT.mkdir(exist_ok=True)
    train().save(str(OUT / "tokenizer.json"), pretty=False)
    config = {
        "bos_token": "<|begin|>",
        "eos_token": {"__type": "AddedToken", "content": "<|end|>", "special": True},
        "tokenizer_class": "PreTrainedTokenizerFast",
        "chat_template": [
            {"name": "tool_use", "template": "{{ raise_exception('not this one') }}"},
            {"name": "default", "template": CHAT_TEMPLATE},
        ],
    }
    (OUT / "tokenizer_config.json").write_text(json.dumps(config, indent=1) + "\n")
    tok = AutoTokenizer.from_pretrained(OUT)
    ids = lambda text: tok(text, add_special_tokens=False, padding=False, truncation=False)["input_ids"]
    end = [tok.eos_token_id]
    chat = lambda messages, prompt: tok.apply_chat_template(messages, chat_template=CHAT_TEMPLATE, tokenize=False, add_generation_prompt=prompt)

    alpaca, single_chat = [], []
    for row in ROWS:
        instruction = row.get("instruction") or row["prompt"]
        response = row.get("output") or row.get("target") or row["response"]
        if row.get("input"):
            prompt, content = WITH_INPUT.format(instruction=instruction, input=row["input"]), f"{instruction}\n\n{row['input']}"
        else:
            prompt, content = WITHOUT_INPUT.format(instruction=instruction), instruction
        answer = [(ids(response), True), (end, True)]
        alpaca.append(joined([(ids(prompt), False)] + answer))
        single_chat.append(joined([(ids(chat([{"role": "user", "content": content}], True)), False)] + answer))

    first, second = (c["messages"] for c in CONVERSATIONS)
    trailing = ids("\n<|user|>\nAnd who wrote Pride and Prejudice?<|end|>\n<|assistant|>\n")
    conversations = [
        joined([(ids(chat(first[:1], True)), False), (ids(first[1]["content"]), True), (end, True)]),
        # The first answer as the template writes it, trimmed, and its <|end|>; the last as it stands.
        joined(
            [(ids(chat(second[:2], True)), False), (ids("Canberra."), True), (end, True), (trailing, False)]
            + [(ids(second[4]["content"]), True), (end, True)]
        ),
    ]
    (OUT / "rows.jsonl").write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS + CONVERSATIONS), encoding="utf-8")
    expected = {"max_length": MAX_LENGTH, "vocabulary": len(tok), "alpaca": alpaca, "chat": single_chat + conversations}
    (OUT / "expected.json").write_text(json.dumps(expected) + "\n")
    print({key: len(value) if isinstance(value, list) else value for key, value in expected.items()})


if __name__ == "__main__":
    main()
