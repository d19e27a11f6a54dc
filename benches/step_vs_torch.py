#!/usr/bin/env python3
"""Seconds per step and peak memory of `panacea-patch optimize` beside its PyTorch peer, on the same rows and threads.

    python step_vs_torch.py --binary panacea-patch --model DIR --harmful H.jsonl --task G.jsonl --steps 4 --batch 4 --threads 2 --runs 3

The two programs take turns, so a machine that slows down slows both. Out: a table on stderr, one JSON object on stdout: for each program
the seconds per step of each run (median of all steps but the first), the peak resident memory of the child process as the kernel counts it,
their medians and spread, and the ratios peer / binary (above 1: the binary is the better one). Loading the model and the tokenizers is
not in the seconds, but in the memory. Extra flags for the binary alone: --binary-flag=--recompute, as often as wanted.
"""
import argparse
import json
import os
import pathlib
import platform
import statistics
import sys
import tempfile
import time

PEER = pathlib.Path(__file__).resolve().parent / "torch_peer.py"


def main():
    a = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    a.add_argument("--binary", required=True)
    a.add_argument("--python", default=sys.executable, help="an interpreter with torch and transformers")
    a.add_argument("--model", required=True)
    a.add_argument("--harmful", required=True)
    a.add_argument("--task", required=True)
    a.add_argument("--template", default="alpaca")
    a.add_argument("--steps", type=int, default=4)
    a.add_argument("--batch", type=int, default=4)
    a.add_argument("--max-length", type=int, default=128)
    a.add_argument("--rho", type=float, default=1.0)
    a.add_argument("--lambda", dest="lamb", type=float, default=0.001)
    a.add_argument("--lr", type=float, default=2e-5)
    a.add_argument("--targets", default="q_proj,k_proj,v_proj")
    a.add_argument("--threads", type=int, default=os.cpu_count())
    a.add_argument("--runs", type=int, default=3)
    a.add_argument("--binary-flag", action="append", default=[])
    a.add_argument("--peer-flag", action="append", default=[])
    o = a.parse_args()
    shared = ["--harmful", o.harmful, "--task", o.task, "--template", o.template, "--steps", str(o.steps), "--batch", str(o.batch),
              "--max-length", str(o.max_length), "--rho", str(o.rho), "--lambda", str(o.lamb), "--lr", str(o.lr), "--targets", o.targets,
              "--threads", str(o.threads), "--json"]
    found = {"panacea-patch": [], "torch": []}
    for run in range(o.runs):
        with tempfile.TemporaryDirectory() as scratch:
            ours = [o.binary, "optimize", o.model, "--method", "panacea", "--output", f"{scratch}/ours.safetensors", *shared, *o.binary_flag]
            theirs = [o.python, str(PEER), o.model, *shared, "--out", f"{scratch}/theirs.safetensors", *o.peer_flag]
            # Who goes first alternates too: the first finds the checkpoint cold.
            turns = [("panacea-patch", ours), ("torch", theirs)]
            for name, command in turns if run % 2 == 0 else reversed(turns):
                found[name].append(measure(command, o.threads))
                print(f"run {run + 1} {name}: {found[name][-1]['seconds_per_step']:.3f} s/step, {found[name][-1]['peak_mib']:.0f} MiB", file=sys.stderr)
    result = dict(machine=f"{platform.machine()}, {os.cpu_count()} cores", settings={k: v for k, v in vars(o).items() if k not in ("python", "binary")},
                  runs=found)
    for name, runs in found.items():
        result[name] = {key: dict(median=statistics.median(r[key] for r in runs), low=min(r[key] for r in runs), high=max(r[key] for r in runs))
                        for key in ("seconds_per_step", "peak_mib", "wall_seconds")}
    result["ratio"] = {key: result["torch"][key]["median"] / result["panacea-patch"][key]["median"] for key in ("seconds_per_step", "peak_mib")}
    table(result)
    print(json.dumps(result))


def measure(command, threads):
    """Runs `command` and reads its JSON; the memory is the child's own, from wait4."""
    environment = dict(os.environ, OMP_NUM_THREADS=str(threads), RAYON_NUM_THREADS=str(threads), TOKENIZERS_PARALLELISM="false")
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        began = time.perf_counter()
        child = os.posix_spawnp(command[0], command, environment,
                                file_actions=[(os.POSIX_SPAWN_DUP2, out.fileno(), 1), (os.POSIX_SPAWN_DUP2, err.fileno(), 2)])
        _, status, usage = os.wait4(child, 0)
        wall = time.perf_counter() - began
        for stream in (out, err):
            stream.seek(0)
        if code := os.waitstatus_to_exitcode(status):
            raise SystemExit(f"exit code {code} from: {' '.join(command)}\n{err.read().decode(errors='replace')}")
        kib = usage.ru_maxrss / (1024 if sys.platform == "darwin" else 1)
        return dict(seconds_per_step=seconds_per_step(steps_of(out.read().decode())), peak_mib=kib / 1024, wall_seconds=wall)


def steps_of(text):
    """The steps in what either program printed: the JSON object on the last line that is one, or the whole output as one object.

    The one place that knows the shape {"steps": [{"g", "h", "h_eps", "grad_h", "seconds"}, ..]}.
    """
    for candidate in [text, *reversed(text.splitlines())]:
        try:
            found = json.loads(candidate)
        except json.JSONDecodeError:
            continue
        if isinstance(found, dict) and "steps" in found:
            return found["steps"]
    raise SystemExit(f"no JSON object with `steps` in:\n{text[-2000:]}")


def seconds_per_step(steps):
    """The median of all steps but the first, which pays for cold caches and first allocations."""
    seconds = [step["seconds"] for step in steps]
    return statistics.median(seconds[1:] or seconds)


def table(result):
    line = "{:<16}{:>14}{:>18}{:>12}{:>14}".format
    print(line("", "seconds/step", "(low .. high)", "peak MiB", "wall seconds"), file=sys.stderr)
    for name in ("panacea-patch", "torch"):
        r, s = result[name], result[name]["seconds_per_step"]
        print(line(name, f"{s['median']:.3f}", f"{s['low']:.3f} .. {s['high']:.3f}", f"{r['peak_mib']['median']:.0f}",
                   f"{r['wall_seconds']['median']:.1f}"), file=sys.stderr)
    print(line("ratio", f"{result['ratio']['seconds_per_step']:.2f}", "", f"{result['ratio']['peak_mib']:.2f}", ""), file=sys.stderr)


if __name__ == "__main__":
    main()
