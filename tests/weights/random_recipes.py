"""Random recipes as people write them for mergekit: whole models or slices, with numbers, gradients and filters at every level."""

import random
from collections.abc import Mapping, Sequence
from typing import Any

from evomerge.recipe import METHODS, BaseRole, Scope
from evomerge.recipe.methods import MethodSpec, ParameterSpec

FILTERS = ("self_attn", "mlp", "down_proj", "layernorm", "embed_tokens", "lm_head", "norm", "layers.1", "weight")

COMPARABLE = [spec for spec in METHODS.values() if spec.deterministic]
"""methods without random masks"""


def random_document(rng: random.Random, base: str, experts: Sequence[str], n_layers: int) -> dict[str, Any]:
    """A mergekit document for models with `n_layers` layers, computed in float32.

    Args:
        rng: source of the random choices.
        base: the base model, used by methods that require one and by some of those that allow one.
        experts: at least three models.
        n_layers: layers of each model.
    """
    spec = rng.choice(COMPARABLE)
    most = min(spec.max_sources or len(experts), len(experts))
    sources = rng.sample(experts, rng.randint(spec.min_sources, most))
    with_base = spec.needs_base or (spec.base is BaseRole.OPTIONAL and rng.random() < 0.5)
    document: dict[str, Any] = {"merge_method": spec.name, "dtype": "float32"}
    if with_base:
        document["base_model"] = base
    if rng.random() < 0.5:
        listed = spec.base is BaseRole.ENDPOINT or (with_base and rng.random() < 0.4)
        document["models"] = _entries(rng, spec, sources, base if listed else None)
    else:
        document["slices"] = [
            _slice(rng, spec, sources, base if with_base else None, n_layers) for _ in range(rng.randint(1, 3))
        ]
    document["parameters"] = _parameters(rng, spec, Scope.GLOBAL, share=0.7)
    if rng.random() < 0.6:
        document["out_dtype"] = rng.choice(["float32", "bfloat16", "float16"])
    return document


def _slice(
    rng: random.Random, spec: MethodSpec, sources: Sequence[str], base: str | None, n_layers: int
) -> dict[str, Any]:
    """A slice of some layers, the same for all models or different for each; some slices have their own parameters."""
    count = rng.randint(1, 3)
    own = rng.random() < 0.4
    start = rng.randint(0, n_layers - count)
    entries = _entries(rng, spec, sources, base)
    for entry in entries:
        first = rng.randint(0, n_layers - count) if own else start
        entry["layer_range"] = [first, first + count]
    parameters = _parameters(rng, spec, Scope.GLOBAL, share=0.2)
    return {"sources": entries} | ({"parameters": parameters} if parameters else {})


def _entries(rng: random.Random, spec: MethodSpec, sources: Sequence[str], base: str | None) -> list[dict[str, Any]]:
    """The models in random order, each except the base with its own parameters."""
    entries: list[dict[str, Any]] = []
    for model in sources:
        parameters = _parameters(rng, spec, Scope.MODEL, share=0.7)
        entries.append({"model": model} | ({"parameters": parameters} if parameters else {}))
    if base is not None:
        entries.insert(rng.randint(0, len(entries)), {"model": base})
    return entries


def _parameters(rng: random.Random, spec: MethodSpec, scope: Scope, share: float) -> Mapping[str, Any]:
    """The parameters a method requires, and about a `share` of the others that have usual values."""
    usual = [
        row for row in spec.parameters if row.scope is scope and (isinstance(row.default, bool) or row.search_high)
    ]
    return {row.name: _value(rng, row) for row in usual if row.default is None or rng.random() < share}


def _value(rng: random.Random, row: ParameterSpec) -> Any:
    if isinstance(row.default, bool):
        return rng.random() < 0.5
    kind = rng.random()
    if kind < 0.5:
        return _number(rng, row)
    if kind < 0.75:
        return _gradient(rng, row)
    filters = [
        {"filter": rng.choice(FILTERS), "value": _gradient(rng, row) if rng.random() < 0.3 else _number(rng, row)}
        for _ in range(rng.randint(1, 3))
    ]
    return [*filters, {"value": _number(rng, row)}]


def _gradient(rng: random.Random, row: ParameterSpec) -> list[float]:
    return [_number(rng, row) for _ in range(rng.randint(2, 5))]


def _number(rng: random.Random, row: ParameterSpec) -> float:
    """A value within the usual bounds, but not near the lower one, where weights might sum to 0."""
    low, high = row.search_low or 0.0, row.search_high or 1.0
    return float(f"{rng.uniform(low + 0.1 * (high - low), high):.3g}")
