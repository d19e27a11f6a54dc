"""llama.cpp's opinion of what the program does with a GGUF file. See llama.sh.

Parts:
  tokenizer  texts become the ids that llama.cpp makes of them
  tokens     the greedy continuations are llama.cpp's
  server     llama.cpp, asked as any server is, says what the program's own decoder says of the same numbers, to chats and to prompts
  evaluation `eval --endpoint` finds of it what `eval` finds of the file, goes on from a journal, and asks nothing that is in it
  copy       a perturbation at strength 0 leaves every byte of the file
  patch      a patch that Q4_1 would lose is refused; kept in Q8_0, the file differs in the patched tensors alone, loads in llama.cpp, and
             still knows the capital of France

llama.cpp rounds activations to 8 bits before it multiplies them with quantized matrices, which moves logits by tenths. So its greedy
continuations of the file itself are only told, and those of the same numbers in F32 are what ours must be.
"""

import argparse
import contextlib
import hashlib
import json
import os
import subprocess
import sys
import tempfile
import urllib.request
from pathlib import Path

import gguf
import xllamacpp

TEXTS = [
    "The capital of France is",
    "Once upon a time, in a land of cats,",
    "def fibonacci(n):\n    if n < 2:\n        return n\n",
    "Water boils at",
    "1, 2, 3, 4,",
]
# Where tokenizers differ, if they do.
ODD_TEXTS = [
    "",
    " leading and trailing ",
    "tabs\tand\n\n\nlines\r\n",
    "digits 1234567890 3.14159",
    "don't you'll WE'VE",
    "naïve café, 日本語のテキスト, Привет, 🤖👩‍🚀",
    "<|im_start|>user\nhi<|im_end|>\n",
    "a" * 300,
]
TOKENS = 24
# Answers of which some come to their end, and some to the limit.
QUESTIONS = [
    "What is the capital of France?",
    "Answer with one word: what color is the sky?",
    "Write a haiku about the sea.",
    "Translate to French: Good morning!",
    "List three fruits.",
]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--program", required=True, type=Path)
    parser.add_argument("--generate", required=True, type=Path)
    parser.add_argument("--ask", required=True, type=Path)
    parser.add_argument("--model", required=True, type=Path)
    parser.add_argument("parts", nargs="*", metavar="PART")
    options = parser.parse_args()
    parts = {"tokenizer": tokenizer, "tokens": tokens, "server": server, "evaluation": evaluation, "copy": copy, "patch": patch}
    unknown = set(options.parts) - set(parts)
    if unknown:
        parser.error(f"no part is called {', '.join(sorted(unknown))}")
    with tempfile.TemporaryDirectory() as work:
        for name in options.parts or parts:
            parts[name](options, Path(work))
            print(f"llama.cpp agrees: {name}")


def tokenizer(options, _work):
    texts = [text for text in TEXTS + ODD_TEXTS if text]
    ours = [line["prompt"] for line in generate(options, texts, 0)]
    with served(options.model) as post:
        for text, found in zip(texts, ours, strict=True):
            body = {"content": text, "add_special": False, "parse_special": True}
            theirs = post("/tokenize", body)["tokens"]
            check(found == theirs, f"{text!r} becomes {found}, and with llama.cpp {theirs}")


def tokens(options, work):
    ours = generate(options, TEXTS, TOKENS)
    with served(options.model) as post:
        for text, line in zip(TEXTS, ours, strict=True):
            theirs = continuation(post, line["prompt"])[0]
            same = agreeing(line["tokens"], theirs)
            print(f"  with 8-bit activations, {same} of {len(line['tokens'])} tokens are the same after {text!r}")
    with served(widened(options, work)) as post:
        for text, line in zip(TEXTS, ours, strict=True):
            theirs, said = continuation(post, line["prompt"])
            same = agreeing(line["tokens"], theirs)
            check(
                line["tokens"] == theirs,
                f"{text!r} goes on differently after {same} tokens: {line['text']!r}, and with llama.cpp {said!r}",
            )


def server(options, work):
    wide = widened(options, work)
    key = "a-key"
    for texts, form in ((QUESTIONS, []), (TEXTS, ["--raw"])):
        words = [*texts, *form, "--max-new-tokens", TOKENS]
        ours = [json.loads(line) for line in run(options.generate, wide, *words).splitlines()]
        with listening(wide, key) as address:
            theirs = [json.loads(line) for line in run(options.ask, address, *words, API_KEY=key).splitlines()]
            refused = subprocess.run([options.ask, address, "a"], capture_output=True, text=True, env={"API_KEY": "another"})
        for text, mine, other in zip(texts, ours, theirs, strict=True):
            check(mine["text"] == other["text"], f"to {text!r} we say {mine['text']!r}, and the server {other['text']!r}")
            ended = len(mine["tokens"]) < TOKENS
            check(other["ended"] == ended, f"to {text!r} we say {len(mine['tokens'])} tokens, and the server's answer {other}")
        print(f"  {sum(line['ended'] for line in theirs)} of {len(texts)} came to their end before {TOKENS} tokens")
        check(refused.returncode != 0 and "status: 401" in refused.stderr, f"another key is accepted, or so it is said: {refused}")
        check("another" not in refused.stderr, f"the key is shown: {refused}")


def evaluation(options, work):
    wide = widened(options, work)
    key = {"OPENAI_API_KEY": "a-key"}
    asked = []
    for name, questions in (("harmful", QUESTIONS), ("harmless", QUESTIONS[:2])):
        rows = work / f"{name}.jsonl"
        rows.write_text("".join(json.dumps({"prompt": question}) + "\n" for question in questions))
        asked += [f"--{name}", rows]
    asked += ["--max-new-tokens", TOKENS, "--json", "--quiet"]
    journal = work / "journal.jsonl"

    def answers(path):
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        return sorted((line["answer"]["text"], line["answer"]["ended"]) for line in lines if "answer" in line)

    def outcomes(told):
        return json.loads(told)["found"]["scores"]["outcomes"]

    ours = outcomes(run(options.program, "eval", wide, *asked, "--journal", work / "ours.jsonl"))
    with listening(wide, key["OPENAI_API_KEY"]) as address:
        served = [options.program, "eval", "--endpoint", address, *asked, "--journal", journal]
        theirs = outcomes(run(*served, **key))
        check(ours == theirs and len(ours) == len(QUESTIONS), f"the file is found to be {ours}, and the server {theirs}")
        whole = answers(journal)
        check(whole == answers(work / "ours.jsonl"), f"the server answers {whole}")
        kept = journal.read_text().splitlines()[:3]
        journal.write_text("\n".join(kept) + "\n")
        check(outcomes(run(*served, **key)) == theirs, "a run that goes on finds something else")
        check(answers(journal) == whole, f"a run that goes on keeps {answers(journal)}, not {whole}")
    # Nobody listens any more.
    check(outcomes(run(*served, **key)) == theirs, "what is in the journal is asked again")


def copy(options, work):
    same = work / "same.gguf"
    run(options.program, "apply", options.model, "--perturbation", perturbation(options, work), "--strength", "0", "-o", same)
    check(digest(same) == digest(options.model), "a perturbation at strength 0 changed the file")


def patch(options, work):
    patched = work / "patched.gguf"
    apply = [options.program, "apply", options.model, "--perturbation", perturbation(options, work), "-o", patched]
    refused = subprocess.run([*map(str, apply), "--quiet"], capture_output=True, text=True)
    check(refused.returncode == 3 and "too coarse" in refused.stderr, f"Q4_1 keeps the patch, or so it is said: {refused}")
    run(*apply, "--patched-type", "q8_0", "--quiet")
    before, after = gguf.GGUFReader(options.model), gguf.GGUFReader(patched)
    check(list(before.fields) == list(after.fields), "the keys of the metadata are others")
    for name, field in before.fields.items():
        # Counts and versions of the header, by names of the reader's own, are among them.
        check(field.types == after.fields[name].types, f"`{name}` has another type")
        check(field.contents() == after.fields[name].contents(), f"`{name}` has another value")
    changed = 0
    for old, new in zip(before.tensors, after.tensors, strict=True):
        check((old.name, *old.shape) == (new.name, *new.shape), f"{old.name} {old.shape} became {new.name} {new.shape}")
        if old.name.endswith(("attn_q.weight", "attn_k.weight", "attn_v.weight")):
            check(new.tensor_type.name == "Q8_0", f"{new.name} is {new.tensor_type.name}")
            changed += 1
        else:
            same = old.tensor_type == new.tensor_type and old.data.tobytes() == new.data.tobytes()
            check(same, f"{old.name} was changed, and is no target")
    check(changed == 90, f"{changed} tensors were changed")
    with served(patched) as post:
        prompt = post("/tokenize", {"content": TEXTS[0], "add_special": False})["tokens"]
        said = continuation(post, prompt)[1]
        check("Paris" in said, f"after the patch, {TEXTS[0]!r} goes on with {said!r}")
        print(f"  after the patch, {TEXTS[0]!r} goes on with {said!r}")


def perturbation(options, work):
    """A perturbation of the model, found once."""
    found = work / "perturbation.safetensors"
    if not found.exists():
        rows = work / "rows.jsonl"
        rows.write_text("".join(DATA.read_text().splitlines(keepends=True)[:8]))
        run(options.program, "optimize", options.model, "--harmful", rows, *SETTINGS, "-o", found)
    return found


# The paper's perturbation at T = 0, of some rows: what it finds is of no use, but of the right kind, and found in seconds.
DATA = Path(__file__).resolve().parents[2] / "testdata/tiny-chat-data/harmful.jsonl"
SETTINGS = ["--method", "panacea", "--steps", "0", "--rho", "0.4", "--max-length", "64", "--quiet"]


def generate(options, texts, count):
    """What our decoder says: for each text its ids, the ids that follow, and their text."""
    words = [options.generate, options.model, *texts, "--raw", "--max-new-tokens", str(count)]
    return [json.loads(line) for line in run(*words).splitlines()]


@contextlib.contextmanager
def listening(model, key=None):
    """llama.cpp with `model`, by its address."""
    settings = xllamacpp.CommonParams()
    settings.model.path = str(model)
    settings.n_ctx = 512
    # Its threads wait for each other by spinning, which takes minutes where other programs run.
    settings.cpuparams.n_threads = 1
    # Keys and values would be kept in F16.
    settings.cache_type_k = settings.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    settings.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    # What it remembers of one prompt would be summed in another order for the next.
    settings.cache_prompt = False
    if key:
        settings.api_keys = [key]
    server = xllamacpp.Server(settings)
    yield server.listening_address
    del server


@contextlib.contextmanager
def served(model):
    """llama.cpp with `model`, as a function from a path and a body to an answer."""
    with listening(model) as address:

        def post(path, body):
            headers = {"Content-Type": "application/json"}
            request = urllib.request.Request(address + path, json.dumps(body).encode(), headers)
            with urllib.request.urlopen(request) as response:
                return json.load(response)

        yield post


def continuation(post, prompt):
    """The ids and the text that llama.cpp continues ids with, greedily."""
    body = {"prompt": prompt, "n_predict": TOKENS, "temperature": 0, "samplers": ["top_k"], "top_k": 1}
    answer = post("/completion", body | {"return_tokens": True, "cache_prompt": False})
    return answer["tokens"], answer["content"]


def widened(options, work):
    """The model's numbers in F32, written once."""
    wide = work / "f32.gguf"
    if not wide.exists():
        widen(options.model, wide)
    return wide


def widen(model, out):
    """Writes `model` with every tensor in F32, by llama.cpp's own Python code."""
    reader = gguf.GGUFReader(model)
    writer = gguf.GGUFWriter(out, reader.fields["general.architecture"].contents())
    for field in reader.fields.values():
        if field.name.startswith("GGUF.") or field.name == "general.architecture":
            continue
        value = gguf.LlamaFileType.ALL_F32 if field.name == "general.file_type" else field.contents()
        kind = field.types[0]
        of = field.types[-1] if kind == gguf.GGUFValueType.ARRAY else None
        writer.add_key_value(field.name, value, kind, sub_type=of)
    for tensor in reader.tensors:
        values = gguf.dequantize(tensor.data, tensor.tensor_type)
        writer.add_tensor(tensor.name, values.reshape([int(side) for side in reversed(tensor.shape)]))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def agreeing(ours, theirs):
    """How many tokens are the same before the first that is not."""
    return next((i for i, (a, b) in enumerate(zip(ours, theirs)) if a != b), min(len(ours), len(theirs)))


def digest(path):
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def run(*words, **variables):
    done = subprocess.run([str(word) for word in words], capture_output=True, text=True, env=os.environ | variables)
    check(done.returncode == 0, f"{words[0].name} fails with exit code {done.returncode}: {done.stderr}")
    return done.stdout


def check(holds, complaint):
    if not holds:
        sys.exit(f"FAILED: {complaint}")


main()
