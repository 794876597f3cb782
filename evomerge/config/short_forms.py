"""Short forms of settings: plain strings that stand for mappings."""

from typing import Any

from pydantic import BeforeValidator


def long_form(value: Any, key: str) -> Any:
    """Expand a string to the mapping `{key: value}`; return anything else unchanged."""
    return {key: value} if isinstance(value, str) else value


def long_forms(value: Any, key: str) -> Any:
    """Apply `long_form` to every element of a list; a single string counts as a list of one."""
    value = [value] if isinstance(value, str) else value
    return [long_form(element, key) for element in value] if isinstance(value, list) else value


def short_for(key: str) -> BeforeValidator:
    """Let a setting be given as a string, the value of its `key`."""
    return BeforeValidator(lambda value: long_form(value, key))


def short_for_each(key: str) -> BeforeValidator:
    """Let each element of a list of settings be given as a string, the value of its `key`; a single string is a list of one."""
    return BeforeValidator(lambda value: long_forms(value, key))


def one_or_several(value: Any) -> Any:
    """Reduce a list of one method to that method.

    Raises:
        ValueError: the value is neither a string nor a non-empty list of strings.
    """
    names = value if isinstance(value, list | tuple) else [value]
    if not names or not all(isinstance(name, str) for name in names):
        raise ValueError("expected a merge method, or a list of merge methods")
    return names[0] if len(names) == 1 else names


def weights_of_objectives(config: Any) -> Any:
    """Move `strategy.weights`, where `cma_es` had them in runs started before 2026-11-28, to the objectives.

    Raises:
        ValueError: the weights do not cover exactly the objectives.
    """
    strategy = config.get("strategy") if isinstance(config, dict) else None
    if not isinstance(strategy, dict) or strategy.get("name", "cma_es") not in ("cma_es", "auto"):
        return config
    weights = strategy.get("weights")
    if not isinstance(weights, dict):
        return config
    objectives = long_forms(config.get("objectives") or list(weights), "name")
    entries = objectives if isinstance(objectives, list) else []
    names = [entry.get("name") for entry in entries if isinstance(entry, dict)]
    if set(names) != set(weights) or len(names) != len(objectives):
        raise ValueError(
            "strategy.weights: set the weight of each objective instead: objectives: [{name: ..., weight: ...}]"
        )
    return config | {
        "strategy": {key: value for key, value in strategy.items() if key != "weights"},
        "objectives": [{**objective, "weight": weights[objective["name"]]} for objective in objectives],
    }


def path_and_lora(value: Any) -> Any:
    """Expand a model given as `path` or `path+lora` to its settings; return anything else unchanged."""
    if not isinstance(value, str):
        return value
    path, _, lora = value.partition("+")
    return {"path": path, "lora": lora or None}
