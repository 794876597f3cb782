"""Settings that may be given as a plain text, and the mappings that they are short for."""

from typing import Any

from pydantic import BeforeValidator


def long_form(value: Any, key: str) -> Any:
    """A setting that is given in its short form, a plain text, as the mapping that this is short for; anything else as it is."""
    return {key: value} if isinstance(value, str) else value


def long_forms(value: Any, key: str) -> Any:
    """The same for each of a list, which may itself be one plain text."""
    value = [value] if isinstance(value, str) else value
    return [long_form(item, key) for item in value] if isinstance(value, list) else value


def short_for(key: str) -> BeforeValidator:
    """Of settings for whose `key` alone a plain text will do."""
    return BeforeValidator(lambda value: long_form(value, key))


def short_for_each(key: str) -> BeforeValidator:
    """The same of a list of them, which may itself be one plain text."""
    return BeforeValidator(lambda value: long_forms(value, key))


def one_or_several(value: Any) -> Any:
    """A list of one method is that method.

    Raises:
        ValueError: it is neither a text nor a list of texts.
    """
    names = value if isinstance(value, list | tuple) else [value]
    if not names or not all(isinstance(name, str) for name in names):
        raise ValueError("expected a merge method, or a list of merge methods")
    return names[0] if len(names) == 1 else names


def weights_of_objectives(config: Any) -> Any:
    """A configuration with the weights of `cma_es`, where runs begun before 2026-11-28 have them, as those of its objectives.

    Raises:
        ValueError: they are not those of all objectives.
    """
    strategy = config.get("strategy") if isinstance(config, dict) else None
    if not isinstance(strategy, dict) or strategy.get("name", "cma_es") not in ("cma_es", "auto"):
        return config
    weights = strategy.get("weights")
    if not isinstance(weights, dict):
        return config
    objectives = long_forms(config.get("objectives") or list(weights), "name")
    names = [item.get("name") for item in objectives if isinstance(item, dict)] if isinstance(objectives, list) else []
    if set(names) != set(weights) or len(names) != len(objectives):
        raise ValueError(
            "strategy.weights: give each objective its weight instead: objectives: [{name: ..., weight: ...}]"
        )
    return config | {
        "strategy": {key: value for key, value in strategy.items() if key != "weights"},
        "objectives": [{**item, "weight": weights[item["name"]]} for item in objectives],
    }


def path_and_lora(value: Any) -> Any:
    """The settings of a model that is given in its short form; anything else as it is."""
    if not isinstance(value, str):
        return value
    path, _, lora = value.partition("+")
    return {"path": path, "lora": lora or None}
