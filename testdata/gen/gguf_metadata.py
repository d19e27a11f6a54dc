#!/usr/bin/env python3
"""Writes testdata/gguf-metadata/published.json: the metadata that llama.cpp's converter makes of the published configs.

    python gguf_metadata.py --converter LLAMA_CPP [--out ../gguf-metadata]

In: testdata/configs, and the source tree of llama.cpp, of which `conversion/` and `gguf-py/` are imported. Out: for each config by its stem,

    "metadata"   [[key, type, value], ..] in the order of the file: what `set_gguf_parameters` writes, without `general.name` and its
                 like, which come from a directory's name, and without the tokenizer
    "tensors"    {name: [bits of f32, ..]}: the tensors that are made of the config alone, as the factors of a rotary embedding
    "names"      {name in safetensors: name in GGUF}: those of block 0 and those outside of blocks, of tensors that transformers' model has;
                 experts 0 alone

Floats are given by their bits, since that is what must be the same.
"""
import argparse
import json
import pathlib
import re
import shutil
import struct
import sys
import tempfile

TESTDATA = pathlib.Path(__file__).resolve().parent.parent


def main():
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("--converter", type=pathlib.Path, required=True, help="the source tree of llama.cpp")
    arguments.add_argument("--out", type=pathlib.Path, default=TESTDATA / "gguf-metadata")
    options = arguments.parse_args()
    sys.path[:0] = [str(options.converter), str(options.converter / "gguf-py")]
    import torch
    from conversion import ModelBase, ModelType, get_model_architecture, get_model_class
    from gguf import GGUFValueType, LlamaFileType
    from transformers import AutoConfig, AutoModelForCausalLM, logging

    logging.set_verbosity_error()
    found = {}
    for file in sorted((TESTDATA / "configs").glob("*.json")):
        with tempfile.TemporaryDirectory() as work:
            folder = pathlib.Path(work)
            shutil.copy(file, folder / "config.json")
            hparams = ModelBase.load_hparams(folder, False)
            kind = get_model_class(get_model_architecture(hparams, ModelType.TEXT))
            model = kind(folder, LlamaFileType.MOSTLY_F16, folder / "out.gguf")
            tensors = {name: bits(t.tolist()) for name, t in model.generate_extra_tensors()}
            model.set_type()
            model.set_gguf_parameters()
            with torch.device("meta"):
                named = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder)).state_dict()
            names = {}
            for name in named:
                item = kind.filter_tensors((name, None))
                if item is None or re.search(r"\.layers\.[1-9]", name) or "rotary_emb" in name or ".experts." in name:
                    continue
                if name == "lm_head.weight" and model.hparams.get("tie_word_embeddings"):
                    continue
                names[name] = model.map_tensor_name(item[0])
            values = model.gguf_writer.kv_data[0]
            found[file.stem] = {
                "metadata": [[key, it.type.name, bits([it.value])[0] if it.type == GGUFValueType.FLOAT32 else it.value]
                             for key, it in values.items()],
                "tensors": tensors,
                "names": names,
            }
    options.out.mkdir(parents=True, exist_ok=True)
    lines = (f"{json.dumps(stem)}: {json.dumps(it)}" for stem, it in found.items())
    (options.out / "published.json").write_text("{\n" + ",\n".join(lines) + "\n}\n")


def bits(floats):
    return [struct.unpack("<I", struct.pack("<f", f))[0] for f in floats]


if __name__ == "__main__":
    main()
