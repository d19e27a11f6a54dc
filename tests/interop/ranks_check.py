#!/usr/bin/env python3
"""Whether processes that share a search find what one finds, and what happens when one of them fails.

    python ranks_check.py --program panacea-patch --alone panacea-patch-without-mpi [--mpirun mpirun]

PROGRAM has the feature `mpi`, ALONE has not. The model and the rows are those of testdata/tiny-chat. Checked:

- two and three ranks against one process, methods panacea and adaptive: the perturbation to cosine 0.99999, the losses of every step to 1e-4, and two
  ranks a second time to the same bytes
- the whole job: complete, verified, and its manifest says how many ranks there were
- a rank that is killed ends the job, is named, and leaves the state and no output; --resume goes on, by two to the bytes of an undisturbed run, by one to
  cosine 0.99999
- one rank that is asked to stop stops all after the step under way
- a rank that cannot read the model, or reads other rows, ends all, under its name; a command that cannot be shared is refused, and so is a program without
  the feature

Open MPI's mpirun, 4 or later. Standard library only. Exit code 1, and the reason, at the first that is not so.
"""
import argparse
import array
import json
import math
import os
import pathlib
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import time

ROOT = pathlib.Path(__file__).resolve().parents[2]
MODEL, DATA = ROOT / "testdata" / "tiny-chat", ROOT / "testdata" / "tiny-chat-data"
# As root in a container, on fewer cores than ranks; single-copy messages need a right that containers do not give.
FLAGS = ["--allow-run-as-root", "--oversubscribe", "--bind-to", "none", "--mca", "btl_vader_single_copy_mechanism", "none"]
COSINE, LOSS = 0.99999, 1e-4


def main():
    a = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    a.add_argument("--program", required=True)
    a.add_argument("--alone", required=True)
    a.add_argument("--mpirun", default="mpirun")
    o = a.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        work = Work(o, pathlib.Path(folder))
        for check in (same_as_one_process, whole_job, killed, asked_to_stop, failing, refused):
            began = time.monotonic()
            check(work)
            require(work.leavings() == [], f"{check.__name__} left {work.leavings()}")
            print(f"ok {check.__name__} ({time.monotonic() - began:.0f} s)")


class Work:
    """A folder with rows, and the ways to run the program in it."""

    def __init__(self, options, folder):
        self.options, self.folder = options, folder
        for name, rows in (("harmful", 32), ("task", 16), ("benign", 16)):
            lines = (DATA / f"{name}.jsonl").read_text().splitlines(keepends=True)
            (folder / f"{name}.jsonl").write_text("".join(lines[:rows]))
        self.inputs = {path.name for path in folder.iterdir()}

    def search(self, *flags, command="optimize", model=MODEL, harmful="harmful.jsonl"):
        rows = ["--harmful", harmful, "--task", "task.jsonl", "--threads", "1", "--json"]
        return [*([command] if command else []), str(model), *rows, *flags]

    def mpirun(self, size, *arguments):
        return [self.options.mpirun, *FLAGS, "-n", str(size), self.options.program, *arguments]

    def run(self, command, code=0):
        done = subprocess.run(command, cwd=self.folder, capture_output=True, text=True, timeout=300)
        require(done.returncode == code, f"exit code {done.returncode}, not {code}, from {' '.join(command)}\n{done.stderr}")
        return done

    def report(self, command):
        """The JSON object on stdout: one, whoever else could have printed."""
        return json.loads(self.run(command).stdout)

    def leavings(self):
        """What is in the folder besides its inputs; it is removed."""
        found = sorted(path.name for path in self.folder.iterdir() if path.name not in self.inputs)
        for name in found:
            path = self.folder / name
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        return found

    def take(self, name):
        """The bytes of an output, which is removed."""
        path = self.folder / name
        content = path.read_bytes()
        path.unlink()
        return content


def same_as_one_process(work):
    panacea = ["--method", "panacea", "--steps", "4", "--batch", "5", "--lr", "0.001"]
    adaptive = ["--steps", "3", "--repair-steps", "2", "--batch", "8", "--targets", "q_proj,v_proj"]
    for flags in (panacea, adaptive):
        search = work.search(*flags, "-o", "p.safetensors")
        one = work.report([work.options.program, *search])
        alone = tensors(work.take("p.safetensors"))
        for size in (2, 3):
            several = work.report(work.mpirun(size, *search))
            require(several["ranks"]["size"] == size, f"{several['ranks']} is not of {size} ranks")
            content = work.take("p.safetensors")
            require_close(alone, tensors(content), f"{size} ranks, {flags}")
            for ours, theirs in zip(one["steps"], several["steps"], strict=True):
                for key in ("g", "h", "h_eps", "r", "kl"):
                    difference = abs(ours.get(key, 0) - theirs.get(key, 0))
                    require(difference <= LOSS, f"{key} differs by {difference} in step {ours['step']} of {size} ranks")
            if size == 2:
                work.run(work.mpirun(size, *search))
                require(content == work.take("p.safetensors"), "two ranks gave two results")


def whole_job(work):
    work.run(work.mpirun(2, *work.search("--steps", "2", "--repair-steps", "1", "--batch", "4", "-o", "safe", command=None)))
    manifest = json.loads((work.folder / "safe" / "panacea.manifest.json").read_text())
    internal = manifest["predicate"]["buildDefinition"]["internalParameters"]
    require(internal == {"device": "cpu", "ranks": 2}, f"the manifest has {internal}")
    work.run([work.options.alone, "verify", "safe"])
    require(work.leavings() == ["safe"], "something else was left")


LONG = ["--method", "panacea", "--steps", "60", "--batch", "16", "--lr", "0.0001", "--state-every", "1", "-o", "p.safetensors"]
STATE = ".p.safetensors.panacea-state"


def killed(work):
    work.run(work.mpirun(2, *work.search(*LONG)))
    undisturbed = work.take("p.safetensors")
    for size in (2, 1):
        job = Job(work, work.mpirun(2, *work.search(*LONG)))
        os.kill(job.rank(1), signal.SIGKILL)
        words = job.ends()
        require("rank 1" in words and "signal 9" in words, f"nobody is named in:\n{words}")
        left = sorted(path.name for path in work.folder.iterdir() if path.name not in work.inputs)
        require(STATE in left and "p.safetensors" not in left, f"{left} were left")
        search = work.search(*LONG, "--resume")
        work.run(work.mpirun(2, *search) if size == 2 else [work.options.program, *search])
        resumed = work.take("p.safetensors")
        require(size != 2 or resumed == undisturbed, "resumed by two ranks, the bytes are others")
        require_close(tensors(undisturbed), tensors(resumed), f"resumed by {size}")
        # A kill in the middle of a save leaves what was being written.
        require(all(STATE in name for name in work.leavings()), "something else was left")


def asked_to_stop(work):
    for rank in (0, 1):
        job = Job(work, work.mpirun(2, *work.search(*LONG)))
        os.kill(job.rank(rank), signal.SIGTERM)
        words = job.ends()
        require("error: interrupted" in words and words.count("error:") == 1, f"rank {rank} was asked to stop, and said:\n{words}")
        require(job.code == 130, f"exit code {job.code}")
        require(work.leavings() == [STATE], "not just the state was left")


def failing(work):
    """Two ranks with different command lines, as if their machines had different files."""
    (work.folder / "other.jsonl").write_text("".join((work.folder / "harmful.jsonl").read_text().splitlines(keepends=True)[:30]))
    short = ["--method", "panacea", "--steps", "1", "-o", "p.safetensors"]
    cases = [
        (work.search(*short, model="no-such-model"), "rank 1 of 2", "cannot read `no-such-model`"),
        (work.search(*short, harmful="other.jsonl"), "rank 1 would do other work than rank 0", "harmful rows"),
    ]
    for second, *wanted in cases:
        for first in (work.search(*short), work.search(*short, "--dry-run")):
            if "--dry-run" in first and "other.jsonl" in second:
                # The first computes nothing that could differ.
                continue
            command = [*work.mpirun(1, *first), ":", "-n", "1", work.options.program, *second]
            words = work.run(command, code=3).stderr
            require(all(text in words for text in wanted) and words.count("error:") == 1, f"{wanted} are not in:\n{words}")
    (work.folder / "p.safetensors").write_text("")
    words = work.run(work.mpirun(2, *work.search(*short)), code=3).stderr
    require("because: it exists" in words and words.count("error:") == 1, words)
    require(work.leavings() == ["other.jsonl", "p.safetensors"], "something was left")


def refused(work):
    words = work.run(work.mpirun(2, "inspect", str(MODEL)), code=2).stderr
    require("`inspect` is work for one process" in words and words.count("error:") == 1, words)
    command = work.mpirun(2, *work.search("-o", "p.safetensors"))
    command[command.index(work.options.program)] = work.options.alone
    words = work.run(command, code=4).stderr
    require("built without the feature `mpi`" in words, words)
    work.run([part if part != "2" else "1" for part in work.mpirun(2, "inspect", str(MODEL))])


class Job:
    """A run that is under way: it has saved a state."""

    def __init__(self, work, command):
        self.errors = tempfile.TemporaryFile("w+")
        self.process = subprocess.Popen(command, cwd=work.folder, stdout=subprocess.DEVNULL, stderr=self.errors)
        limit = time.monotonic() + 60
        while not (work.folder / STATE).exists():
            require(self.process.poll() is None and time.monotonic() < limit, f"no state was saved:\n{self.words()}")
            time.sleep(0.01)

    def rank(self, number):
        """The process that is this rank."""
        for path in pathlib.Path("/proc").glob("[0-9]*/environ"):
            try:
                parent = int((path.parent / "stat").read_text().rpartition(")")[2].split()[1])
                if parent == self.process.pid and f"OMPI_COMM_WORLD_RANK={number}".encode() in path.read_bytes().split(b"\0"):
                    return int(path.parent.name)
            except OSError:
                continue
        fail(f"there is no rank {number}")

    def words(self):
        self.errors.seek(0)
        return self.errors.read()

    def ends(self):
        self.code = self.process.wait(timeout=60)
        require(self.code != 0, "it went on to the end")
        return self.words()


def tensors(content):
    """All F32 tensors of a safetensors file, end to end in the order of their names."""
    length, = struct.unpack("<Q", content[:8])
    header = json.loads(content[8:8 + length])
    values = array.array("f")
    for name in sorted(set(header) - {"__metadata__"}):
        begin, end = header[name]["data_offsets"]
        values.frombytes(content[8 + length + begin:8 + length + end])
    return values


def require_close(ours, theirs, what):
    require(len(ours) == len(theirs), f"{what}: {len(ours)} and {len(theirs)} elements")
    dot = math.fsum(x * y for x, y in zip(ours, theirs))
    cosine = dot / math.sqrt(math.fsum(x * x for x in ours) * math.fsum(y * y for y in theirs))
    require(cosine >= COSINE, f"{what}: cosine {cosine}")
    print(f"   {what}: cosine {cosine:.9f}")


def require(holds, why):
    if not holds:
        fail(why)


def fail(why):
    sys.exit(f"FAILED: {why}")


if __name__ == "__main__":
    main()
