"""Encodings of layer stacks: the path to which each point of a space decodes."""

import copy
import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from evomerge.core import SpaceError
from evomerge.recipe.stack_paths import Categorical, Indicator, Moves, PathEncoding, StackFrame, Step, Swap
from evomerge.space import SearchSpace

FRAME = StackFrame(
    models={"a": (0, 1, 2, 3), "b": (0, 1, 2, 3)},
    ends="a",
    n_layers=4,
    fixed_first=1,
    fixed_last=1,
    min_depth=3,
    max_depth=6,
    scale_low=0.5,
    scale_high=2.0,
)

ENCODINGS: dict[str, PathEncoding] = {
    "indicator": Indicator(FRAME, repeats=2, scales=True, matrix=False),
    "matrix": Indicator(FRAME, repeats=2, scales=True, matrix=True),
    "categorical": Categorical(FRAME, scales=True),
    "moves": Moves(FRAME, scales=True, n_moves=5),
    "swap": Swap(replace(FRAME, min_depth=4, max_depth=4), scales=True),
}


def drawn_path(encoding: PathEncoding, data: st.DataObject) -> tuple[Step, ...]:
    """The path of any point of the encoding's space."""
    space = SearchSpace(encoding.parameters())
    unit = st.floats(0, 1, allow_nan=False)
    point = data.draw(st.lists(unit, min_size=space.dimension, max_size=space.dimension))
    return encoding.path(space.decode(point))


def layers(path: tuple[Step, ...]) -> str:
    return " ".join(f"{step.model}{step.layer}" for step in path)


@pytest.mark.parametrize("name", ENCODINGS)
@settings(max_examples=50)
@given(data=st.data())
def test_every_point_gives_a_path_between_the_fixed_layers(name: str, data: st.DataObject) -> None:
    path, frame = drawn_path(ENCODINGS[name], data), ENCODINGS[name].frame
    assert frame.min_depth <= len(path) <= frame.max_depth
    assert path[0] == Step("a", 0)
    assert (path[-1].model, path[-1].layer) == ("a", 3)
    for step in path:
        assert step.layer in frame.models[step.model]
        assert 0.5 - 1e-12 <= step.scale <= 2.0 + 1e-12


@pytest.mark.parametrize("name", ENCODINGS)
@settings(max_examples=50)
@given(data=st.data())
def test_every_path_can_be_encoded_again(name: str, data: st.DataObject) -> None:
    encoding = ENCODINGS[name]
    path, space = drawn_path(encoding, data), SearchSpace(encoding.parameters())
    values = encoding.values_of(path)
    assert values is not None
    found = encoding.path(space.decode(space.encode(values)))
    assert layers(found) == layers(path)
    assert [step.scale for step in found] == pytest.approx([step.scale for step in path], rel=1e-9)


@pytest.mark.parametrize("name", ENCODINGS)
def test_unreachable_paths_have_no_point(name: str) -> None:
    encoding = ENCODINGS[name]
    own = encoding.frame.path([Step("a", 1), Step("b", 2)])
    assert encoding.values_of(own) is not None
    assert encoding.values_of(()) is None
    assert encoding.values_of(own[1:]) is None
    assert encoding.values_of(own[:1]) is None
    assert encoding.values_of([*own[:1], Step("c", 1), *own[2:]]) is None
    assert encoding.values_of([*own[:2], Step("b", 2, 2.1), *own[3:]]) is None
    assert encoding.values_of([Step("a", 0, 1.1), *own[1:]]) is None
    assert encoding.values_of([*own[:1], *own[1:-1] * 3, *own[-1:]]) is None


@pytest.mark.parametrize("name", ENCODINGS)
def test_own_path_of_each_model_is_a_point(name: str) -> None:
    encoding = ENCODINGS[name]
    space = SearchSpace(encoding.parameters())
    for model, expected in (("a", "a0 a1 a2 a3"), ("b", "a0 b1 b2 a3")):
        values = encoding.own_path(model)
        assert values is not None
        assert space.decode(space.encode(values)) == pytest.approx(values, abs=1e-12)
        path = encoding.path(values)
        assert layers(path) == expected
        assert {step.scale for step in path} == {1.0}


def taking(encoding: PathEncoding, **chosen: float) -> dict[str, float]:
    values = {parameter.name: 0.0 for parameter in encoding.parameters()}
    return values | {name: value for name, value in chosen.items() if name in values}


def test_indicator_takes_layers_in_order_within_each_repetition() -> None:
    encoding = ENCODINGS["indicator"]
    values = taking(encoding)
    for slot in ("take[0,a.1]", "take[0,b.2]", "take[1,a.1]"):
        values[slot] = 1.0
    values["log_take[0,b.2]"] = math.log(1.5)
    values["log_last"] = math.log(0.75)
    path = encoding.path(values)
    assert layers(path) == "a0 a1 b2 a1 a3"
    assert [step.scale for step in path] == pytest.approx([1, 1, 1.5, 1, 0.75])
    # published sizes: M layers of two models, r repetitions; the fixed layers are not offered again
    assert sum(parameter.choices != () for parameter in encoding.parameters()) == 2 * (2 + 4)


def test_matrix_scales_belong_to_pairs_of_layers() -> None:
    encoding = ENCODINGS["matrix"]
    values = taking(encoding)
    for slot in ("take[0,a.1]", "take[0,b.2]", "take[1,a.1]", "take[1,b.2]"):
        values[slot] = 1.0
    values["log_scale[a.1>b.2]"] = math.log(2.0)
    values["log_scale[first>a.1]"] = math.log(0.5)
    values["log_scale[b.2>last]"] = math.log(1.25)
    values["log_scale[first>last]"] = math.log(0.8)
    assert [step.scale for step in encoding.path(values)] == pytest.approx([1, 0.5, 2, 1, 2, 1.25])
    nothing = {name: 0.0 if name.startswith("take") else value for name, value in values.items()}
    assert [step.scale for step in replaced(encoding, min_depth=2).path(nothing)] == pytest.approx([1, 0.8])
    # published: every hop has a scale, whichever two layers it joins; a hop ends at one of the 6 offered layers or the last layer
    assert sum(parameter.choices == () for parameter in encoding.parameters()) == (6 + 1) * (6 + 1)


def replaced(encoding: Indicator, **changes: int) -> Indicator:
    return Indicator(replace(encoding.frame, **changes), repeats=encoding.repeats, scales=True, matrix=encoding.matrix)


@pytest.mark.parametrize("name", ENCODINGS)
def test_hop_into_a_fixed_last_layer_is_scaled(name: str) -> None:
    encoding = ENCODINGS[name]
    last = {p.name for p in encoding.parameters() if p.name == "log_last" or p.name.endswith(">last]")}
    path = encoding.path(taking(encoding) | dict.fromkeys(last, math.log(1.5)))
    assert path[-1] == Step("a", 3, pytest.approx(1.5))
    open_ended = replace(encoding.frame, fixed_last=0)
    without = copy.copy(encoding)
    without.frame = open_ended
    assert not last & {parameter.name for parameter in without.parameters()}


@pytest.mark.parametrize(
    ("low", "high", "n_free", "dtype", "message"),
    [
        (0.5, 2.0, 46, "bfloat16", None),
        (
            0.5,
            2.0,
            60,
            "bfloat16",
            "61 scales of 0.5 multiply .* by 2\\^61, but bfloat16 has room for 2\\^48; use at least 0.58",
        ),
        (0.5, 2.0, 10, "float16", "float16 has room for 2\\^10; use at least 0.533"),
        (0.54, 2.0, 10, "float16", None),
        (0.9, 3.0, 100, "float32", "scale_high: 101 scales of 3 .* 2\\^126; use at most 2.374"),
        (1.0, 1.0, 5000, "float16", None),
    ],
)
def test_scales_whose_product_exceeds_the_dtype_are_refused(
    low: float, high: float, n_free: int, dtype: str, message: str | None
) -> None:
    changes = {"scale_low": low, "scale_high": high, "max_depth": n_free + 2, "dtype": dtype}
    if message is None:
        assert replace(FRAME, **changes).n_scales == n_free + 1
        return
    with pytest.raises(SpaceError, match=message):
        replace(FRAME, **changes)


def test_long_path_is_cut_and_short_path_is_filled_with_own_layers() -> None:
    encoding = ENCODINGS["indicator"]
    everything = {name: float(name.startswith("take")) for name in taking(encoding)}
    assert layers(encoding.path(everything)) == "a0 a1 a2 b0 b1 a3"
    assert layers(encoding.path(taking(encoding))) == "a0 a1 a3"


def test_categorical_slots_hold_any_layer() -> None:
    encoding = ENCODINGS["categorical"]
    assert encoding.parameters()[0].choices == ("skip", "a.1", "a.2", "b.0", "b.1", "b.2", "b.3")
    values = taking(encoding) | {"slot[0]": 6.0, "slot[2]": 1.0, "slot[3]": 1.0, "log_slot[2]": math.log(0.5)}
    path = encoding.path(values)
    assert layers(path) == "a0 b3 a1 a1 a3"
    assert path[2].scale == pytest.approx(0.5)


def test_moves_go_forward_and_back() -> None:
    encoding = ENCODINGS["moves"]
    skip, back, a, b = 0.0, 1.0, 2.0, 3.0

    def walk(*moves: float) -> str:
        return layers(encoding.path(taking(encoding) | {f"move[{i}]": move for i, move in enumerate(moves)}))

    assert walk(a, b, a, a, a) == "a0 a1 b2 a3", "ends at the fixed last layer"
    assert walk(a, back, b, b, a) == "a0 a1 b1 b2 a3", "repeats position 1"
    assert walk(back, back, b, skip, a) == "a0 b1 a3", "stays at the start"
    assert walk(a, back, b, back, a) == "a0 a1 b1 a1 a3"


def test_swap_keeps_the_depth_and_offers_only_existing_layers() -> None:
    frame = replace(FRAME, models={"a": (0, 1, 2, 3), "b": (2, 3)}, min_depth=4, max_depth=4)
    encoding = Swap(frame, scales=False)
    assert [parameter.name for parameter in encoding.parameters()] == ["layer[2]"]
    assert layers(encoding.path({"layer[2]": 1.0})) == "a0 a1 b2 a3"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ends": "c"}, "'c' is not one of the stacked models"),
        ({"models": {"a": (0, 1), "b": ()}}, "no layers of b may be used"),
        ({"fixed_first": 3, "fixed_last": 2}, "are more than the 4 layers"),
        ({"min_depth": 1}, "fixed layers \\(2\\) <= min_depth \\(1\\)"),
        ({"min_depth": 7}, "min_depth \\(7\\) <= max_depth \\(6\\)"),
        ({"min_depth": 6}, "6 is more than the 4 layers"),
        ({"scale_low": 1.1}, "must be positive and include 1"),
    ],
)
def test_frames_without_a_path_are_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(SpaceError, match=message):
        replace(FRAME, **changes)


def test_categorical_parameters_have_intervals_of_equal_width() -> None:
    space = SearchSpace(ENCODINGS["categorical"].parameters())
    points = np.linspace(0, 1, 701)
    found = [space.decode([point] + [0.5] * (space.dimension - 1))["slot[0]"] for point in points]
    counts = np.bincount(np.array(found, dtype=int))
    assert counts.min() >= 99
    assert space.choices[:4] == (7, 7, 7, 7)
    assert space.choices[4:] == (0,) * 5, "one scale per slot and one at the entrance of the last layer"
