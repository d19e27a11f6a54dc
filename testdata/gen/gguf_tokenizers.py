#!/usr/bin/env python3
"""Makes two small tokenizers, the GGUF files that llama.cpp's converter makes of them, and the ids that llama.cpp gives texts with those.

    python testdata/gen/gguf_tokenizers.py LLAMA_CPP     # writes testdata/gguf-tokenizers/

LLAMA_CPP is a checkout of llama.cpp (that of llama-cpp-python 0.3.36 was used). Beside requirements.txt it takes sentencepiece 0.2.3 and
xllamacpp 2026.10.11549. Both tokenizers are byte-pair encodings trained on the texts below, uncut, so that nearly every
place where a text is cut or not shows in the ids: `bytes` merges bytes, `pieces` is a SentencePiece model.
"""
import json
import pathlib
import runpy
import struct
import sys
import tempfile

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

sys.dont_write_bytecode = True
OUT = pathlib.Path(__file__).parent.parent / "gguf-tokenizers"

TEXTS = [
    "",
    "Hello, world! How's it going? We've, you'll, SHE'D, THEY'RE, 'twas.",
    "naïve façade, Größe, ÉCOLE, Привет мир КамелКейс, Γειά ΣΟΥ, e\u0301a\u0300 n\u0303",
    "今天天气很好，我们去公园。吾輩は猫である カタカナ 안녕하세요",
    "नमस्ते दुनिया १२३ สวัสดีชาวโลก កាន់តែពិសេស ٠١٢٣٤ السَّلامُ",
    "0 1 12 123 1234 12345 123456 1234567 3.14159 1,000,000 1e-5 0x1F ½ ² Ⅷ",
    " a  b   c    d     e      f        ",
    "line\nline\n\nline\n\n\n\tindent\r\n\r\n  \n \t \n",
    "fn main() { let x: Vec<u32> = vec![1, 22, 333]; println!(\"{:?}\", x); }\n",
    "def f(a, *b):\n    if a >= 10 and b != []:\n        return {k: v for k, v in b}\n",
    "!!!!???? ------ ====== '''''' ``` \"\"\" ...... ((([[[ $$$ ^^^ ~~~ ||| <<>> @@ ## %% && ** ++ __ // \\\\",
    "😀 👨‍👩‍👧 🏳️‍🌈 👍🏽 🇩🇪 ❤️ ∀x∈ℝ: ∑xᵢ² ≥ 0 ⇒ √2 ≈ 1.414 ± ∞ €5",
    "<|user|>\nHi <|end|>  \n<|assistant|>\n <|end|><|end|>x<|end|",
    "<s>a</s> <s> b<unk></s>\n<tool>  <tool>x  @  <0x0A> <0x41> [PAD3]",
    "a\u00a0b\u2003c\u3000d\u0085e\u200bf\u2028g \ufffd \U0010ffff \U0001f999 \u0378",
    "▁ ▁▁ a▁b ▁word Ġ Ċ Ġword haha hahaha aaaaaaa ====== xxxXXX",
    "the the the and and ing tion of the in the   the  and\n\nthe\n\nand",
    "I want 3 apples by 2024-07-26T12:00:00Z, user@example.org/a?b=c&d=e#f",
]
TEXTS += [f"x{' ' * n}y{chr(10) * n}{'=' * n}" for n in (1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 33)]

# One for each way of cutting text that is known.
PRE = ["default", "llama-bpe", "dbrx", "qwen2", "smollm", "gpt-2", "tekken", "gpt-4o", "falcon"]

CONFIG = {
    "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "num_key_value_heads": 1,
    "max_position_embeddings": 32, "rms_norm_eps": 1e-5, "architectures": ["LlamaForCausalLM"], "model_type": "llama",
}


def token(text, special=True):
    return AddedToken(text, special=special, normalized=False)


def write(folder, name, content):
    text = content if isinstance(content, str) else json.dumps(content, ensure_ascii=False)
    (folder / name).write_text(text + "\n")


def bytes_folder():
    folder = OUT / "bytes"
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=900, min_frequency=1, max_token_length=12, show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), special_tokens=[token("<|begin|>"), token("<|end|>")],
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    tokenizer.add_tokens([token("<|user|>"), token("<|assistant|>"), token("<tool>", special=False)])
    begin = ("<|begin|>", tokenizer.token_to_id("<|begin|>"))
    tokenizer.post_processor = processors.Sequence([
        processors.ByteLevel(trim_offsets=False),
        processors.TemplateProcessing(single="<|begin|> $A", pair="<|begin|> $A <|begin|> $B", special_tokens=[begin]),
    ])
    tokenizer.save(str(folder / "tokenizer.json"), pretty=False)
    write(folder, "tokenizer_config.json", {
        "tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<|begin|>", "eos_token": "<|end|>", "pad_token": "<|end|>",
        "chat_template": [{"name": "default", "template": "{{ bos_token }}x"}, {"name": "tool-use", "template": "y"}],
    })
    write(folder, "config.json", {**CONFIG, "vocab_size": tokenizer.get_vocab_size() + 3, "eos_token_id": 1})
    return folder


def varint(number):
    low, more = number & 127, number >> 7
    return bytes([low | 128]) + varint(more) if more else bytes([low])


def field(number, content):
    if isinstance(content, float):
        return varint(number << 3 | 5) + struct.pack("<f", content)
    if isinstance(content, int):
        return varint(number << 3) + varint(content)
    return varint(number << 3 | 2) + varint(len(content)) + content


def pieces_folder():
    """A `tokenizer.model` written field by field: pieces are those that merges make, sooner made pieces with the higher scores."""
    folder = OUT / "pieces"
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.train_from_iterator(TEXTS, trainers.BpeTrainer(vocab_size=900, min_frequency=1, max_token_length=12, show_progress=False))
    trained = json.loads(tokenizer.to_str())["model"]
    ranks = {}
    for left, right in trained["merges"]:
        ranks.setdefault(left + right, len(ranks))
    added = [("<|endoftext|>", True), ("<|user|>", True), ("<|end|>", True), ("<tool>", False), ("▁▁@", False), ("<|assistant|>", False)]
    # The rarest characters are left out, so that there is something to fall back to bytes for.
    letters = [piece for piece in trained["vocab"] if len(piece) == 1 and (ord(piece) < 0x2500 or piece == "▁")]
    pieces = [("<unk>", 0.0, 2), ("<s>", 0.0, 3), ("</s>", 0.0, 3)]
    pieces += [(f"<0x{byte:02X}>", 0.0, 6) for byte in range(256)]
    taken = {text for text, *_ in [*pieces, *added]}
    made = [piece for piece in sorted(ranks, key=ranks.get) if piece not in taken and all(letter in letters for letter in piece)]
    pieces += [(piece, -float(ranks[piece]), 1) for piece in made]
    pieces += [(letter, -float(len(ranks) + i), 1) for i, letter in enumerate(letters)]
    model = b"".join(field(1, field(1, text.encode()) + field(2, score) + field(3, kind)) for text, score, kind in pieces)
    # TrainerSpec: BPE, byte fallback; NormalizerSpec: as it stands, no space before a text.
    model += field(2, field(3, 2) + field(35, 1)) + field(3, field(1, b"identity") + field(3, 0) + field(4, 0))
    (folder / "tokenizer.model").write_bytes(model)
    named = [*enumerate([("<unk>", True), ("<s>", True), ("</s>", True)]), *enumerate(added, len(pieces))]
    write(folder, "tokenizer_config.json", {
        "tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": {"content": "</s>", "__type": "AddedToken"},
        "unk_token": "<unk>", "add_bos_token": True, "add_eos_token": False, "chat_template": "{{ bos_token }}x",
        "added_tokens_decoder": {str(i): {"content": text, "special": special} for i, (text, special) in named},
    })
    write(folder, "config.json", {**CONFIG, "vocab_size": len(pieces) + len(added) + 2, "bos_token_id": 1, "eos_token_id": 2})
    return folder


def convert(llama_cpp, folder):
    """Runs llama.cpp's converter, in which a tokenizer that is none of the published ones counts as `gpt-2`."""
    sys.path[:0] = [str(llama_cpp), str(llama_cpp / "gguf-py")]
    from conversion.base import TextModel

    TextModel.get_vocab_base_pre = lambda self, tokenizer: "gpt-2"
    gguf = folder.with_suffix(".gguf")
    sys.argv = ["convert_hf_to_gguf.py", str(folder), "--vocab-only", "--outfile", str(gguf)]
    runpy.run_path(str(llama_cpp / sys.argv[0]), run_name="__main__")
    return gguf


def variants(gguf):
    """The file itself, and with other values of the keys that decide about ids: name, key, value."""
    if gguf.stem == "bytes":
        return [(pre, "tokenizer.ggml.pre", pre) for pre in PRE]
    return [
        ("space-prefix", "tokenizer.ggml.add_space_prefix", True),
        ("no-space-prefix", "tokenizer.ggml.add_space_prefix", False),
        ("phi-3", "general.name", "Phi-3 mini"),
    ]


def with_value(gguf, key, value, out):
    from gguf import GGUFReader, GGUFValueType, GGUFWriter

    fields = {name: field for name, field in GGUFReader(gguf).fields.items() if not name.startswith("GGUF.")}
    writer = GGUFWriter(out, "llama")
    for name, found in fields.items():
        inner = found.types[1] if len(found.types) > 1 else None
        writer.add_key_value(name, found.contents(), found.types[0], inner)
    writer.add_key_value(key, value, GGUFValueType.get_type(value))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()


def main():
    if len(sys.argv) != 2:
        raise SystemExit(__doc__)
    llama_cpp = pathlib.Path(sys.argv[1]).resolve()
    expected = {"texts": TEXTS, "ids": {}}
    from llama_cpp import tokenize

    for folder in (bytes_folder(), pieces_folder()):
        gguf = convert(llama_cpp, folder)
        cases = expected["ids"][gguf.stem] = []
        for name, key, value in variants(gguf):
            with tempfile.NamedTemporaryFile(suffix=".gguf") as changed:
                with_value(gguf, key, value, changed.name)
                cases.append({"case": name, "key": key, "value": value, "ids": tokenize(changed.name, TEXTS)})
    lines = [json.dumps(case) for cases in expected["ids"].values() for case in cases]
    print(f"{len(lines)} cases, {len(set(lines))} of them different")
    (OUT / "expected.json").write_text(json.dumps(expected, ensure_ascii=True) + "\n")


if __name__ == "__main__":
    main()
