"""config -> the template of a layer stack."""

from collections.abc import Mapping
from dataclasses import replace

from evomerge.build.sources import written_dtype
from evomerge.config import SearchConfig, StackingConfig
from evomerge.core import ConfigError
from evomerge.plan import ModelHeader, folding_of
from evomerge.recipe import (
    MERGED,
    Categorical,
    Indicator,
    Moves,
    PathEncoding,
    RecipeTemplate,
    StackedModels,
    StackFrame,
    StackTemplate,
    Swap,
    scale_bounds,
)

USUAL_SCALES = (0.5, 2.0)
"""default bounds of scales"""


def stack_template(
    config: SearchConfig,
    wanted: StackingConfig,
    headers: Mapping[str, ModelHeader],
    *,
    merge: RecipeTemplate | None,
    plain: RecipeTemplate,
) -> StackTemplate:
    """Make the template of a configuration with `space.stacking`.

    Args:
        config: the configuration.
        wanted: its `space.stacking`.
        headers: model name in recipes -> header, the base first.
        merge: template of the merge by `space.method`, if `wanted.parameters` is set.
        plain: template of the baselines, which are not stacked.

    Raises:
        ConfigError: settings contradict each other or name an unknown model.
        SpaceError: no path satisfies the settings.
        RecipeError: scales cannot be folded into the weights of this architecture.
    """
    if config.engine.tensor_parallel > 1:
        raise ConfigError(
            "stacking: an engine with several processes serves only one depth; set engine.tensor_parallel: 1"
        )
    base, experts = config.base_key, config.expert_keys
    if merge is not None and MERGED in experts:
        raise ConfigError(
            f"models.experts.{MERGED}: this name is reserved for the merge with stacking.parameters; rename the expert"
        )
    keys = {**experts, **({"base": base} if base is not None else {})}
    models = StackedModels(experts, base, {name: headers[key].n_layers for name, key in keys.items()})
    first = next(iter(headers.values()))
    out_dtype = written_dtype(config, headers)
    dtype = "float16" if "float16" in (out_dtype, first.dtype, config.engine.dtype) else out_dtype
    frame = _frame(wanted, models.n_layers, merged=merge is not None, dtype=dtype)
    folding, *_ = [folding_of(headers[key]) for key in keys.values()]  # refuses models whose layers differ by position
    tensors = [name for header in headers.values() for name in header.tensors]
    return StackTemplate(
        models=models,
        encoding=_encoding(wanted, frame),
        folding=replace(folding, ends=tuple(text for text in folding.ends if any(text in name for name in tensors))),
        merge=merge,
        plain=plain,
        out_dtype=out_dtype,
    )


def _frame(wanted: StackingConfig, depths: Mapping[str, int], *, merged: bool, dtype: str) -> StackFrame:
    """The limits that all paths share. The merge counts as another model, of the same depth as the first."""
    n_layers = {**({MERGED: next(iter(depths.values()))} if merged else {}), **depths}
    layers = _usable_layers(wanted, n_layers)
    ends = wanted.ends or next(iter(layers))
    depth = n_layers[ends]
    if wanted.encoding in ("moves", "swap") and any(n_layers[name] != depth for name in layers):
        raise ConfigError(
            f"stacking: encoding {wanted.encoding} needs models of equal depth; "
            + ", ".join(f"{name} has {n_layers[name]}" for name in layers)
        )
    fixed = wanted.fixed_first + wanted.fixed_last
    swapping = wanted.encoding == "swap"
    frame = StackFrame(
        models=layers,
        ends=ends,
        n_layers=depth,
        fixed_first=wanted.fixed_first,
        fixed_last=wanted.fixed_last,
        min_depth=depth if swapping else wanted.min_depth or max(1, fixed),
        max_depth=depth if swapping else wanted.max_depth or max(depth + depth // 2, fixed),
        scale_low=1.0,
        scale_high=1.0,
        dtype=dtype,
    )
    if wanted.scales == "none":
        return frame
    lowest, highest = scale_bounds(frame.n_scales, dtype)
    return replace(
        frame,
        scale_low=max(USUAL_SCALES[0], lowest) if wanted.scale_low is None else wanted.scale_low,
        scale_high=min(USUAL_SCALES[1], highest) if wanted.scale_high is None else wanted.scale_high,
    )


def _usable_layers(wanted: StackingConfig, n_layers: Mapping[str, int]) -> dict[str, tuple[int, ...]]:
    """The layers of every model that a path may use; by default all layers of the merge and of every expert."""
    named = wanted.models or dict.fromkeys((name for name in n_layers if name != "base"), None)
    unknown = [name for name in [*named, *([wanted.ends] if wanted.ends else [])] if name not in n_layers]
    if unknown:
        hint = "; set stacking.parameters: true to stack the merge" if MERGED in unknown else ""
        raise ConfigError(f"stacking: no model is called {', '.join(unknown)}; known: {', '.join(n_layers)}{hint}")
    layers = {}
    for name, part in named.items():
        first, last = part or (0, n_layers[name])
        if not 0 <= first < last <= n_layers[name]:
            raise ConfigError(
                f"stacking.models.{name}: [{first}, {last}] must be a range within its {n_layers[name]} layers, [0, {n_layers[name]}]"
            )
        layers[name] = tuple(range(first, last))
    return layers


def _encoding(wanted: StackingConfig, frame: StackFrame) -> PathEncoding:
    scales = wanted.scales != "none"
    if wanted.encoding == "indicator":
        return Indicator(frame, repeats=wanted.repeats, scales=scales, matrix=wanted.scales == "matrix")
    if wanted.encoding == "categorical":
        return Categorical(frame, scales=scales)
    if wanted.encoding == "moves":
        return Moves(frame, scales=scales, n_moves=wanted.n_moves or max(1, 2 * len(frame.own)))
    return Swap(frame, scales=scales)
