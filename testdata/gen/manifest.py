"""Writes testdata/manifest-v1 but for its signatures: usage `python testdata/gen/manifest.py`, from the repository root.

every-field.json is a manifest spelled out once more, apart from the code that writes manifests; toy-model and toy.safetensors are a
directory and a single file, each with its manifest. If the package in-toto-attestation is installed, its schemas must accept the
manifests: the statement, and its predicate as SLSA provenance v1.
"""

import hashlib
import json
import pathlib
import struct

HERE = pathlib.Path("testdata/manifest-v1")
DOCS = "https://github.com/panacea-patch/panacea-patch/blob/main/docs/manifest.md"


def sha256(content):
    content = content.encode() if isinstance(content, str) else content
    return {"sha256": hashlib.sha256(content).hexdigest()}


def manifest(subjects, definition, **run):
    return {
        "_type": "https://in-toto.io/Statement/v1",
        "subject": [{"name": name, "digest": sha256(text)} for name, text in subjects.items()],
        "predicateType": "https://slsa.dev/provenance/v1",
        "predicate": {
            "buildDefinition": {
                "buildType": f"{DOCS}#build-type-v1",
                "externalParameters": {},
                "internalParameters": {},
                "resolvedDependencies": [],
            }
            | definition,
            "runDetails": {
                "builder": {"id": f"{DOCS}#builder-local-v1", "version": {"panacea-patch": "0.1.0"}},
                "metadata": {},
                "byproducts": [],
            }
            | run,
        },
    }


def write(name, statement):
    text = json.dumps(statement, indent=2, sort_keys=True, ensure_ascii=False) + "\n"
    (HERE / name).write_text(text)
    try:
        from google.protobuf import json_format
        from in_toto_attestation.predicates.provenance.v1 import provenance_pb2
        from in_toto_attestation.v1 import statement as wrapper
        from in_toto_attestation.v1 import statement_pb2
    except ImportError:
        print(name, "written; in-toto-attestation is not installed, so its schemas are not checked")
        return
    parsed = json_format.Parse(text, statement_pb2.Statement())
    wrapper.Statement.copy_from_pb(parsed).validate()
    json_format.Parse(json.dumps(statement["predicate"]), provenance_pb2.Provenance())
    print(name, "written; accepted by in-toto-attestation's schemas")


losses = {"h": [1.5, 2.5]}
write(
    "every-field.json",
    manifest(
        {"a": "a", "sub/b": "sub/b", "sub.txt": "sub.txt"},
        {
            "externalParameters": {"method": "adaptive", "rho": 0.5, "seed": 7},
            "internalParameters": {"device": "cpu"},
            "resolvedDependencies": [
                {
                    "name": "model.safetensors",
                    "uri": "https://huggingface.co/example/model",
                    "digest": sha256("base"),
                    "annotations": {"role": "checkpoint"},
                },
                {
                    "name": "harmful.jsonl",
                    "digest": sha256("harmful"),
                    "annotations": {"role": "harmful-set"},
                },
            ],
        },
        metadata={"finishedOn": "2025-01-31T18:00:00Z"},
        byproducts=[
            {
                "name": "losses",
                "digest": sha256(json.dumps(losses, sort_keys=True, separators=(",", ":"))),
                "annotations": losses,
            }
        ],
    ),
)

# One F32 tensor; its header is padded with spaces to a multiple of eight bytes.
header = b'{"w":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}'
header += b" " * (-len(header) % 8)
weights = struct.pack("<Q", len(header)) + header + struct.pack("<2f", 0.5, -1.25)
files = {"config.json": b'{"model_type":"toy"}\n', "model.safetensors": weights, "tokenizer/vocab.json": b'{"a":0}\n'}
for name, content in files.items():
    path = HERE / "toy-model" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
(HERE / "toy.safetensors").write_bytes(weights)
external = {"externalParameters": {"method": "random", "rho": 0.25, "seed": 1}}
write("toy-model/panacea.manifest.json", manifest(files, external))
write("toy.safetensors.manifest.json", manifest({"toy.safetensors": weights}, external))
