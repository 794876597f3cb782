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
    """Read and validate a configuration file, apply the overrides, and make paths that are relative to the file absolute.

    Raises:
        ConfigError: the file is missing, not YAML, or invalid; the message lists every wrong key with the nearest valid one.
    """
    path = Path(path)
    data = settings_of_file(path)
    if "merge_method" in data:
        raise ConfigError(f"{path}: this is a recipe, not a search configuration; use it with evomerge merge or eval")
    if "genome" in data:
        raise ConfigError(
            f"{path}: this is a mergekit-evolve configuration; `evomerge init --mergekit-evolve {shlex.quote(str(path))}` translates it"
        )
    return parse_config(data, folder=path.resolve().parent, where=str(path), overrides=overrides)


def settings_of_file(path: Path) -> dict[str, Any]:
    """The settings of a configuration file as written there, before defaults and overrides.

    Raises:
        ConfigError: the file is missing, not YAML, or not a mapping.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError(f"no such configuration file: {path}") from None
    except (OSError, UnicodeDecodeError) as problem:
        raise ConfigError(f"{path}: {why_unreadable(problem)}") from None
    return settings_in(text, str(path))


def settings_in(text: str, where: str) -> dict[str, Any]:
    """Like `settings_of_file`, for text that has already been read from `where`.

    Raises:
        ConfigError: the text is not YAML, or not a mapping.
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
    """Like `read_config`, from plain data; relative paths are resolved against `folder`."""
    data = deepcopy(data)
    overrides = [overrides] if isinstance(overrides, str) else overrides
    for key, value in overrides.items() if isinstance(overrides, Mapping) else map(_key_and_value, overrides):
        _apply(data, key, value)
    if isinstance(overrides, Mapping):
        overrides = [f"{key}={value}" for key, value in overrides.items()]
    where += f" with --set {', --set '.join(overrides)}" if overrides else ""
    return _absolute(validated(SearchConfig, data, where), folder)


def validated(model: type[_Model], data: dict[str, Any], where: str) -> _Model:
    """Validate `data` against `model`.

    Raises:
        ConfigError: the data is invalid; the message lists every wrong key with the nearest valid one.
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
    """`part` of the dotted `key` as a key or list index of `node`, the value at the path `above`."""
    if isinstance(node, dict):
        return part
    if not isinstance(node, list):
        raise ConfigError(f"--set {key}: {'.'.join(above)} is {node!r}, which has no key {part!r}")
    if not part.isdecimal() or int(part) >= len(node):
        raise ConfigError(
            f"--set {key}: {'.'.join(above)} is a list of length {len(node)}; expected an index below that, got {part!r}"
        )
    return int(part)


def _long_form(value: Any, path: Sequence[str]) -> Any:
    """Expand a setting given in its short form, a plain string, to the mapping it stands for; return anything else unchanged."""
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
    """One line for every wrong setting: where, what is wrong, and for an unknown key the nearest valid one."""
    lines: dict[str, list[str]] = {}
    got: dict[str, str] = {}
    for error in problem.errors():
        location = [str(part) for part in _without_kind(error["loc"]) if not _NO_KEY.fullmatch(str(part))]
        if len(location) > 1 and error["type"].startswith(f"{location[-1]}_"):
            location.pop()  # the type that pydantic tried
        place = ".".join(location)
        lines.setdefault(place, []).append(_in_words(error, location, model))
        value = error.get("input")
        if isinstance(value, str | int | float | bool | type(None)) and error["type"] not in _VALUE_SAYS_NOTHING:
            got[place] = f" (got {'nothing' if value is None else repr(value)})"
    # a setting of a union type has one error per alternative: join them into one line
    return [
        f"{place and f'{place}: '}{' or '.join(dict.fromkeys(lines[place])).replace(' or must be ', ' or ')}{got.get(place, '')}"
        for place in lines
    ]


_NO_KEY = re.compile(r"\[key\]|constrained-int|(function-after|literal|tuple)\[.*")
"""parts of an error's location that are not keys: pydantic's names for the alternative it tried"""

_VALUE_SAYS_NOTHING = ("missing", "value_error", "extra_forbidden")

_KINDS = {
    "dict_type": "must be a mapping, {name: value, ...}",
    "tuple_type": "must be a list",
    "list_type": "must be a list",
    "string_type": "must be a string",
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
    "invalid_key": "a key must be a string; put it in quotes",
    "model_attributes_type": "must be a mapping of settings, {kind: ..., ...}",
}
"""pydantic's error type -> a message in YAML terms"""


def _without_kind(location: Sequence[Any]) -> Sequence[Any]:
    """`location` without the kind of evaluation, which pydantic inserts after the key `evaluation`."""
    return [*location[:1], *location[2:]] if location[:1] == ("evaluation",) else location


def _in_words(error: Any, location: Sequence[str], model: type[BaseModel]) -> str:
    kind = error["type"]
    if kind == "extra_forbidden":
        return "unknown key" + _suggestion(location, _valid_keys_at(error["loc"], model), model)
    if kind == "model_type":
        return f"must be a mapping of settings: {', '.join(_valid_keys_at([*error['loc'], ''], model))}"
    if kind == "union_tag_invalid":
        return f"kind: must be {' or '.join(error['ctx']['expected_tags'].split(', '))}, got {error['ctx']['tag']!r}"
    if error["loc"][-1:] == ("[key]",) and kind == "string_type":
        kind = "invalid_key"
    message = _KINDS.get(kind) or error["msg"].removeprefix("Value error, ")
    message = re.sub("^Input should be ", "must be ", message)
    return f"{message[0].lower()}{message[1:]}"


def _suggestion(location: Sequence[str], valid: Sequence[str], model: type[BaseModel]) -> str:
    """A hint for an unknown key: a similar key in the same place, the same key elsewhere, or else all known keys."""
    elsewhere = [path for path in _all_keys(model) if path.split(".")[-1] == location[-1]]
    elsewhere = [path for path in elsewhere if path != ".".join(location)]  # belongs to another kind of evaluation
    near = nearest(location[-1], valid) or sorted(elsewhere, key=lambda path: path.count("."))[:1]
    return f"; did you mean {near[0]!r}?" if near else f"; known: {', '.join(valid)}"


def _all_keys(model: type[BaseModel], above: str = "") -> list[str]:
    """Every key of `model` and its nested models, dotted; leaves out keys below names that the user chooses."""
    keys = []
    for name, field in model.model_fields.items():
        keys.append(above + name)
        for nested in _models_in(field.annotation):
            if dict not in {get_origin(field.annotation), *map(get_origin, get_args(field.annotation))}:
                keys += _all_keys(nested, f"{above}{name}.")
    return keys


def _valid_keys_at(location: Sequence[Any], model: type[BaseModel]) -> list[str]:
    """The valid keys at `location`: those of the nested model which should have its last part as a key."""
    models: list[type[BaseModel]] = [model]
    for index, part in enumerate(location[:-1]):
        if index == 1 and location[0] == "evaluation":  # the kind that was chosen
            models = [nested for nested in models if nested.model_fields["kind"].default == part]
            continue
        fields = [nested.model_fields[part].annotation for nested in models if part in nested.model_fields]
        # no field: a list index, or a name that the user chose
        models = [nested for field in fields for nested in _models_in(field)] or models
    return [name for nested in models for name in nested.model_fields]


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for argument in get_args(annotation) for model in _models_in(argument)]


def _joined(folder: Path, text: str) -> Path:
    """The path `text` relative to `folder`, which must be free of symbolic links.

    Leading `..` are resolved, so that recipes and messages show plain paths. `~/` is the user's home, as in a shell.
    """
    path = Path.home() / text[2:] if text.startswith("~/") else Path(text)
    while path.parts[:1] == ("..",):
        folder, path = folder.parent, Path(*path.parts[1:])
    return folder / path


def _placed(model: ModelConfig, folder: Path) -> ModelConfig:
    whole = _joined(folder, model.key)
    if model.lora is not None and whole.is_dir():  # not an adapter but a folder with a plus in its name
        return model.model_copy(update={"path": str(whole), "lora": None})
    lora = None if model.lora is None else str(_folder_of(folder, model.lora))
    return model.model_copy(update={"path": str(_folder_of(folder, model.path)), "lora": lora})


def _folder_of(folder: Path, name: str) -> Path:
    """The folder `name` relative to `folder`; if there is none, the model of that name in the hub cache, if it is cached."""
    path = _joined(folder, name)
    return path if path.is_dir() else cached_model(name) or path


def _absolute(config: SearchConfig, folder: Path) -> SearchConfig:
    """The config with absolute paths of model folders, task files and recipe files; names of lm-eval tasks are kept."""
    changes: dict[str, Any] = {}
    if config.models is not None:
        base = config.models.base and _placed(config.models.base, folder)
        if base is not None and base.lora is not None:
            raise ConfigError(
                f"models.base: {base.key!r} has an adapter, but the base must be a plain model; "
                "list it as an expert, or merge the adapter into a folder first"
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
