"""Writes testdata/manifest-v1/every-field.json: usage `python testdata/gen/manifest.py`, from the repository root.

The manifest spelled out once more, apart from the code that writes manifests. If the package in-toto-attestation is installed, its
schemas must accept it: the statement, and its predicate as SLSA provenance v1.
"""

import hashlib
import json
import pathlib

DOCS = "https://github.com/panacea-patch/panacea-patch/blob/main/docs/manifest.md"


def sha256(text):
    return {"sha256": hashlib.sha256(text.encode()).hexdigest()}


losses = {"h": [1.5, 2.5]}
manifest = {
    "_type": "https://in-toto.io/Statement/v1",
    "subject": [{"name": name, "digest": sha256(name)} for name in ["a", "sub/b", "sub.txt"]],
    "predicateType": "https://slsa.dev/provenance/v1",
    "predicate": {
        "buildDefinition": {
            "buildType": f"{DOCS}#build-type-v1",
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
        "runDetails": {
            "builder": {"id": f"{DOCS}#builder-local-v1", "version": {"panacea-patch": "0.1.0"}},
            "metadata": {"finishedOn": "2025-01-31T18:00:00Z"},
            "byproducts": [
                {
                    "name": "losses",
                    "digest": sha256(json.dumps(losses, sort_keys=True, separators=(",", ":"))),
                    "annotations": losses,
                }
            ],
        },
    },
}
text = json.dumps(manifest, indent=2, sort_keys=True, ensure_ascii=False) + "\n"
pathlib.Path("testdata/manifest-v1/every-field.json").write_text(text)

try:
    from google.protobuf import json_format
    from in_toto_attestation.predicates.provenance.v1 import provenance_pb2
    from in_toto_attestation.v1 import statement, statement_pb2
except ImportError:
    print("in-toto-attestation is not installed: schemas not checked")
else:
    parsed = json_format.Parse(text, statement_pb2.Statement())
    statement.Statement.copy_from_pb(parsed).validate()
    predicate = json.dumps(manifest["predicate"])
    json_format.Parse(predicate, provenance_pb2.Provenance())
    print("accepted by in-toto-attestation's schemas")
