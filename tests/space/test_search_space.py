import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from evomerge.core import SpaceError
from evomerge.space import MAX_DIMENSION, Parameter, SearchSpace

bounds = st.tuples(st.floats(-1e6, 1e6), st.floats(1e-3, 1e6)).map(lambda pair: (pair[0], pair[0] + pair[1]))


@given(st.lists(bounds, min_size=1, max_size=8), st.data())
def test_decoding_stays_in_bounds_and_encoding_reverses_it(
    limits: list[tuple[float, float]], data: st.DataObject
) -> None:
    space = SearchSpace([Parameter(f"p{index}", low, high) for index, (low, high) in enumerate(limits)])
    point = data.draw(st.lists(st.floats(0, 1), min_size=len(limits), max_size=len(limits)))
    values = space.decode(point)
    assert all(parameter.low <= values[parameter.name] <= parameter.high for parameter in space.parameters)
    scale = [1 + abs(low) / (high - low) for low, high in limits]
    assert np.allclose(space.encode(values), point, atol=1e-9 * max(scale))


def test_rounding_does_not_exceed_a_bound() -> None:
    """A recipe from the edge of the space must count as inside when given as a baseline."""
    assert 0.3 + (0.9 - 0.3) > 0.9
    space = SearchSpace([Parameter("a", 0.3, 0.9)])
    assert space.decode([1.0]) == {"a": 0.9}
    assert space.encode({"a": 0.9}) == [1.0]


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ([], "no parameters"),
        ([Parameter("a", 0, 1), Parameter("a", 0, 2)], "appears twice"),
        ([Parameter("a", 1, 1)], "low < high"),
        ([Parameter("a", 2, 1)], "low < high"),
        ([Parameter("a", 0, float("inf"))], "finite"),
        ([Parameter("a", -1e308, 1e308)], "finite"),
        ([Parameter("a", float("nan"), 1)], "finite"),
        ([Parameter(f"p{i}", 0, 1) for i in range(MAX_DIMENSION + 1)], "the limit is"),
    ],
)
def test_impossible_spaces_are_refused(parameters: list[Parameter], message: str) -> None:
    with pytest.raises(SpaceError, match=message):
        SearchSpace(parameters)


def test_points_and_values_that_do_not_fit_are_refused() -> None:
    space = SearchSpace([Parameter("a", 0, 2), Parameter("b", -1, 1)])
    with pytest.raises(SpaceError, match=r"shape \(2,\), got \(1,\)"):
        space.decode([0.5])
    for outside in (float("nan"), -0.01, 1.01):
        with pytest.raises(SpaceError, match="must be in"):
            space.decode([0.5, outside])
    with pytest.raises(SpaceError, match=r"'a': value 3 is outside \[0, 2\]"):
        space.encode({"a": 3, "b": 0})
    with pytest.raises(SpaceError, match=r"missing: \['b'\]; unknown: \['c'\]"):
        space.encode({"a": 1, "c": 0})


@pytest.mark.parametrize("value", [-0.2, 0.5, 2.4, 3.0, float("nan")])
def test_value_that_is_not_a_choice_is_refused(value: float) -> None:
    space = SearchSpace([Parameter.categorical("a", ["x", "y", "z"])])
    with pytest.raises(SpaceError, match="is not one of 0, 1, 2"):
        space.encode({"a": value})


def test_families_are_numbered_in_order_and_not_part_of_the_fingerprint() -> None:
    families = ("x", "", "y", "x", "", "y")
    space = SearchSpace([Parameter(f"p{index}", 0, 1, family=family) for index, family in enumerate(families)])
    assert space.families == (0, 1, 2, 0, 3, 2)
    assert space.fingerprint == SearchSpace([Parameter(f"p{index}", 0, 1) for index in range(6)]).fingerprint


def test_fingerprint_distinguishes_spaces() -> None:
    space = SearchSpace([Parameter("a", 0, 2)])
    assert space.fingerprint == SearchSpace([Parameter("a", 0, 2)]).fingerprint
    assert space.fingerprint != SearchSpace([Parameter("a", 0, 3)]).fingerprint
