"""Canonical JSON and fingerprints: the same value gives the same bytes on every machine and run."""

import hashlib
import json
from collections.abc import Mapping, Sequence

Json = None | bool | int | float | str | Sequence["Json"] | Mapping[str, "Json"]


def canonical_json(value: Json) -> str:
    """`value` as JSON with sorted keys and no spaces; floats in Python's shortest exact form.

    Raises:
        ValueError: NaN or an infinity, which JSON cannot say.
        TypeError: a value that is not JSON.
    """
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return text.encode(
        errors="backslashreplace"
    ).decode()  # lone surrogates, as in file names that are no text, escaped as JSON does


def fingerprint(value: Json) -> str:
    """The first 16 hexadecimal digits of the SHA-256 of `canonical_json(value)`."""
    return hashlib.sha256(canonical_json(value).encode()).hexdigest()[:16]
