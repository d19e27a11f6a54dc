#!/usr/bin/env python3
"""Writes the section SHA-256 of testdata/README.md: usage `python3 testdata/gen/digests.py`, from anywhere. Standard library only.

In: every file under testdata but the programs in gen/, the README files and hidden files. Out: one line each, but for hostile/, whose
many small files are told by one line: the digest of the list of theirs, as `sha256sum` writes it, in order of path.
"""
import hashlib
import pathlib

ROOT = pathlib.Path(__file__).resolve().parent.parent
HEADING = "## SHA-256\n\n"


def lines(files):
    return [f"{hashlib.sha256((ROOT / file).read_bytes()).hexdigest()}  {file}\n" for file in files]


def main():
    files = sorted(path.relative_to(ROOT).as_posix() for path in ROOT.rglob("*") if path.is_file())
    files = [f for f in files if not f.startswith("gen/") and not any(part.startswith(".") for part in f.split("/")) and not f.endswith("README.md")]
    hostile = [f for f in files if f.startswith("hostile/")]
    whole = hashlib.sha256("".join(lines(hostile)).encode()).hexdigest()
    listed = lines(f for f in files if f not in hostile)
    listed.append(f"{whole}  hostile/ ({len(hostile)} files)\n")
    listed.sort(key=lambda line: line.split("  ")[1])

    readme = ROOT / "README.md"
    before, heading, _ = readme.read_bytes().decode().partition(HEADING)
    if not heading:
        raise SystemExit(f"{readme}: no heading {HEADING.strip()!r}")
    readme.write_bytes((before + heading + "".join("    " + line for line in listed)).encode())


if __name__ == "__main__":
    main()
