"""What options of plugins, whose types are not ours, may look like."""

from typing import Annotated

import pytest
from pydantic import ValidationError

from evomerge.strategy import StrategyOptions


class Options(StrategyOptions):
    steps: tuple[Annotated[int, {"unit": "generations"}], ...] = ()


def test_types_may_have_notes_of_any_kind() -> None:
    assert Options.model_validate({"steps": [1]}).steps == (1,)
    with pytest.raises(ValidationError, match="valid integer"):
        Options.model_validate({"steps": [True]})
