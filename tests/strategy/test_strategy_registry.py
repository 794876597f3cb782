"""Names, options and plugins, and the error messages about them."""

import subprocess
import sys

import pytest

from evomerge.core import ConfigError, Evaluation, Objective, Split, Status, VectorGenome, random_stream
from evomerge.space import Parameter, SearchSpace
from evomerge.strategy import (
    STRATEGIES,
    Proposal,
    ReplayStrategy,
    candidate_id,
    make_strategy,
    registry,
    strategy_class,
    strategy_names,
    strategy_options,
    strategy_options_schema,
)
from evomerge.testing.strategy_checks import STRATEGY_CHECKS
from evomerge.testing.strategy_suite import strategy_cases


def test_names_are_sorted_and_include_the_built_in_strategies():
    assert set(STRATEGIES) <= set(strategy_names())
    assert list(strategy_names()) == sorted(strategy_names())


@pytest.mark.parametrize("name", sorted(STRATEGIES))
def test_every_option_has_a_default_and_a_description(name):
    schema = strategy_options_schema(name)
    for key, field in schema.get("properties", {}).items():
        assert key not in schema.get("required", []), key
        assert field.get("description"), key
    assert strategy_class(name).name == name
    strategy_options(name, {})


def test_unknown_names_and_options_name_the_nearest():
    for short, meant in (("cma", "cma_es"), ("nsga", "nsga2")):
        with pytest.raises(ConfigError, match=f"did you mean '{meant}'"):
            strategy_class(short)
    with pytest.raises(ConfigError, match="did you mean 'cma_es'"):
        make_strategy("cmaes", dimension=2, objectives=["a"], seed=1)
    with pytest.raises(ConfigError, match=r"did you mean 'auto'.*and in a configuration auto"):
        strategy_class("atuo")
    with pytest.raises(ConfigError, match=r"no option 'populationsize'.*did you mean 'population_size'"):
        make_strategy("cma_es", dimension=2, objectives=["a"], seed=1, populationsize=3)
    with pytest.raises(ConfigError, match="It has: none"):
        make_strategy("random", dimension=2, objectives=["a"], seed=1, sigma0=3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sigma0": -1.0}, "sigma0.*greater than 0.*got -1.0"),
        ({"sigma0": True}, "sigma0.*valid number.*got True"),
        ({"start": (0.5,)}, "start has 1 coordinates"),
        ({"start": (0.5, 1.5)}, r": start: .* or: \[1\]: .*less than or equal to 1, got \(0.5, 1.5\)$"),
        ({"start": "worst"}, r": start: .*'best' or 'centre' or: .*tuple, got 'worst'$"),
        ({"variant": "diag"}, "variant"),
    ],
)
def test_bad_option_values_are_config_errors(options, message):
    with pytest.raises(ConfigError, match=message):
        make_strategy("cma_es", dimension=2, objectives=["a"], seed=1, **options)


@pytest.mark.parametrize("sampler", ["BaseGASampler", "BruteForceSampler", "GridSampler", "TPE"])
def test_samplers_that_cannot_search_a_cube_are_config_errors(sampler):
    """Optuna itself reports this only at the first proposal, after a run has begun."""
    pytest.importorskip("optuna")
    with pytest.raises(ConfigError, match=sampler):
        make_strategy("optuna", dimension=2, objectives=["a"], seed=1, sampler=sampler)


def test_excessive_number_of_workers_is_refused():
    """nevergrad allocates something for each worker before its first proposal, which would fill the memory."""
    pytest.importorskip("nevergrad")
    with pytest.raises(ConfigError, match=r"n_workers.*less than or equal to 10000"):
        make_strategy("nevergrad", dimension=2, objectives=["a"], seed=1, n_workers=10**9)


def test_bad_arguments_are_config_errors():
    for arguments in ({"dimension": 0}, {"objectives": []}, {"seed": -1}):
        with pytest.raises(ConfigError):
            make_strategy("random", **{"dimension": 2, "objectives": ["a"], "seed": 1, **arguments})


def test_objectives_may_be_names():
    strategy = make_strategy("random", dimension=2, objectives=["math"], seed=1)
    assert strategy.objectives == (Objective("math"),)


def test_space_can_be_given_instead_of_its_dimension():
    space = SearchSpace([Parameter("a", 0.0, 2.0), Parameter("b", 0.0, 1.0)])
    by_space = make_strategy("cma_es", space=space, objectives=["math"], seed=1)
    assert by_space.ask(3) == make_strategy("cma_es", dimension=2, objectives=["math"], seed=1).ask(3)
    for wrong, got in (({}, "neither"), ({"space": space, "dimension": 2}, "both")):
        with pytest.raises(ConfigError, match=got):
            make_strategy("random", objectives=["math"], seed=1, **wrong)


def test_ids_sort_in_the_order_of_proposal():
    assert candidate_id(1) == "c000001"
    assert candidate_id(1234567) == "c1234567"


class _Point:
    def __init__(self, name, loader):
        self.name = name
        self.load = loader


def _broken():
    raise ImportError("no module named 'gone'")


def test_broken_plugin_does_not_affect_the_rest(monkeypatch):
    good = strategy_class("random")
    points = [
        _Point("broken", _broken),
        _Point("mine", lambda: good),
        _Point("sobol", _broken),
        _Point("odd", lambda: int),
    ]
    monkeypatch.setattr(registry, "entry_points", lambda group: points)
    assert {"broken", "mine", "odd"} <= set(strategy_names())
    assert make_strategy("mine", dimension=2, objectives=["a"], seed=1).ask(1)
    assert make_strategy("sobol", dimension=2, objectives=["a"], seed=1).ask(1)
    with pytest.raises(ConfigError, match="'broken' cannot be loaded: no module"):
        strategy_class("broken")
    with pytest.raises(ConfigError, match="options_type"):
        strategy_options("odd", {})


class _Mirrored(ReplayStrategy):
    """A plugin's strategy: random points, each followed by its mirror image."""

    name = "mirrored"

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self._stream, self._last = random_stream(self.random_seed, "mirrored"), None

    def _propose(self):
        if self._last is not None:
            point, self._last = tuple(1.0 - value for value in self._last), None
        else:
            point = self._last = tuple(self._stream.random(self.dimension).tolist())
        return Proposal(VectorGenome(point))

    def _learn(self, told):
        pass


def test_plugin_goes_through_the_same_checks(monkeypatch):
    monkeypatch.setattr(registry, "entry_points", lambda group: [_Point("mirrored", lambda: _Mirrored)])
    cases = [case for case in strategy_cases() if case.name == "mirrored"]
    assert cases
    for check in STRATEGY_CHECKS:
        check(cases[0])


def test_missing_library_error_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "evomerge.strategy.bo", None)
    with pytest.raises(ConfigError, match=r"'bo' cannot be loaded.*the extra evomerge\[bo\]"):
        strategy_class("bo")


def test_importing_the_package_loads_no_library():
    code = (
        "import sys, evomerge.strategy, evomerge.archive\n"
        "print([m for m in ('cma','pymoo','optuna','nevergrad','scipy','moocore','torch','botorch') if m in sys.modules])"
    )
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert output.strip() == "[]"


@pytest.mark.parametrize(
    ("optimizer", "why"),
    [
        ("BO", "proposes a point twice"),
        ("Carola3", "fails at the second result"),
        ("FCMA", "Please install fcmaes"),
        ("PCABO", "strictly sequential"),
        ("DiscreteDoerrOnePlusOne", "strictly sequential"),
        ("Powell", "strictly sequential"),
    ],
)
def test_unusable_nevergrad_optimizers_are_refused_at_once(optimizer, why):
    pytest.importorskip("nevergrad")
    with pytest.raises(ConfigError, match=f"strategy nevergrad: {optimizer} cannot be used.*{why}"):
        make_strategy("nevergrad", dimension=5, objectives=["a", "b"], seed=1, optimizer=optimizer)


@pytest.mark.parametrize("optimizer", ["CMA", "DiagonalCMA", "MultiCMA", "SQOPSODCMA", "NGOpt"])
@pytest.mark.parametrize("objectives", [["a"], ["a", "b"]])
def test_nevergrad_needs_no_other_package_in_one_dimension(optimizer, objectives):
    pytest.importorskip("nevergrad")
    for dimension in (1, 2):
        strategy = make_strategy("nevergrad", dimension=dimension, objectives=objectives, seed=1, optimizer=optimizer)
        for number in range(12):
            (candidate,) = strategy.ask(1)
            assert len(candidate.point) == dimension
            scores = {"a": -abs(candidate.point[0] - 0.3), "b": float(number)}
            scores = {name: scores[name] for name in objectives}
            strategy.tell([Evaluation(candidate.id, Split.SEARCH, Status.OK, scores)])
