"""Marks by which a run recognises its models when it is resumed."""

import hashlib
from collections.abc import Mapping
from pathlib import Path

from evomerge.core import Json, canonical_json
from evomerge.plan import ModelHeader
from evomerge.plan.model_header import FileStamp

SAMPLE_BYTES = 1 << 16
"""read from both ends of every shard: a model that was trained further differs everywhere, so this is enough to notice"""


def model_fingerprint(header: ModelHeader) -> str:
    """A hash of a model's configuration, tensor table, and both ends of every file, its adapter's too; reads kilobytes, whatever the size."""
    table: dict[str, Json] = {}
    for name, tensor in header.tensors.items():
        table[name] = [tensor.file, tensor.dtype, list(tensor.shape), tensor.start, tensor.end]
    marks: dict[str, Json] = {"config": header.config, "tensors": table}
    if header.adapter is not None:
        marks["adapter"] = header.adapter.config
    digest = hashlib.sha256(canonical_json(marks).encode())
    _add_files(digest, header.folder, header.files)
    if header.adapter is not None:
        _add_files(digest, header.adapter.folder, header.adapter.files)
    return digest.hexdigest()[:16]


def _add_files(digest: "hashlib._Hash", folder: Path, files: Mapping[str, FileStamp]) -> None:
    for file, stamp in sorted(files.items()):
        with (folder / file).open("rb") as stream:
            digest.update(stream.read(SAMPLE_BYTES))
            stream.seek(max(0, stamp.size - SAMPLE_BYTES))
            digest.update(stream.read(SAMPLE_BYTES))
