"""Descendants as piecewise combinations equal explicit successive SLERPs of weight vectors; their recipes are lossless."""

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from evomerge.core import Candidate, CrossoverGenome, Mutation, RecipeError, VectorGenome
from evomerge.recipe import (
    METHODS,
    PIECEWISE,
    Angle,
    Lineage,
    PieceTable,
    Recipe,
    Slice,
    Source,
    Span,
    SplitAt,
    WeightLayout,
    check_recipe,
    recipe_file_from_yaml,
    recipe_to_yaml,
    slerp_factors,
)

LAYOUT = WeightLayout(((("a", 70), ("b", 1), ("c", 129)), (("d", 50), ("e", 0), ("f", 90))))
SIZES = (200, 140)
SEEDS = ("s0", "s1", "s2")
POINTS = {name: VectorGenome(tuple(float(name == other) for other in SEEDS)) for name in SEEDS}


class Products:
    """Inner products of explicit seed vectors."""

    def __init__(self, seeds):
        self.seeds = seeds

    def before(self, chromosome, position):
        rows = np.array([seed[chromosome][:position] for seed in self.seeds])
        return rows @ rows.T


def seeds_of(seed):
    rng = np.random.default_rng(seed)
    common = [rng.normal(size=size) for size in SIZES]
    return [tuple(part + rng.normal(size=len(part)) for part in common) for _ in SEEDS]


def explicit_slerp(a, b, share):
    """SLERP of two whole vectors, from its definition on unit vectors."""
    cosine = np.clip(a / np.linalg.norm(a) @ (b / np.linalg.norm(b)), -1, 1)
    angle = np.arccos(cosine)
    if np.sin(angle) <= 1e-6:
        return (1 - share) * a + share * b
    return (np.sin((1 - share) * angle) * a + np.sin(share * angle) * b) / np.sin(angle)


def explicit_child(a, b, genome, angle):
    """The crossover of two models, each given as one vector per chromosome."""
    whole_a, whole_b = np.concatenate(a), np.concatenate(b)
    children = []
    offset = 0
    for part_a, part_b, split in zip(a, b, genome.splits, strict=True):
        cut = int(split * len(part_a))
        sides = []
        for side, share in ((slice(0, cut), genome.mix), (slice(cut, None), 1 - genome.mix)):
            if angle is Angle.SEGMENT:
                sides.append(explicit_slerp(part_a[side], part_b[side], share) if len(part_a[side]) else part_a[side])
            else:
                whole = explicit_slerp(whole_a, whole_b, share)
                sides.append(whole[offset : offset + len(part_a)][side])
        children.append(np.concatenate(sides))
        offset += len(part_a)
    return tuple(children)


def lineage_of(seeds, **options):
    return Lineage([Source(name) for name in SEEDS], LAYOUT, Products(seeds), **options)


@st.composite
def pedigrees(draw):
    """Twelve generations; each candidate is a child of two of the previous four."""
    genomes = dict(POINTS)
    for index in range(12):
        names = list(genomes)[-4:]
        first, second = draw(st.permutations(names))[:2]
        # each side of a split has zero or at least ten weights: fewer may form opposite vectors, whose angle is undefined
        splits = [draw(st.sampled_from([0.0, 1.0]) | st.floats(0.1, 0.9)) for _ in SIZES]
        genomes[f"c{index}"] = CrossoverGenome((first, second), draw(st.floats(0, 1)), tuple(splits))
    return genomes


def values_of(recipe, seeds):
    """The recipe's weights, computed from its spans."""
    layout = dict(LAYOUT.chromosomes[0]) | dict(LAYOUT.chromosomes[1])
    flat = [np.concatenate(seed) for seed in seeds]
    start, values = 0, []
    for name, size in layout.items():
        spans = recipe.pieces.tensors[name]
        for low, (end, row) in zip(
            [0, *(span.end for span in spans[:-1])], [(span.end, span.row) for span in spans], strict=True
        ):
            high = size if end is None else end
            weights = recipe.pieces.rows[row]
            values.append(sum(w * seed[start + low : start + high] for w, seed in zip(weights, flat, strict=True)))
        start += size
    return np.concatenate(values)


@pytest.mark.parametrize("angle", Angle)
@settings(max_examples=40)
@given(genomes=pedigrees(), seed=st.integers(0, 50))
def test_descendant_of_depth_12_equals_successive_slerps(angle, genomes, seed):
    seeds = seeds_of(seed)
    lineage = lineage_of(seeds, angle=angle)
    explicit = dict(zip(SEEDS, seeds, strict=True))
    for name, genome in genomes.items():
        if isinstance(genome, CrossoverGenome):
            explicit[name] = explicit_child(*(explicit[parent] for parent in genome.parents), genome, angle)
    recipe = lineage.recipe(Candidate("c11", genomes["c11"]), genomes.__getitem__)
    wanted = np.concatenate(explicit["c11"])
    assert np.linalg.norm(values_of(recipe, seeds) - wanted) <= 1e-9 * np.linalg.norm(wanted)
    assert Recipe.from_json(recipe.to_json()) == recipe
    assert recipe_file_from_yaml(recipe_to_yaml(recipe)).final == recipe


def test_lineage_may_be_deeper_than_the_stack_and_the_cache(monkeypatch):
    monkeypatch.setattr("evomerge.recipe.lineage._REMEMBERED", 4)
    genomes = dict(POINTS)
    previous = "s0"
    for index in range(3000):
        genomes[f"c{index}"] = CrossoverGenome((previous, SEEDS[index % 3]), 0.3, (0.5, 0.5))
        previous = f"c{index}"
    lineage = lineage_of(seeds_of(1))
    whole = lineage.combination(Candidate("c2999", genomes["c2999"]), genomes.__getitem__)
    for name in ("c10", "c2999"):  # dropped from the cache, and recomputed
        again = lineage.combination(Candidate(name, genomes[name]), genomes.__getitem__)
    assert all(np.array_equal(a, b) for a, b in zip(whole.rows, again.rows, strict=True))
    assert len(whole.ends[0]) == 2, "there must be one split point at any depth"
    assert whole.n_bytes < 1000


def test_equal_parents_are_interpolated_linearly():
    genomes = {**POINTS, "c": CrossoverGenome(("s1", "s1"), 0.3, (0.5, 0.5))}
    combination = lineage_of(seeds_of(2)).combination(Candidate("c", genomes["c"]), genomes.__getitem__)
    for rows in combination.rows:
        np.testing.assert_allclose(rows, [[0, 1, 0]], atol=1e-12)


def test_opposite_and_vanishing_vectors_are_interpolated_linearly():
    assert slerp_factors(0.25, 4.0, 1.0, -2.0) == (0.75, 0.25)
    assert slerp_factors(0.25, 4.0, 1.0, -2.0 + 1e-10) == (0.75, 0.25)
    assert slerp_factors(0.25, 0.0, 1.0, 0.0) == (0.75, 0.25)
    assert slerp_factors(0.5, 1.0, 1.0, 0.0) == pytest.approx((0.5**0.5, 0.5**0.5))


def test_splits_at_tensor_boundaries_have_a_mergekit_form():
    genomes = {**POINTS, "c": CrossoverGenome(("s0", "s1"), 0.3, (0.45, 0.7))}
    recipe = lineage_of(seeds_of(2), split=SplitAt.TENSOR).recipe(Candidate("c", genomes["c"]), genomes.__getitem__)
    assert not recipe.pieces.splits_tensors
    text = recipe_to_yaml(recipe)
    body = text[: text.index("# evomerge-recipe")]
    linear = recipe_file_from_yaml(body).final
    assert linear.method == "linear"
    for index, source in enumerate(linear.slices[0].sources):
        for name, spans in recipe.pieces.tensors.items():
            weight = next(s.value for s in source.parameters["weight"] if s.filter is None or s.filter in name)
            assert weight == recipe.pieces.rows[spans[0].row][index]


def test_filters_distinguish_names_contained_in_other_names():
    table = PieceTable(
        ((1.0,), (2.0,)), {"norm": (Span(None, 0),), "x.norm": (Span(None, 1),), "y.norm.z": (Span(None, 1),)}
    )
    recipe = Recipe(PIECEWISE.name, (Slice((Source("m"),)),), pieces=table)
    body = recipe_to_yaml(recipe).split("# evomerge-recipe")[0]
    settings_ = recipe_file_from_yaml(body).final.slices[0].sources[0].parameters["weight"]
    for name, (span,) in table.tensors.items():
        found = next(s.value for s in settings_ if s.filter is None or s.filter in name)
        assert found == table.rows[span.row][0], name


def test_file_says_what_mergekit_cannot_express():
    genomes = {**POINTS, "c": CrossoverGenome(("s0", "s1"), 0.3, (0.4, 0.7), Mutation(5, 0.1))}
    recipe = lineage_of(seeds_of(2)).recipe(Candidate("c", genomes["c"]), genomes.__getitem__)
    text = recipe_to_yaml(recipe)
    assert "mergekit cannot express this merge" in text
    assert all(line.startswith("#") for line in text.splitlines())
    assert recipe_file_from_yaml(text).final == recipe
    assert recipe.pieces.noise == (5,)


def test_pieces_are_refused_with_other_methods():
    assert PIECEWISE.name not in METHODS
    table = PieceTable(((1.0,),), {"a": (Span(None, 0),)})
    source = (Slice((Source("m"),)),)
    check_recipe(Recipe(PIECEWISE.name, source, pieces=table))
    for recipe in (Recipe("linear", source, pieces=table), Recipe(PIECEWISE.name, source)):
        with pytest.raises(RecipeError, match="pieces"):
            check_recipe(recipe)
    with pytest.raises(RecipeError, match="no base"):
        check_recipe(Recipe(PIECEWISE.name, source, "base", pieces=table))


@pytest.mark.parametrize(
    ("data", "complaint"),
    [
        ({"rows": [[1.0]], "tensors": {"a": [[3, 0], [3, 0], [None, 0]]}}, "increasing"),
        ({"rows": [[1.0]], "tensors": {"a": [[3, 0]]}}, "null"),
        ({"rows": [[1.0]], "tensors": {"a": 1}}, "rows must be"),
        ({"rows": [[1.0, 2.0]], "tensors": {"a": 0}}, "expected 1 finite"),
        ({"rows": [[float("nan")]], "tensors": {"a": 0}}, "expected 1 finite"),
        ({"rows": [[1.0]], "tensors": {"a": 0}, "noise": [1]}, "expected 2 finite"),
        ({"rows": [[1.0, float("inf")]], "tensors": {"a": 0}, "noise": [1]}, "expected 2 finite"),
        ({"rows": [[1.0, 0.1, 0.1]], "tensors": {"a": 0}, "noise": [1, 2**63]}, "expected seeds"),
        ({"rows": [[1.0]], "tensors": {"a": [[3, 0], [None, -1]]}}, "rows must be"),
        ({"rows": [["x"]], "tensors": {"a": 0}}, "numbers"),
        ({"rows": [[10**400]], "tensors": {"a": 0}}, "numbers"),
        ({"rows": [[1.0]], "tensors": {"a": True}}, "whole number"),
        ({"rows": [[1.0]], "tensors": {"a": "x"}}, "end, row"),
        ({"rows": [[1.0]], "tensors": {"a": {}}}, "end, row"),
        ({"rows": [[1.0]], "tensors": {"a": 0}, "nose": []}, "noise"),
        ({"rows": [[1.0]]}, "missing"),
        (3, "mapping"),
    ],
)
def test_broken_pieces_are_refused(data, complaint):
    recipe = {"method": "piecewise", "slices": [{"sources": [{"model": "m"}]}], "pieces": data}
    with pytest.raises(RecipeError, match=complaint):
        check_recipe(Recipe.from_json(recipe))


def test_genomes_of_another_shape_are_refused():
    lineage = lineage_of(seeds_of(0))
    with pytest.raises(RecipeError, match="2 coordinates, but there are 3 seed models"):
        lineage.combination(Candidate("p", VectorGenome((0.5, 0.5))), POINTS.__getitem__)
    with pytest.raises(RecipeError, match="1 split points, but there are 2 chromosomes"):
        lineage.combination(Candidate("c", CrossoverGenome(("s0", "s1"), 0.5, (0.5,))), POINTS.__getitem__)


def test_layout_ends_are_cumulative_sizes():
    assert LAYOUT.n_weights == 340
    assert [end - start for start, end in pairwise([0, *LAYOUT.ends(1)])] == [50, 0, 90]
