#!/usr/bin/env python3
"""Seconds per step and peak memory of `panacea-patch optimize` beside its PyTorch peer, on the same rows and threads.

    python step_vs_torch.py --binary panacea-patch --model DIR --harmful H.jsonl --task G.jsonl --steps 4 --batch 4 --threads 2 --runs 3

The programs take turns, so a machine that slows down slows all. Out: a table on stderr, one JSON object on stdout: for each program
the seconds per step of each run (median of all steps but the first), the peak resident memory of the child process as the kernel counts it,
their medians and spread, and the ratios peer / binary (above 1: the binary is the better one). Loading the model and the tokenizers is
not in the seconds, but in the memory. Extra flags for the binary alone: --binary-flag=--recompute, as often as wanted.

Operations are those that a step cannot do without, by the binary's own `--dry-run`: products with weights, at unpadded tokens, with the head
at predicted ones only, what a batch's rows begin with once; not attention, not what is computed twice. The ceiling is the best product of two 2048 x 2048
f32 matrices on as many threads, before each run: PyTorch's, or with --ceiling target/release/examples/ceiling that of a kernel which may be faster. --reference PROGRAM.py runs one more PyTorch program that takes the flags MODEL --harmful
--task --steps --batch --max-length --rho --lambda --lr --threads --final-eps --json and prints seconds_per_step and peak memory.
With --steps 0 a pass over the whole harmful set (T = 0) is measured, by its wall time.
"""
import argparse
import json
import os
import pathlib
import platform
import statistics
import subprocess
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
    a.add_argument("--ceiling", help="one more program that prints the GFLOP/s of its best product")
    a.add_argument("--reference", help="one more PyTorch program to compare with")
    o = a.parse_args()
    shared = ["--harmful", o.harmful, "--task", o.task, "--template", o.template, "--steps", str(o.steps), "--batch", str(o.batch),
              "--max-length", str(o.max_length), "--rho", str(o.rho), "--lambda", str(o.lamb), "--lr", str(o.lr), "--targets", o.targets,
              "--threads", str(o.threads), "--json", *(["--final-eps", "last-batch"] if o.steps else [])]
    ours = [o.binary, "optimize", o.model, "--method", "panacea", *shared, *o.binary_flag]
    operations = operations_per_step(ours, o.steps, o.threads)
    names = ["panacea-patch", "torch"] + (["reference"] if o.reference else [])
    found = {name: [] for name in names}
    ceiling = 0.0
    for run in range(o.runs):
        with tempfile.TemporaryDirectory() as scratch:
            commands = {"panacea-patch": [*ours, "--output", f"{scratch}/ours.safetensors"],
                        "torch": [o.python, str(PEER), o.model, *shared, "--out", f"{scratch}/theirs.safetensors", *o.peer_flag]}
            if o.reference:
                unknown = {"--template", "--targets"}
                flags = [part for i, part in enumerate(shared) if part not in unknown and (i == 0 or shared[i - 1] not in unknown)]
                commands["reference"] = [o.python, o.reference, o.model, *flags]
            # Who goes first alternates too: the first finds the checkpoint cold.
            for name in names if run % 2 == 0 else reversed(names):
                ceiling = max(ceiling, matrix_ceiling([o.python, "-c", CEILING], o.threads))
                if o.ceiling:
                    ceiling = max(ceiling, matrix_ceiling([o.ceiling], o.threads))
                found[name].append(measure(commands[name], o.threads))
                print(f"run {run + 1} {name}: {found[name][-1]['seconds_per_step']:.3f} s/step, {found[name][-1]['peak_mib']:.0f} MiB", file=sys.stderr)
    result = dict(machine=f"{platform.machine()}, {os.cpu_count()} cores", settings={k: v for k, v in vars(o).items() if k not in ("python", "binary")},
                  runs=found)
    for name, runs in found.items():
        result[name] = {key: dict(median=statistics.median(r[key] for r in runs), low=min(r[key] for r in runs), high=max(r[key] for r in runs))
                        for key in ("seconds_per_step", "peak_mib", "wall_seconds")}
    result["ceiling_gflops"] = ceiling
    result["operations_per_step"] = operations
    for name in names:
        seconds = result[name]["seconds_per_step"]["median"]
        result[name].update(gflops=operations / seconds / 1e9, share_of_ceiling=operations / seconds / 1e9 / ceiling)
    result["ratio"] = {name: {key: result[name][key]["median"] / result["panacea-patch"][key]["median"] for key in ("seconds_per_step", "peak_mib")}
                       for name in names[1:]}
    table(result, names)
    print(json.dumps(result))


def operations_per_step(command, steps, threads):
    """What one more step adds to the plan of a run; of T = 0, the plan itself."""
    def planned(steps):
        changed = [str(steps) if i and command[i - 1] == "--steps" else part for i, part in enumerate(command)]
        text = subprocess.run([*changed, "--dry-run"], check=True, capture_output=True, text=True, env=environment_of(threads)).stdout
        return json.loads(text)["plan"]["operations"]
    return planned(steps) - planned(steps - 1) if steps > 1 else planned(steps)


def matrix_ceiling(program, threads):
    """GFLOP/s of the best of twenty products."""
    text = subprocess.run([*program, str(threads)], check=True, capture_output=True, text=True, env=environment_of(threads)).stdout
    return float(text)


CEILING = """
import sys, time, torch
torch.set_num_threads(int(sys.argv[1]))
n, best = 2048, 1e9
a, b = torch.rand(n, n), torch.rand(n, n)
out = torch.empty(n, n)
for _ in range(20):
    began = time.perf_counter()
    torch.mm(a, b, out=out)
    best = min(best, time.perf_counter() - began)
print(2 * n ** 3 / best / 1e9)
"""


def environment_of(threads):
    return dict(os.environ, OMP_NUM_THREADS=str(threads), RAYON_NUM_THREADS=str(threads), TOKENIZERS_PARALLELISM="false")


def measure(command, threads):
    """Runs `command` and reads its JSON; the memory is the child's own, from wait4."""
    environment = environment_of(threads)
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
        printed = out.read().decode()
        return dict(seconds_per_step=seconds_per_step(printed, wall), peak_mib=kib / 1024, wall_seconds=wall)


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


def seconds_per_step(text, wall):
    """The median of all steps but the first, which pays for cold caches and first allocations; of no steps, the wall time."""
    steps = steps_of(text)
    if not steps:
        return wall
    if "seconds" not in steps[0]:
        return json.loads(text.splitlines()[-1])["seconds_per_step"]
    seconds = [step["seconds"] for step in steps]
    return statistics.median(seconds[1:] or seconds)


def table(result, names):
    line = "{:<16}{:>14}{:>18}{:>12}{:>14}{:>10}{:>9}".format
    print(f"ceiling {result['ceiling_gflops']:.0f} GFLOP/s, a step is {result['operations_per_step'] / 1e9:.0f} GFLOP", file=sys.stderr)
    print(line("", "seconds/step", "(low .. high)", "peak MiB", "wall seconds", "GFLOP/s", "share"), file=sys.stderr)
    for name in names:
        r, s = result[name], result[name]["seconds_per_step"]
        print(line(name, f"{s['median']:.3f}", f"{s['low']:.3f} .. {s['high']:.3f}", f"{r['peak_mib']['median']:.0f}",
                   f"{r['wall_seconds']['median']:.1f}", f"{r['gflops']:.0f}", f"{100 * r['share_of_ceiling']:.0f}%"), file=sys.stderr)
    for name, ratio in result["ratio"].items():
        print(line(f"{name} / ours", f"{ratio['seconds_per_step']:.2f}", "", f"{ratio['peak_mib']:.2f}", "", "", ""), file=sys.stderr)


if __name__ == "__main__":
    main()
