"""What is allowed in options of plugins, whose types are not ours."""

from typing import Annotated

import pytest
from pydantic import ValidationError

from evomerge.strategy import StrategyOptions


class Options(StrategyOptions):
    steps: tuple[Annotated[int, {"unit": "generations"}], ...] = ()


def test_types_may_have_annotations_of_any_kind() -> None:
    assert Options.model_validate({"steps": [1]}).steps == (1,)
    with pytest.raises(ValidationError, match="valid integer"):
        Options.model_validate({"steps": [True]})
