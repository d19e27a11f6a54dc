#!/usr/bin/env python3
"""How fast bytes move: `apply`, `verify` and `sign` on a checkpoint of gigabytes, beside a plain copy, OpenSSL and other programs.

    cargo build --release && python3 benches/bytes.py --binary target/release/panacea-patch

Needs `cp`, `sync` (coreutils 8.24 or later, which syncs the files it is given) and `openssl`. Two more peers are run where an interpreter
that has them is given, and are said to be missing where it is not:

    --model-signing PYTHON    with `pip install model-signing pyopenssl`, for the figures of signing
    --torch PYTHON            with `pip install torch transformers`, for `torch_apply.py` beside this file

In the folder --scratch, emptied at the end, it makes a Llama of --gigabytes BF16 (finite pseudo-random values) as one file and again as
--shards shards, a perturbation (`optimize --method random`, which needs no model), and keys. Room needed: six times the checkpoint.

Contestants take turns, and who begins alternates. Before each, untimed, its source is read, so that it is in the page cache (the caches
are never dropped: that needs root), what others left is removed, and the disk is waited for. Timed is the whole process, from start to exit;
`apply` flushes its output to the disk before it exits, and the copy's `sync` does the same. Other work on the machine or disk shows as spread.

Memory is RssAnon of /proc/PID/status, sampled every 2 ms: the pages that a process holds for itself. The kernel's count of all resident
pages, ru_maxrss, stands beside it, but is no measure of need for a program that maps its input: it includes pages of the page cache, which
the kernel takes back whenever it wants; and it is never less than this script's own. (A process that reads its input through a buffer has the same pages in the same cache, uncounted.)

Out: a table on stderr and one JSON object on stdout. A ratio is ours / theirs, of medians; `pairs` are the ratios run by run. Exit code 1 when
a bar is missed.
"""
import argparse
import json
import os
import pathlib
import platform
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time

PEER = pathlib.Path(__file__).resolve().parent / "torch_apply.py"
MIB = 1 << 20


def main():
    a = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    a.add_argument("--binary", required=True)
    a.add_argument("--scratch", help="an existing folder on the disk to measure [default: a temporary one]")
    a.add_argument("--gigabytes", type=float, default=4.2, help="of weights, about, in 10^9 bytes")
    a.add_argument("--shards", type=int, default=4)
    a.add_argument("--runs", type=int, default=5)
    a.add_argument("--targets", help="of the perturbation [default: the program's]")
    a.add_argument("--only", help="only figures whose name contains this")
    a.add_argument("--model-signing", metavar="PYTHON")
    a.add_argument("--torch", metavar="PYTHON")
    o = a.parse_args()
    with tempfile.TemporaryDirectory(prefix="bytes-", dir=o.scratch) as scratch:
        bench = Bench(o, pathlib.Path(scratch))
        bench.prepare()
        bench.measure()
    result = dict(machine=machine(), settings={k: v for k, v in vars(o).items() if k not in ("scratch", "binary", "model_signing", "torch")},
                  bytes=bench.sizes, floors=bench.floors(), figures=bench.figures, not_run=bench.not_run)
    table(result)
    print(json.dumps(result))
    sys.exit(any(it.get("met") is False for it in result["figures"].values()))


class Bench:
    def __init__(self, options, scratch):
        self.o, self.scratch = options, scratch
        self.binary = str(pathlib.Path(options.binary).resolve())
        self.one, self.many, self.delta = scratch / "one", scratch / "many", scratch / "delta.safetensors"
        self.out, self.sizes, self.figures, self.not_run = scratch / "out", {}, {}, []

    def prepare(self):
        say(f"making a checkpoint of {self.o.gigabytes} GB in {self.scratch}")
        tensors = llama(self.o.gigabytes)
        checkpoint(self.one, tensors, 1)
        checkpoint(self.many, tensors, self.o.shards)
        self.largest = max(2 * rows * columns for _, rows, columns in tensors)
        self.sizes = dict(weights=size(self.one), largest_tensor=self.largest)
        targets = ["--targets", self.o.targets] if self.o.targets else []
        self.program("optimize", self.one, "--method", "random", "--rho", 1, "--output", self.delta, *targets)
        self.sizes["perturbation"] = size(self.delta)
        self.program("keygen", self.scratch / "key")
        # What is verified: an output with its manifest and signature.
        for name in ("one", "many"):
            self.program("apply", self.scratch / name, "--perturbation", self.delta, "-o", self.scratch / f"signed-{name}", "--sign-key", self.key)
        os.sync()

    key = property(lambda self: self.scratch / "key.pem")
    public = property(lambda self: self.scratch / "key.pub.pem")

    def program(self, *arguments):
        subprocess.run([self.binary, *map(str, arguments), "--quiet"], check=True, stdout=subprocess.DEVNULL)

    def measure(self):
        for name, source in (("one file", self.one), (f"{self.o.shards} shards", self.many)):
            ours = [self.binary, "apply", source, "--perturbation", self.delta, "-o", self.out, "--quiet"]
            copied = [self.out / file.name for file in weights(source)]
            theirs = dict(cp=["cp", "-r", source, self.out], sync=["sync", *copied], sha256=["openssl", "dgst", "-sha256", *copied])
            self.figure(f"apply, {name}", [source, self.delta], {"ours": dict(ours=ours), "cp; sync; openssl": theirs}, bar=1.0,
                        memory=3 * self.largest + 64 * MIB)
        for name, source, bar in (("one file", "signed-one", 1.1), (f"{self.o.shards} shards", "signed-many", 0.6)):
            source = self.scratch / source
            ours = [self.binary, "verify", source, "--key", self.public, "--quiet"]
            theirs = ["openssl", "dgst", "-sha256", *weights(source)]
            self.figure(f"verify, {name}", [source], {"ours": dict(ours=ours), "openssl": dict(sha256=theirs)}, bar=bar)
        self.against_model_signing()
        self.against_torch()

    def against_model_signing(self):
        if not (python := self.o.model_signing):
            return self.not_run.append("model_signing: no --model-signing PYTHON was given")
        theirs = [python, "-m", "model_signing"]
        for name in ("one", "many"):
            source, signature = self.scratch / f"signed-{name}", self.scratch / f"signed-{name}" / "model.sig"
            label = "one file" if name == "one" else f"{self.o.shards} shards"
            self.figure(f"sign, {label}", [source], {
                "ours": dict(ours=[self.binary, "sign", source, "--key", self.key, "--force", "--quiet"]),
                "model_signing": dict(sign=[*theirs, "sign", "key", source, "--signature", signature, "--private_key", self.key])})
            self.figure(f"verify signature, {label}", [source], {
                "ours": dict(ours=[self.binary, "verify", source, "--key", self.public, "--quiet"]),
                "model_signing": dict(verify=[*theirs, "verify", "key", source, "--signature", signature, "--public_key", self.public])})

    def against_torch(self):
        if not (python := self.o.torch):
            return self.not_run.append("torch: no --torch PYTHON was given")
        ours = [self.binary, "apply", self.one, "--perturbation", self.delta, "-o", self.out, "--quiet"]
        self.figure("apply, beside torch", [self.one, self.delta], {
            "ours": dict(ours=ours), "torch": dict(torch=[python, PEER, self.one, self.delta, self.out])})

    def figure(self, name, sources, contestants, bar=None, memory=None):
        """Runs the contestants, each a list of named commands whose times are added up, in turns."""
        if self.o.only and self.o.only not in name:
            return
        runs = {contestant: [] for contestant in contestants}
        for run in range(self.o.runs):
            turns = list(contestants.items())
            for contestant, commands in turns if run % 2 == 0 else reversed(turns):
                shutil.rmtree(self.out, ignore_errors=True)
                os.sync()
                for source in sources:
                    warm(source)
                parts = {part: measure([str(word) for word in command]) for part, command in commands.items()}
                total = dict(seconds=sum(it["seconds"] for it in parts.values()), cpu=sum(it["cpu"] for it in parts.values()),
                             anonymous_mib=max(it["anonymous_mib"] for it in parts.values()),
                             peak_mib=max(it["peak_mib"] for it in parts.values()))
                if len(parts) > 1:
                    total["parts"] = {part: it["seconds"] for part, it in parts.items()}
                runs[contestant].append(total)
            say(f"{name}, run {run + 1}: " + ", ".join(f"{it} {found[-1]['seconds']:.2f} s" for it, found in runs.items()))
        shutil.rmtree(self.out, ignore_errors=True)
        ours, peer = runs
        pairs = [x["seconds"] / y["seconds"] for x, y in zip(runs[ours], runs[peer])]
        found = dict(ours=summary(runs[ours]), peer_name=peer, peer=summary(runs[peer]), pairs=dict(low=min(pairs), high=max(pairs)))
        found["ratio"] = found["ours"]["seconds"]["median"] / found["peer"]["seconds"]["median"]
        if bar is not None:
            found.update(bar=bar, met=found["ratio"] <= bar)
        if memory is not None:
            peak = found["ours"]["anonymous_mib"]["high"]
            found.update(memory_bar_mib=memory / MIB, met=found["met"] and peak <= memory / MIB)
        self.figures[name] = found

    def floors(self):
        """Rates in 10^9 bytes a second of the parts that the plain copy consists of."""
        figure = self.figures.get("apply, one file")
        if not figure:
            return {}
        parts = figure["peer"]["parts"]
        return dict(copied=self.sizes["weights"] / parts["cp"]["median"] / 1e9,
                    copied_and_synced=self.sizes["weights"] / (parts["cp"]["median"] + parts["sync"]["median"]) / 1e9,
                    hashed=self.sizes["weights"] / parts["sha256"]["median"] / 1e9)


def measure(command):
    """Runs `command`: seconds from start to exit, processor seconds, and the peaks of its memory."""
    with tempfile.TemporaryFile() as out:
        began = time.perf_counter()
        child = os.posix_spawnp(command[0], command, os.environ,
                                file_actions=[(os.POSIX_SPAWN_DUP2, out.fileno(), 1), (os.POSIX_SPAWN_DUP2, out.fileno(), 2)])
        sampler = Sampler(child)
        _, status, usage = os.wait4(child, 0)
        seconds = time.perf_counter() - began
        sampler.stop()
        if code := os.waitstatus_to_exitcode(status):
            out.seek(0)
            raise SystemExit(f"exit code {code} from: {' '.join(command)}\n{out.read().decode(errors='replace')}")
        return dict(seconds=seconds, cpu=usage.ru_utime + usage.ru_stime, anonymous_mib=sampler.peak / 1024, peak_mib=usage.ru_maxrss / 1024)


class Sampler:
    """The most RssAnon that a process was seen with, in KiB."""

    def __init__(self, pid):
        self.peak, self.done = 0, threading.Event()
        self.thread = threading.Thread(target=self.watch, args=(f"/proc/{pid}/status",))
        self.thread.start()

    def watch(self, path):
        while not self.done.wait(0.002):
            try:
                with open(path) as status:
                    for line in status:
                        if line.startswith("RssAnon:"):
                            self.peak = max(self.peak, int(line.split()[1]))
            except OSError:
                return

    def stop(self):
        self.done.set()
        self.thread.join()


def llama(gigabytes):
    """Names, rows and columns of a Llama's tensors: as many blocks as come nearest, one column for a vector."""
    hidden, kv, inner, vocabulary = 2048, 512, 8192, 32000
    block = [("self_attn.q_proj", hidden, hidden), ("self_attn.k_proj", kv, hidden), ("self_attn.v_proj", kv, hidden), ("self_attn.o_proj", hidden, hidden),
             ("mlp.gate_proj", inner, hidden), ("mlp.up_proj", inner, hidden), ("mlp.down_proj", hidden, inner),
             ("input_layernorm", hidden, 1), ("post_attention_layernorm", hidden, 1)]
    ends = [("model.embed_tokens.weight", vocabulary, hidden), ("model.norm.weight", hidden, 1)]
    elements = lambda tensors: sum(rows * columns for _, rows, columns in tensors)
    blocks = max(1, round((gigabytes * 1e9 / 2 - elements(ends)) / elements(block)))
    return sorted(ends + [(f"model.layers.{i}.{name}.weight", rows, columns) for i in range(blocks) for name, rows, columns in block])


def checkpoint(directory, tensors, shards):
    """Writes `tensors` with the same values whatever the number of shards; as the transformers library lays a checkpoint out."""
    directory.mkdir()
    blocks = 1 + max(int(name.split(".")[2]) for name, _, _ in tensors if name.startswith("model.layers."))
    shape = {name: (rows, columns) for name, rows, columns in tensors}
    config = dict(architectures=["LlamaForCausalLM"], model_type="llama", dtype="bfloat16", torch_dtype="bfloat16", hidden_act="silu", num_hidden_layers=blocks,
                  hidden_size=shape["model.norm.weight"][0], intermediate_size=shape["model.layers.0.mlp.up_proj.weight"][0],
                  vocab_size=shape["model.embed_tokens.weight"][0], num_attention_heads=32, num_key_value_heads=8, head_dim=64,
                  max_position_embeddings=4096, rms_norm_eps=1e-5, rope_theta=10000.0, tie_word_embeddings=True, bos_token_id=1, eos_token_id=2)
    (directory / "config.json").write_text(json.dumps(config))
    total = sum(2 * rows * columns for _, rows, columns in tensors)
    parts, filled = [[] for _ in range(shards)], 0
    for tensor in tensors:
        parts[min(shards - 1, filled * shards // total)].append(tensor)
        filled += 2 * tensor[1] * tensor[2]
    weight_map = {}
    for number, part in enumerate(parts, 1):
        name = "model.safetensors" if shards == 1 else f"model-{number:05}-of-{shards:05}.safetensors"
        weight_map.update({tensor: name for tensor, _, _ in part})
        header, end = {"__metadata__": {"format": "pt"}}, 0
        for tensor, rows, columns in part:
            begin, end = end, end + 2 * rows * columns
            header[tensor] = dict(dtype="BF16", shape=[rows, columns] if columns > 1 else [rows], data_offsets=[begin, end])
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        with open(directory / name, "wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            for tensor, rows, columns in part:
                values(file, tensor, 2 * rows * columns)
    if shards > 1:
        (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}))


def values(file, tensor, length):
    """Finite BF16 values of magnitudes between 2^-7 and 2, from the tensor's name."""
    source = random.Random(tensor)
    while length:
        piece = min(length, 4 * MIB)
        # Sign and fraction by chance; of the exponent the lowest three bits, under 0b01111.
        keep, set_ = (int.from_bytes(word.to_bytes(2, "little") * (piece // 2), "little") for word in (0x83FF, 0x3C00))
        file.write((source.getrandbits(8 * piece) & keep | set_).to_bytes(piece, "little"))
        length -= piece


def weights(directory):
    return sorted(directory.glob("*.safetensors"))


def size(path):
    return sum(it.stat().st_size for it in (weights(path) if path.is_dir() else [path]))


def warm(path):
    """Reads every byte, so that it is in the page cache unless memory is short."""
    for file in [path] if path.is_file() else path.iterdir():
        with open(file, "rb", buffering=0) as source:
            buffer = bytearray(MIB)
            while source.readinto(buffer):
                pass


def summary(runs):
    def of(numbers):
        return dict(median=statistics.median(numbers), low=min(numbers), high=max(numbers))
    found = {key: of([run[key] for run in runs]) for key in ("seconds", "cpu", "anonymous_mib", "peak_mib")}
    if "parts" in runs[0]:
        found["parts"] = {part: of([run["parts"][part] for run in runs]) for part in runs[0]["parts"]}
    return found


def machine():
    model = next((line.split(":")[1].strip() for line in open("/proc/cpuinfo") if line.startswith("model name")), platform.processor())
    flags = next((line.split() for line in open("/proc/cpuinfo") if line.startswith("flags")), [])
    return f"{model}, {os.cpu_count()} cores, SHA-NI {'yes' if 'sha_ni' in flags else 'no'}, {platform.system()} {platform.release()}"


def table(result):
    say(f"\n{result['machine']}; {result['bytes']['weights'] / 1e9:.2f} GB of weights, {result['bytes']['perturbation'] / 1e9:.2f} GB of perturbation, "
        f"{result['settings']['runs']} runs, sources in the page cache")
    for name, rate in result["floors"].items():
        say(f"floor: {name.replace('_', ' ')} at {rate:.2f} GB/s")
    line = "{:<30}{:>24}{:>24}{:>7}{:>14}{:>6}{:>6}  {}".format
    say(line("", "ours: s (low .. high)", "theirs: s (low .. high)", "ratio", "(run by run)", "bar", "", "peak anonymous MiB, ours and theirs"))
    for name, it in result["figures"].items():
        seconds = lambda side: "{median:.2f} ({low:.2f} .. {high:.2f})".format(**it[side]["seconds"])
        verdict = {None: "", True: "met", False: "MISSED"}[it.get("met")]
        memory = f"{it['ours']['anonymous_mib']['high']:.0f}" + (f" (bar {it['memory_bar_mib']:.0f})" if "memory_bar_mib" in it else "")
        say(line(name, seconds("ours"), seconds("peer"), f"{it['ratio']:.2f}", "{low:.2f} .. {high:.2f}".format(**it["pairs"]), it.get("bar", ""), verdict,
                 f"{memory}; {it['peer']['anonymous_mib']['high']:.0f}, {it['peer_name']}"))
        for part, found in it["peer"].get("parts", {}).items():
            say(line(f"    of which {part}", "", "{median:.2f} ({low:.2f} .. {high:.2f})".format(**found), "", "", "", "", ""))
    for reason in result["not_run"]:
        say(f"not run: {reason}")


def say(text):
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
