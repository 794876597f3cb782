"""Fingerprints of a run's models and tasks, checked when it is resumed and on every machine that evaluates for it."""

import hashlib
from collections.abc import Mapping
from pathlib import Path

from evomerge.build.tasks import task_specs
from evomerge.config import SearchConfig
from evomerge.core import ConfigError, Json, canonical_json
from evomerge.evaluation.task_files import task_fingerprint
from evomerge.plan import ModelHeader
from evomerge.plan.model_header import FileStamp

SAMPLE_BYTES = 1 << 16
"""read from both ends of every shard; this is enough to notice further training, which changes weights everywhere"""


def source_marks(config: SearchConfig, headers: Mapping[str, ModelHeader]) -> dict[str, dict[str, str]]:
    """`{"models": {name in recipes: fingerprint}, "tasks": {file or name: fingerprint}}`."""
    return {
        "models": {name: model_fingerprint(header) for name, header in headers.items()},
        "tasks": {spec.task: task_fingerprint(spec) for spec in task_specs(config)},
    }


def refuse_other_sources(
    marks: Mapping[str, Mapping[str, str]], config: SearchConfig, headers: Mapping[str, ModelHeader]
) -> None:
    """Raise ConfigError if the models or tasks on this machine differ from `marks`, those of the machine that started the search."""
    here = source_marks(config, headers)
    other = [f"{kind} {name}" for kind in marks for name, mark in marks[kind].items() if here[kind].get(name) != mark]
    if other:
        raise ConfigError(
            f"these differ from the machine that started the search: {', '.join(other)}; copy them from there"
        )


def model_fingerprint(header: ModelHeader) -> str:
    """A hash of a model's configuration, its tensor table, and both ends of every file, including its adapter's.

    Reads at most 128 KiB per file, however large it is.
    """
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
