"""Sizes in bytes as users write them."""

import re

from evomerge.core.errors import ConfigError

__all__ = ["parse_bytes"]

_UNITS = {"": 1, "K": 10**3, "KB": 10**3, "M": 10**6, "MB": 10**6, "G": 10**9, "B": 10**9, "GB": 10**9, "T": 10**12, "TB": 10**12,
          "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}  # fmt: skip
_SIZE = re.compile(
    rf"(?P<number>\d+(\.\d+)?)\s*(?P<unit>{'|'.join(sorted(_UNITS, key=len, reverse=True))})", re.IGNORECASE
)


def parse_bytes(size: str | int, what: str) -> int:
    """Parse a size such as 4096, "500MB", "5GB" or "2GiB" to bytes; like mergekit, "5B" means 5 GB.

    Raises:
        ConfigError: `size` is not a positive size; the message calls it `what`.
    """
    text = str(size).strip()
    match = _SIZE.fullmatch(text)
    if match is None or not float(match["number"]):
        raise ConfigError(f"{what} {text!r}: expected a size such as 500MB, 5GB or 2GiB")
    return int(float(match["number"]) * _UNITS[match["unit"].upper()])
