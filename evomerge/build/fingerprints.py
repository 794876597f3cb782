"""Marks by which a run recognises its models when it is resumed."""

import hashlib

from evomerge.core import Json, canonical_json
from evomerge.plan import ModelHeader

SAMPLE_BYTES = 1 << 16
"""read from both ends of every shard: a model that was trained further differs everywhere, so this is enough to notice"""


def model_fingerprint(header: ModelHeader) -> str:
    """A hash of a model's configuration, tensor table, and both ends of every file; reads kilobytes, whatever the size."""
    table: dict[str, Json] = {}
    for name, tensor in header.tensors.items():
        table[name] = [tensor.file, tensor.dtype, list(tensor.shape), tensor.start, tensor.end]
    digest = hashlib.sha256(canonical_json({"config": header.config, "tensors": table}).encode())
    for file, stamp in sorted(header.files.items()):
        with (header.folder / file).open("rb") as stream:
            digest.update(stream.read(SAMPLE_BYTES))
            stream.seek(max(0, stamp.size - SAMPLE_BYTES))
            digest.update(stream.read(SAMPLE_BYTES))
    return digest.hexdigest()[:16]
