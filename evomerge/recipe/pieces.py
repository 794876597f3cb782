"""Piecewise weights: which coefficients apply to which elements of which tensor. Plain, self-validating data, and its JSON form."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from evomerge.core import Json, RecipeError
from evomerge.recipe.values import mapping_of, whole_number


@dataclass(frozen=True, slots=True)
class Span:
    """Elements of a flattened (row-major) tensor up to `end` (None = to the tensor's end), with the coefficients of `PieceTable.rows[row]`."""

    end: int | None
    row: int


@dataclass(frozen=True, slots=True)
class PieceTable:
    """The weights of a `piecewise` recipe.

    Attributes:
        rows: (n_rows, n_sources + n_noise): per row, a coefficient for every source, then one for every noise term.
        tensors: output tensor -> its spans in order, the last with end None; for every float tensor of the models.
        noise: seeds of standard normal noise: term j adds rows[..., n_sources + j] times the noise generated from seed j for the tensor.
    """

    rows: tuple[tuple[float, ...], ...]
    tensors: Mapping[str, tuple[Span, ...]]
    noise: tuple[int, ...] = ()

    def check(self, n_sources: int) -> None:
        """Refuse a table that is malformed or does not match `n_sources` sources.

        Raises:
            RecipeError: names the row or tensor.
        """
        width = n_sources + len(self.noise)
        for index, row in enumerate(self.rows):
            if len(row) != width or not all(map(math.isfinite, row)):
                raise RecipeError(
                    f"pieces.rows[{index}]: expected {width} finite numbers ({n_sources} sources, {len(self.noise)} noise terms), got {list(row)}"
                )
        if not all(0 <= seed < 2**63 for seed in self.noise):
            raise RecipeError(f"pieces.noise: expected seeds from 0 to 2^63 - 1, got {list(self.noise)}")
        for name, spans in self.tensors.items():
            ends = [span.end for span in spans]
            inner = [0, *(end for end in ends[:-1] if end is not None)]
            if not ends or ends[-1] is not None or len(inner) != len(ends) or inner != sorted(set(inner)):
                raise RecipeError(
                    f"pieces.tensors.{name}: ends must be positive and increasing, and the last one null; got {ends}"
                )
            if not all(0 <= span.row < len(self.rows) for span in spans):
                raise RecipeError(f"pieces.tensors.{name}: rows must be from 0 to {len(self.rows) - 1}")

    @property
    def splits_tensors(self) -> bool:
        """Whether coefficients change inside a tensor."""
        return any(len(spans) > 1 for spans in self.tensors.values())

    def to_json(self) -> dict[str, Json]:
        """Lossless JSON form; a tensor with a single piece is a plain row number."""
        return {
            "rows": [list(row) for row in self.rows],
            "tensors": {
                name: spans[0].row if len(spans) == 1 else [[span.end, span.row] for span in spans]
                for name, spans in self.tensors.items()
            },
            "noise": list(self.noise),
        }

    @staticmethod
    def from_json(data: Json) -> "PieceTable":
        """Read what `to_json` wrote.

        Raises:
            RecipeError: names a key that is missing, unknown or of the wrong type.
        """
        fields = mapping_of(data, "recipe pieces", ("rows", "tensors", "noise"), required=("rows", "tensors"))
        rows, tensors, noise = fields["rows"], fields["tensors"], fields.get("noise", [])
        if not isinstance(rows, list) or not isinstance(tensors, Mapping) or not isinstance(noise, list):
            raise RecipeError("recipe pieces: expected lists `rows` and `noise` and an object `tensors`")
        try:
            return PieceTable(
                tuple(tuple(float(value) for value in row) for row in rows),
                {name: _spans(value, f"recipe pieces.tensors.{name}") for name, value in tensors.items()},
                tuple(whole_number(seed, "recipe pieces.noise") for seed in noise),
            )
        except (OverflowError, TypeError, ValueError) as problem:
            raise RecipeError(f"recipe pieces.rows: expected lists of numbers ({problem})") from None


def _spans(data: Json, where: str) -> tuple[Span, ...]:
    if isinstance(data, int):
        return (Span(None, whole_number(data, where)),)
    entries = data if isinstance(data, list) else []
    if not entries or not all(isinstance(entry, list) and len(entry) == 2 for entry in entries):
        raise RecipeError(f"{where}: expected a row, or a list of [end, row], got {data!r}")
    return tuple(
        Span(None if end is None else whole_number(end, where), whole_number(row, where)) for end, row in entries
    )
