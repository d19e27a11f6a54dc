#!/usr/bin/env python3
"""Several ranks against one process: the time of a search, and whether it finds the same.

    python ranks.py --program panacea-patch --model DIR --harmful H.jsonl --task G.jsonl --ranks 2 --threads 1 --runs 3 --flag=--method --flag=panacea

PROGRAM has the feature `mpi`. In turn, as often as --runs says: one process with --threads threads, one with --ranks times as many, and --ranks ranks with
--threads each. Out: a table on stderr and one JSON object on stdout: for each of the three the wall time of the search, the seconds of its
steps and the processor time of all its threads, which other work on the machine disturbs less (medians, lowest and highest), for the ranks the bytes of gradients that were summed, the seconds in sums and those spent waiting for the other
rank, and the cosine between their perturbation and one process's. Standard library only.
"""
import argparse
import array
import json
import math
import os
import pathlib
import resource
import statistics
import struct
import subprocess
import sys
import tempfile
import time


def main():
    a = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name in ("program", "model", "harmful"):
        a.add_argument(f"--{name}", required=True)
    a.add_argument("--task")
    a.add_argument("--mpirun", default="mpirun")
    a.add_argument("--mpirun-flag", action="append", default=[])
    a.add_argument("--ranks", type=int, default=2)
    a.add_argument("--threads", type=int, default=1)
    a.add_argument("--runs", type=int, default=3)
    a.add_argument("--flag", action="append", default=[], help="one more word for the program, as often as wanted")
    o = a.parse_args()
    search = ["optimize", o.model, "--harmful", o.harmful, *(["--task", o.task] if o.task else []), "--json", "--quiet", *o.flag]
    several = f"{o.ranks} ranks x {o.threads}"
    mpirun = [o.mpirun, *o.mpirun_flag, "--bind-to", "none", "-n", str(o.ranks)]
    ways = {f"1 process x {o.threads}": (o.threads, []), f"1 process x {o.ranks * o.threads}": (o.ranks * o.threads, []), several: (o.threads, mpirun)}
    found, outputs = {name: [] for name in ways}, {}
    with tempfile.TemporaryDirectory() as scratch:
        for run in range(o.runs):
            for name in ways if run % 2 == 0 else reversed(ways):
                threads, before = ways[name]
                outputs[name] = pathlib.Path(scratch) / f"{name}.safetensors"
                command = [*before, o.program, *search, "--threads", str(threads), "--force", "--output", str(outputs[name])]
                found[name].append(measure(command, threads))
                print(f"run {run + 1}, {name}: {found[name][-1]['wall_seconds']:.1f} s", file=sys.stderr)
        alone, *_ = outputs
        cosine = cosine_of(tensors(outputs[alone]), tensors(outputs[several]))
    result = dict(settings=vars(o), cores=os.cpu_count(), runs=found, cosine=cosine)
    for name, runs in found.items():
        result[name] = {key: spread([run[key] for run in runs]) for key in ("wall_seconds", "step_seconds", "processor_seconds")}
    for key in ("summed_bytes", "summing_seconds", "waiting_seconds"):
        result[several][key] = statistics.median(run["ranks"][key] for run in found[several])
    result["ratio"] = {name: result[name]["step_seconds"]["median"] / result[several]["step_seconds"]["median"] for name in ways if name != several}
    for name in ways:
        print("{:<16} wall {median:.1f} s ({low:.1f} .. {high:.1f})".format(name, **result[name]["wall_seconds"]),
              "steps {median:.1f} s ({low:.1f} .. {high:.1f})".format(**result[name]["step_seconds"]),
              "processor time {median:.1f} s".format(**result[name]["processor_seconds"]), file=sys.stderr)
    for name, ratio in result["ratio"].items():
        print(f"steps of {name} / {several}: {ratio:.2f}", file=sys.stderr)
    print(f"cosine {cosine:.9f}, {result[several]['summed_bytes'] / 1e9:.2f} GB summed in {result[several]['summing_seconds']:.2f} s,"
          f" waited {result[several]['waiting_seconds']:.2f} s", file=sys.stderr)
    print(json.dumps(result))


def measure(command, threads):
    began, before = time.perf_counter(), processor_seconds()
    environment = dict(os.environ, RAYON_NUM_THREADS=str(threads))
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        raise SystemExit(f"exit code {done.returncode} from: {' '.join(command)}\n{done.stderr}")
    report = json.loads(done.stdout)
    steps = sum(step["seconds"] for step in report["steps"])
    return dict(wall_seconds=time.perf_counter() - began, step_seconds=steps, processor_seconds=processor_seconds() - before, ranks=report.get("ranks"))


def processor_seconds():
    """Of all processes that were waited for, threads together."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def spread(values):
    return dict(median=statistics.median(values), low=min(values), high=max(values))


def tensors(path):
    """All F32 tensors of a safetensors file, end to end in the order of their names."""
    content = path.read_bytes()
    length, = struct.unpack("<Q", content[:8])
    header = json.loads(content[8:8 + length])
    values = array.array("f")
    for name in sorted(set(header) - {"__metadata__"}):
        begin, end = header[name]["data_offsets"]
        values.frombytes(content[8 + length + begin:8 + length + end])
    return values


def cosine_of(a, b):
    dot = math.fsum(x * y for x, y in zip(a, b, strict=True))
    return dot / math.sqrt(math.fsum(x * x for x in a) * math.fsum(y * y for y in b))


if __name__ == "__main__":
    main()
