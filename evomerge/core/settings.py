"""The base class of all settings that users write. Not imported by `evomerge.core` itself, since it imports pydantic."""

from typing import Annotated, Any, get_args, get_origin

from pydantic import BaseModel, ConfigDict, model_validator


class Settings(BaseModel):
    """Refuses unknown keys, is immutable, and does not accept true and false as numbers."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    @model_validator(mode="before")
    @classmethod
    def _refuse_bools_as_numbers(cls, data: Any) -> Any:
        """Convert true and false to strings where numbers are expected, so that they are refused; pydantic would convert them to 1 and 0."""
        if not isinstance(data, dict):
            return data
        kinds = {name: _kinds_in(field.annotation) for name, field in cls.model_fields.items()}
        numbers = [name for name in data if kinds.get(name, set()) & {int, float} and bool not in kinds[name]]
        return data | {name: _with_bools_as_strings(data[name]) for name in numbers}


def _kinds_in(annotation: Any) -> set[Any]:
    """The innermost types of a type, e.g. str and int for dict[str, tuple[int, ...]]."""
    if get_origin(annotation) is Annotated:  # the metadata of Annotated may not be hashable
        return _kinds_in(annotation.__origin__)
    parts = get_args(annotation)
    return set[Any]().union(*map(_kinds_in, parts)) if parts else {annotation}


def _with_bools_as_strings(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _with_bools_as_strings(element) for key, element in value.items()}
    if isinstance(value, list):
        return [_with_bools_as_strings(element) for element in value]
    return str(value).lower() if isinstance(value, bool) else value
