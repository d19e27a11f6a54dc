#!/usr/bin/env python3
"""Holds a run of `panacea-patch optimize --method panacea` against its PyTorch peer; exit code 1 when they disagree.

    python compare_oracle.py --ours ours.json --theirs theirs.json --our-perturbation a.safetensors --their-perturbation b.safetensors

In: what each printed with --json, and the perturbations each wrote (dense; the peer's --out). Compared: the losses g, h, h_eps and grad_h
of every step, by relative difference (at most --loss, 1e-4); the perturbation as one vector, by cosine (at least --cosine, 0.9999) and by
norm (at most --norm, 1e-3); each tensor by cosine (at least --tensor-cosine, 0.999). A tensor or step that one side lacks is a disagreement.
AdamW's first steps have the length lr in every element whatever its gradient, so elements whose gradient is rounding noise may differ in
sign: with a large lr that costs cosine, not correctness.
"""
import argparse
import json
import pathlib
import sys

import numpy as np
from safetensors.numpy import load_file

from step_vs_torch import steps_of

KEYS = ("g", "h", "h_eps", "grad_h")


def main():
    a = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name in ("ours", "theirs", "our-perturbation", "their-perturbation"):
        a.add_argument(f"--{name}", required=True)
    a.add_argument("--loss", type=float, default=1e-4)
    a.add_argument("--cosine", type=float, default=0.9999)
    a.add_argument("--norm", type=float, default=1e-3)
    a.add_argument("--tensor-cosine", type=float, default=0.999)
    o = a.parse_args()
    faults = compare_steps(steps_of(pathlib.Path(o.ours).read_text()), steps_of(pathlib.Path(o.theirs).read_text()), o.loss)
    faults += compare_tensors(load_file(o.our_perturbation), load_file(o.their_perturbation), o)
    for fault in faults:
        print(f"disagreement: {fault}", file=sys.stderr)
    print("agree" if not faults else f"{len(faults)} disagreements")
    sys.exit(1 if faults else 0)


def compare_steps(ours, theirs, bound):
    if len(ours) != len(theirs):
        return [f"{len(ours)} steps against {len(theirs)}"]
    faults, worst = [], 0.0
    for t, (x, y) in enumerate(zip(ours, theirs)):
        for key in KEYS:
            # `not <=` rather than `>`: a NaN is a disagreement.
            difference = abs(x[key] - y[key]) / max(abs(y[key]), 1e-12)
            worst = max(worst, difference)
            if not difference <= bound:
                faults.append(f"step {t}: {key} is {x[key]:.8g}, the peer's {y[key]:.8g}")
    print(f"steps: {len(ours)}, worst relative difference {worst:.2g}")
    return faults


def compare_tensors(ours, theirs, bounds):
    faults = [f"tensor `{n}` is in one file only" for n in sorted(set(ours) ^ set(theirs))]
    names = sorted(set(ours) & set(theirs))
    if not names:
        return [*faults, "no tensor in common"]
    product = our_square = their_square = 0.0
    worst = (2.0, "")
    for name in names:
        x, y = (side[name].astype(np.float64).ravel() for side in (ours, theirs))
        if ours[name].shape != theirs[name].shape:
            faults.append(f"tensor `{name}` has shape {ours[name].shape}, the peer's {theirs[name].shape}")
            continue
        xy, xx, yy = float(x @ y), float(x @ x), float(y @ y)
        product, our_square, their_square = product + xy, our_square + xx, their_square + yy
        cosine = cosine_of(xy, xx, yy)
        worst = min(worst, (cosine, name))
        if not cosine >= bounds.tensor_cosine:
            where = int(np.abs(x - y).argmax())
            faults.append(f"tensor `{name}`: cosine {cosine:.6f}, worst at element {where}: {x[where]:.6g} against {y[where]:.6g}")
    cosine = cosine_of(product, our_square, their_square)
    ratio = (our_square / their_square) ** 0.5 if their_square else float("inf")
    if not cosine >= bounds.cosine:
        faults.append(f"cosine of the whole perturbation {cosine:.8f}")
    if not abs(ratio - 1.0) <= bounds.norm:
        faults.append(f"norm {our_square ** 0.5:.8g}, the peer's {their_square ** 0.5:.8g}")
    print(f"tensors: {len(names)}, cosine of all {cosine:.8f}, worst {worst[0]:.8f} in `{worst[1]}`, norm ratio {ratio:.8f}")
    return faults


def cosine_of(xy, xx, yy):
    return 1.0 if xx == yy == 0.0 else xy / (xx * yy) ** 0.5 if xx and yy else 0.0


if __name__ == "__main__":
    main()
