"""Canonical JSON and fingerprints: the same value gives the same bytes on every machine and run."""

import hashlib
import json
from collections.abc import Mapping, Sequence

Json = None | bool | int | float | str | Sequence["Json"] | Mapping[str, "Json"]


def canonical_json(value: Json) -> str:
    """`value` as JSON with sorted keys and no spaces; floats in Python's shortest exact form.

    Raises:
        ValueError: a value is NaN or infinite, which JSON cannot represent.
        TypeError: a value has a type that JSON cannot represent.
    """
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    # lone surrogates, as in file names that are not UTF-8, are escaped as in JSON
    return text.encode(errors="backslashreplace").decode()


def fingerprint(value: Json) -> str:
    """The first 16 hexadecimal digits of the SHA-256 of `canonical_json(value)`."""
    return hashlib.sha256(canonical_json(value).encode()).hexdigest()[:16]
