"""YAML file + `--set` overrides -> `SearchConfig`, with every error of the file at once."""

import re
import shlex
from collections.abc import Mapping, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any, TypeVar, get_args, get_origin

from pydantic import BaseModel, ValidationError

from evomerge.config.schema import ModelConfig, SearchConfig
from evomerge.config.short_forms import long_form, long_forms, path_and_lora
from evomerge.core import ConfigError, FilePath, cached_model, load_yaml, nearest, why_unreadable

_Model = TypeVar("_Model", bound=BaseModel)

Overrides = str | Sequence[str] | Mapping[str, Any]
"""`a.b=value`, one or several, the value in YAML; or `a.b` -> the value"""


def read_config(path: FilePath, overrides: Overrides = ()) -> SearchConfig:
    """What a configuration file says, with overrides, and paths that count from the file made absolute.

    Raises:
        ConfigError: no such file, not YAML, or wrong; the message lists every wrong key with the nearest valid one.
    """
    path = Path(path)
    data = settings_of_file(path)
    if "merge_method" in data:
        raise ConfigError(f"{path}: is a recipe, not a search configuration; use it with evomerge merge or eval")
    if "genome" in data:
        raise ConfigError(
            f"{path}: is a configuration of mergekit-evolve; `evomerge init --mergekit-evolve {shlex.quote(str(path))}` translates it"
        )
    return parse_config(data, folder=path.resolve().parent, where=str(path), overrides=overrides)


def settings_of_file(path: Path) -> dict[str, Any]:
    """The settings of a configuration file as they stand there.

    Raises:
        ConfigError: no such file, not YAML, or not a mapping.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError(f"no such configuration file: {path}") from None
    except (OSError, UnicodeDecodeError) as problem:
        raise ConfigError(f"{path}: {why_unreadable(problem)}") from None
    return settings_in(text, str(path))


def settings_in(text: str, where: str) -> dict[str, Any]:
    """The settings of a configuration file's text as they stand there, before defaults and overrides.

    Raises:
        ConfigError: not YAML, or not a mapping.
    """
    data = load_yaml(text, where)
    if not isinstance(data, dict):
        raise ConfigError(
            f"{where}: expected a mapping of settings, got {'nothing' if data is None else type(data).__name__}"
        )
    return data


def parse_config(
    data: dict[str, Any], *, folder: Path, where: str = "config", overrides: Overrides = ()
) -> SearchConfig:
    """As `read_config`, from plain data; `folder` is what relative paths count from."""
    data = deepcopy(data)
    overrides = [overrides] if isinstance(overrides, str) else overrides
    for key, value in overrides.items() if isinstance(overrides, Mapping) else map(_key_and_value, overrides):
        _apply(data, key, value)
    if isinstance(overrides, Mapping):
        overrides = [f"{key}={value}" for key, value in overrides.items()]
    where += f" with --set {', --set '.join(overrides)}" if overrides else ""
    return _absolute(validated(SearchConfig, data, where), folder)


def validated(model: type[_Model], data: dict[str, Any], where: str) -> _Model:
    """`data` as the settings that `model` describes.

    Raises:
        ConfigError: wrong; the message lists every wrong key with the nearest valid one.
    """
    try:
        return model.model_validate(data)
    except ValidationError as problem:
        lines = _describe(problem, model)
        raise ConfigError(
            f"{where}: {len(lines)} problem{'s' if len(lines) > 1 else ''}\n"
            + "\n".join(f"  - {line}" for line in lines)
        ) from None


def _key_and_value(override: str) -> tuple[str, Any]:
    key, separator, text = override.partition("=")
    if not separator or not key.strip():
        raise ConfigError(f"--set {override!r}: expected key=value, e.g. --set budget.evaluations=200")
    return key.strip(), load_yaml(text, f"--set {key}") if text.strip() else None


def _apply(data: dict[str, Any], key: str, value: Any) -> None:
    path = key.split(".")
    node: Any = data
    for depth, part in enumerate(path, start=1):
        place = _place_in(node, part, path[: depth - 1], key)
        if depth == len(path):
            node[place] = value
            return
        if isinstance(node, dict) and node.get(place) is None:
            node[place] = {}
        node[place] = _long_form(node[place], path[:depth])
        node = node[place]


def _place_in(node: Any, part: str, above: Sequence[str], key: str) -> str | int:
    """The key or index that `part` of `key` is of the settings `above`."""
    if isinstance(node, dict):
        return part
    if not isinstance(node, list):
        raise ConfigError(f"--set {key}: {'.'.join(above)} is {node!r}, which has no {part!r}")
    if not part.isdecimal() or int(part) >= len(node):
        raise ConfigError(
            f"--set {key}: {'.'.join(above)} is a list of {len(node)}; expected a number below that, got {part!r}"
        )
    return int(part)


def _long_form(value: Any, path: Sequence[str]) -> Any:
    """Settings that stand in their short form, a plain text, as the mapping that they are short for."""
    match path:
        case ["models", "base"] | ["models", "experts", _]:
            return path_and_lora(value)
        case ["strategy"]:
            return long_form(value, "name")
        case ["engine"]:
            return long_form(value, "kind")
        case ["tasks"]:
            return long_forms(value, "task")
        case ["objectives"]:
            return long_forms(value, "name")
    return value


def _describe(problem: ValidationError, model: type[BaseModel]) -> list[str]:
    """One line for every setting of `model` that is wrong: where, what, and the nearest valid key of an unknown one."""
    lines: dict[str, list[str]] = {}
    got: dict[str, str] = {}
    for error in problem.errors():
        location = [str(part) for part in _without_kind(error["loc"]) if not _NO_KEY.fullmatch(str(part))]
        if len(location) > 1 and error["type"].startswith(f"{location[-1]}_"):
            location.pop()  # the kind of value that was tried
        place = ".".join(location)
        lines.setdefault(place, []).append(_in_words(error, location, model))
        value = error.get("input")
        if isinstance(value, str | int | float | bool | type(None)) and error["type"] not in _VALUE_SAYS_NOTHING:
            got[place] = f" (got {'nothing' if value is None else repr(value)})"
    # of a setting that may be one of several things, a line for each of them
    return [
        f"{place and f'{place}: '}{' or '.join(dict.fromkeys(lines[place])).replace(' or must be ', ' or ')}{got.get(place, '')}"
        for place in lines
    ]


_NO_KEY = re.compile(r"\[key\]|constrained-int|(function-after|literal|tuple)\[.*")
"""what pydantic puts among the keys: which alternative of a setting it tried"""

_VALUE_SAYS_NOTHING = ("missing", "value_error", "extra_forbidden")

_KINDS = {
    "dict_type": "must be a mapping, {name: value, ...}",
    "tuple_type": "must be a list",
    "list_type": "must be a list",
    "string_type": "must be a text",
    "int_type": "must be a whole number",
    "int_parsing": "must be a whole number",
    "int_from_float": "must be a whole number",
    "float_type": "must be a number",
    "float_parsing": "must be a number",
    "bool_type": "must be true or false",
    "bool_parsing": "must be true or false",
    "missing": "is missing",
    "too_long": "has too many values",
    "too_short": "must not be empty",
    "invalid_key": "a key must be a text; write it in quotes",
    "model_attributes_type": "must be a mapping of settings, {kind: ..., ...}",
}
"""pydantic's kind of an error -> the same in the words of YAML"""


def _without_kind(location: Sequence[Any]) -> Sequence[Any]:
    """`location` without the kind of evaluation that pydantic puts behind the key of that name."""
    return [*location[:1], *location[2:]] if location[:1] == ("evaluation",) else location


def _in_words(error: Any, location: Sequence[str], model: type[BaseModel]) -> str:
    kind = error["type"]
    if kind == "extra_forbidden":
        return "unknown key" + _where_instead(location, _keys_beside(error["loc"], model), model)
    if kind == "model_type":
        return f"must be a mapping of settings: {', '.join(_keys_beside([*error['loc'], ''], model))}"
    if kind == "union_tag_invalid":
        return f"kind: must be {' or '.join(error['ctx']['expected_tags'].split(', '))}, got {error['ctx']['tag']!r}"
    if error["loc"][-1:] == ("[key]",) and kind == "string_type":
        kind = "invalid_key"
    message = _KINDS.get(kind) or error["msg"].removeprefix("Value error, ")
    message = re.sub("^Input should be ", "must be ", message)
    return f"{message[0].lower()}{message[1:]}"


def _where_instead(location: Sequence[str], beside: Sequence[str], model: type[BaseModel]) -> str:
    """What the user may have meant by an unknown key: one that is spelt like it, or the same one in another place."""
    elsewhere = [path for path in _all_keys(model) if path.split(".")[-1] == location[-1]]
    elsewhere = [path for path in elsewhere if path != ".".join(location)]  # that of another kind of evaluation
    near = nearest(location[-1], beside) or sorted(elsewhere, key=lambda path: path.count("."))[:1]
    return f"; did you mean {near[0]!r}?" if near else f"; known: {', '.join(beside)}"


def _all_keys(model: type[BaseModel], above: str = "") -> list[str]:
    """Every key below `model`, dotted; those below names that a user chooses are left out."""
    keys = []
    for name, field in model.model_fields.items():
        keys.append(above + name)
        for found in _models_in(field.annotation):
            if dict not in {get_origin(field.annotation), *map(get_origin, get_args(field.annotation))}:
                keys += _all_keys(found, f"{above}{name}.")
    return keys


def _keys_beside(location: Sequence[Any], model: type[BaseModel]) -> list[str]:
    """Valid keys of the model that the last part of `location` was given to."""
    models: list[type[BaseModel]] = [model]
    for index, part in enumerate(location[:-1]):
        if index == 1 and location[0] == "evaluation":  # the kind that was chosen
            models = [each for each in models if each.model_fields["kind"].default == part]
            continue
        fields = [each.model_fields[part].annotation for each in models if part in each.model_fields]
        # a name that the user chose may be that of a setting
        models = [found for field in fields for found in _models_in(field)] or models
    return [name for each in models for name in each.model_fields]


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for argument in get_args(annotation) for model in _models_in(argument)]


def _joined(folder: Path, text: str) -> Path:
    """`text` as a path seen from `folder`, which has no links in it: leading `..` are taken back, as they stand in recipes and messages.

    `~/` is the user's home, as in a shell.
    """
    path = Path.home() / text[2:] if text.startswith("~/") else Path(text)
    while path.parts[:1] == ("..",):
        folder, path = folder.parent, Path(*path.parts[1:])
    return folder / path


def _placed(model: ModelConfig, folder: Path) -> ModelConfig:
    whole = _joined(folder, model.key)
    if model.lora is not None and whole.is_dir():  # no adapter: a folder with a plus in its name
        return model.model_copy(update={"path": str(whole), "lora": None})
    lora = None if model.lora is None else str(_folder_of(folder, model.lora))
    return model.model_copy(update={"path": str(_folder_of(folder, model.path)), "lora": lora})


def _folder_of(folder: Path, name: str) -> Path:
    """The folder `name` seen from `folder`; where there is none, the model of that name in the hub's cache, if it is there."""
    path = _joined(folder, name)
    return path if path.is_dir() else cached_model(name) or path


def _absolute(config: SearchConfig, folder: Path) -> SearchConfig:
    """The config with model folders, task and recipe files as absolute paths; names known to lm-eval stay as they are."""
    changes: dict[str, Any] = {}
    if config.models is not None:
        base = config.models.base and _placed(config.models.base, folder)
        if base is not None and base.lora is not None:
            raise ConfigError(
                f"models.base: {base.key!r} is a model with an adapter, and the base is a plain one; "
                "list it as an expert, or merge it into a folder first"
            )
        experts = {name: _placed(model, folder) for name, model in config.models.experts.items()}
        changes["models"] = config.models.model_copy(update={"base": base, "experts": experts})
    changes["tasks"] = tuple(
        task.model_copy(update={"task": str(_joined(folder, task.task))})
        if task.task.endswith((".yaml", ".yml"))
        else task
        for task in config.tasks
    )
    if config.baselines.recipes:
        recipes = tuple(str(_joined(folder, path)) for path in config.baselines.recipes)
        changes["baselines"] = config.baselines.model_copy(update={"recipes": recipes})
    if config.method is not None:
        changes["space"] = config.space.model_copy(update={"method": config.method})
        changes["method"] = None
    return config.model_copy(update=changes)
