"""What all settings that a user writes have in common. Imports pydantic, so `evomerge.core` does not import this by itself."""

from typing import Annotated, Any, get_args, get_origin

from pydantic import BaseModel, ConfigDict, model_validator


class Settings(BaseModel):
    """Unknown keys are refused, values never change, and true and false are no numbers."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    @model_validator(mode="before")
    @classmethod
    def _truth_is_no_number(cls, data: Any) -> Any:
        """Where numbers are expected, true and false as texts, which are refused; pydantic would take them for 1 and 0."""
        if not isinstance(data, dict):
            return data
        kinds = {name: _kinds_in(field.annotation) for name, field in cls.model_fields.items()}
        numbers = [name for name in data if kinds.get(name, set()) & {int, float} and bool not in kinds[name]]
        return data | {name: _with_truth_as_text(data[name]) for name in numbers}


def _kinds_in(annotation: Any) -> set[Any]:
    """The types that values of this type are made of in the end, such as str and int of dict[str, tuple[int, ...]]."""
    if get_origin(annotation) is Annotated:  # what is said beside a type need not be hashable
        return _kinds_in(annotation.__origin__)
    parts = get_args(annotation)
    return set[Any]().union(*map(_kinds_in, parts)) if parts else {annotation}


def _with_truth_as_text(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _with_truth_as_text(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_with_truth_as_text(item) for item in value]
    return str(value).lower() if isinstance(value, bool) else value
