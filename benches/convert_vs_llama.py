"""Conversion to GGUF beside llama.cpp's own programs, in turn: seconds, peak memory, and whether the tensors are the same.

    python3 benches/convert_vs_llama.py --binary target/release/panacea-patch --model DIR --llama-cpp SOURCES [--quantize llama-quantize]

SOURCES is a checkout of llama.cpp, or the vendored one in the sdist of llama-cpp-python; its converter runs in this Python, which needs
gguf, torch, transformers and sentencepiece. Prints a table and JSON.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import gguf


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--binary", required=True, type=Path)
    parser.add_argument("--model", required=True, type=Path)
    parser.add_argument("--llama-cpp", required=True, type=Path)
    parser.add_argument("--quantize", type=Path)
    parser.add_argument("--runs", type=int, default=5)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as work:
        ours, theirs = (lambda kind, who=who: Path(work) / f"{kind}-{who}.gguf" for who in ("ours", "theirs"))
        wide = ours("f32")
        convert = lambda kind, out: [options.binary, "convert", options.model, "--type", kind, "-o", out, "--force", "--quiet"]
        script = options.llama_cpp / "convert_hf_to_gguf.py"
        pairs = {"q8_0": [sys.executable, script, options.model, "--outtype", "q8_0", "--outfile", theirs("q8_0")]}
        if options.quantize:
            measured(convert("f32", wide))
            pairs["q4_k_m"] = [options.quantize, wide, theirs("q4_k_m"), "q4_k_m", str(os.cpu_count())]
        report = {}
        for kind, command in pairs.items():
            runs = {"ours": [], "theirs": []}
            for _ in range(options.runs):
                runs["ours"].append(measured(convert(kind, ours(kind))))
                runs["theirs"].append(measured(command))
            report[kind] = {"runs": runs}
        # Last, because what this process holds counts in the peaks of those that it starts.
        for kind, figures in report.items():
            figures["same_tensors"] = tensors(ours(kind)) == tensors(theirs(kind))
            row(kind, figures["runs"], figures["same_tensors"])
    print(json.dumps(report))


def measured(command):
    """Seconds, and peak memory in MiB."""
    start = time.perf_counter()
    child = subprocess.Popen([*map(str, command)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    _, status, usage = os.wait4(child.pid, 0)
    if status != 0:
        sys.exit(f"failed: {' '.join(map(str, command))}")
    return {"seconds": time.perf_counter() - start, "peak_mib": usage.ru_maxrss / 1024}


def tensors(path):
    return {tensor.name: (tensor.tensor_type, tensor.data.tobytes()) for tensor in gguf.GGUFReader(path).tensors}


def row(kind, runs, same):
    medians = {}
    for who, figures in runs.items():
        seconds = sorted(run["seconds"] for run in figures)
        medians[who] = statistics.median(seconds)
        peak = statistics.median(run["peak_mib"] for run in figures)
        print(f"{kind:8} {who:8} {medians[who]:6.2f} s ({seconds[0]:.2f} .. {seconds[-1]:.2f})  {peak:6.0f} MiB")
    print(f"{kind:8} ratio    {medians['theirs'] / medians['ours']:6.2f}, tensors {'the same' if same else 'NOT the same'}")


if __name__ == "__main__":
    main()
