#!/usr/bin/env python3
"""What one would write in place of `panacea-patch apply`: the peer of benches/bytes.py.

    python torch_apply.py MODEL_DIR PERTURBATION.safetensors OUT_DIR

Loads the model with transformers in its stored type, adds each tensor of a dense perturbation in f32, rounds back, saves with
save_pretrained, flushes, and prints the SHA-256 of every file. No manifest, and nothing is checked.
"""
import hashlib
import os
import pathlib
import sys

import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM


def main():
    source, perturbation, output = sys.argv[1:]
    model = AutoModelForCausalLM.from_pretrained(source, dtype="auto")
    parameters = dict(model.named_parameters())
    with torch.no_grad(), safe_open(perturbation, framework="pt") as deltas:
        for name in deltas.keys():
            weight = parameters[name]
            weight.copy_((weight.float() + deltas.get_tensor(name)).to(weight.dtype))
    model.save_pretrained(output)
    for file in sorted(pathlib.Path(output).iterdir()):
        with open(file, "rb") as stream:
            os.fsync(stream.fileno())
            print(hashlib.file_digest(stream, "sha256").hexdigest(), file.name)


if __name__ == "__main__":
    main()
