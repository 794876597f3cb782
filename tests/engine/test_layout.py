"""Layout discovery tested with small hand-written loaders that do what real engines do (and what they must not do)."""

import pytest
import torch

from evomerge.core import EngineError
from evomerge.engine.layout import discover_layout


def parameter(*shape, dtype=torch.float32):
    return torch.nn.Parameter(torch.zeros(shape, dtype=dtype), requires_grad=False)


def places(layout):
    return {
        name: [
            (tuple((part.start, part.stop) for part in region.index), tuple(region.view.shape))
            for region in layout.regions(name)
        ]
        for name in layout.names()
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_fused_padded_stacked_and_ignored_parameters_are_found(dtype):
    shapes = {
        "q": (700, 300),
        "k": (20, 300),
        "v": (20, 300),
        "norm": (300,),
        "embed": (515, 300),
        "head": (515, 300),
        **{f"experts.{i}.{kind}": (4, 6) for i in range(3) for kind in ("gate", "up")},
    }
    live = {
        "qkv": parameter(740, 300, dtype=dtype),
        "norm": parameter(300, dtype=dtype),
        "embed": parameter(576, 300, dtype=dtype),
        "w13": parameter(3, 8, 6, dtype=dtype),
        "scale": parameter(2, dtype=dtype),
    }
    live["scale"].fill_(1.0)
    live["counter"] = torch.arange(3)

    def load(pairs):
        for name, value in pairs:
            if name in ("q", "k", "v"):
                first = {"q": 0, "k": 700, "v": 720}[name]
                live["qkv"][first : first + value.shape[0]].copy_(value)
            elif name == "norm":
                live["norm"].copy_(value)
            elif name == "embed":
                live["embed"][:515].copy_(value)
                live["embed"][515:].zero_()
            elif name.startswith("experts"):
                _, index, kind = name.split(".")
                live["w13"][int(index)].narrow(0, 4 * (kind == "up"), 4).copy_(value)

    with torch.no_grad():
        layout = discover_layout(live, shapes, load)
    assert layout.ignored == ("head",)
    assert places(layout)["q"] == [(((0, 700), (0, 300)), (700, 300))]
    assert places(layout)["embed"] == [(((0, 515), (0, 300)), (515, 300))]
    assert places(layout)["experts.2.up"] == [(((0, 4), (0, 6)), (4, 6))]
    assert live["scale"].tolist() == [1.0, 1.0]
    layout.regions("experts.1.up")[0].view.fill_(7)
    assert bool((live["w13"][1, 4:] == 7).all())
    assert int((live["w13"] == 7).sum()) == 24
    layout.regions("v")[0].view.fill_(-5)
    assert bool((live["qkv"][720:] == -5).all())
    assert int((live["qkv"] == -5).sum()) == 6000
    assert bool((live["embed"][515:] == 0).all())


def test_many_tensors_in_bfloat16_are_told_apart():
    names = [f"t{i}" for i in range(600)]
    live = {"all": parameter(600, 4, dtype=torch.bfloat16)}

    def load(pairs):
        for name, value in pairs:
            live["all"][int(name[1:])].copy_(value)

    with pytest.raises(EngineError, match="'all'"):
        # A row of a matrix is a block in a vector's own dimensions only if the leading dimension is 1, which it is here;
        # two vectors in one row are not.
        discover_layout(live, dict.fromkeys(names, (2, 2)), lambda pairs: load((n, v.reshape(-1)) for n, v in pairs))
    layout = discover_layout(live, dict.fromkeys(names, (4,)), load)
    layout.regions("t599")[0].view.fill_(-3)
    assert live["all"][599].tolist() == [-3.0] * 4
    assert int((live["all"] == -3).sum()) == 4


def test_tensor_sharded_by_columns_is_found_in_both_parts():
    live = {"left": parameter(5, 3), "right": parameter(5, 4)}

    def load(pairs):
        for _, value in pairs:
            live["left"].copy_(value[:, :3])
            live["right"].copy_(value[:, 3:])

    layout = discover_layout(live, {"w": (5, 7)}, load)
    assert places(layout)["w"] == [(((0, 5), (0, 3)), (5, 3)), (((0, 5), (3, 7)), (5, 4))]


OTHER_FORMS = {
    "transposed": lambda value: value.T,
    "heads first": lambda value: value.view(3, 2, 6).transpose(0, 1).reshape(6, 6),
    "of another sign and scale": lambda value: -torch.exp(value),
}


def fused_with(change):
    """A loader of one parameter, half of it plain and half transformed, and of a plain parameter; and the parameters."""
    live = {"fused": parameter(12, 6), "plain": parameter(6, 6), "buffer": parameter(3)}

    def load(pairs):
        for name, value in pairs:
            if name == "odd":
                live["fused"][:6].copy_(change(value))
            elif name == "even":
                live["fused"][6:].copy_(value)
            else:
                live["plain"].copy_(value)

    return live, load


@pytest.mark.parametrize("change", OTHER_FORMS.values(), ids=OTHER_FORMS)
def test_transformed_tensors_go_through_the_loader(change):
    live, load = fused_with(change)
    shapes = dict.fromkeys(("other", "odd", "even"), (6, 6))
    layout = discover_layout(live, shapes, load, reload=True)
    assert "odd" in layout.reloaded
    assert "other" not in layout.reloaded
    values = {name: torch.randn(6, 6) for name in shapes}
    layout.fill(values.__getitem__)
    assert torch.equal(live["fused"], torch.cat([change(values["odd"]), values["even"]]))
    assert torch.equal(live["plain"], values["other"])
    layout.regions("odd")[0].view.zero_()
    layout.settle()
    assert torch.equal(live["fused"][:6], change(torch.zeros(6, 6)))


def test_parameter_computed_from_two_tensors_is_refused():
    live = {"product": parameter(6, 6), "plain": parameter(6, 6)}

    def load(pairs):
        values = dict(pairs)
        live["product"].copy_(values["a"] * values["b"])
        live["plain"].copy_(values["c"])

    with pytest.raises(EngineError, match="'product'"):
        discover_layout(live, dict.fromkeys("abc", (6, 6)), load, reload=True)


def test_loader_that_clears_tensors_it_is_not_given_is_refused():
    live, load = fused_with(OTHER_FORMS["transposed"])

    def forgetful(pairs):
        live["plain"].zero_()
        load(pairs)

    with pytest.raises(EngineError, match="'plain'"):
        discover_layout(live, dict.fromkeys(("other", "odd", "even"), (6, 6)), forgetful, reload=True)


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(lambda value: value.T, id="transposed"),
        pytest.param(lambda value: value.flip(0), id="reversed"),
        pytest.param(lambda value: value.view(3, 2, 6).transpose(0, 1).reshape(6, 6), id="permuted rows"),
        pytest.param(lambda value: value * 0.5, id="scaled"),
        pytest.param(lambda value: value + 1, id="shifted"),
        pytest.param(lambda value: value[[0, 1, 2, 3, 4, 4]], id="repeated row"),
    ],
)
def test_changed_order_or_values_are_refused(change):
    live = {"layer.weight": parameter(6, 6)}

    def load(pairs):
        for _, value in pairs:
            live["layer.weight"].copy_(change(value))

    with pytest.raises(EngineError, match=r"'layer\.weight'"):
        discover_layout(live, {"w": (6, 6)}, load)


def test_missing_part_is_refused():
    live = {"layer.weight": parameter(4, 6)}

    def load(pairs):
        for _, value in pairs:
            live["layer.weight"].copy_(value[:4])

    with pytest.raises(EngineError, match="only 24 of the 36 elements of checkpoint tensor 'w'"):
        discover_layout(live, {"w": (6, 6)}, load)


def test_quantised_parameter_is_refused():
    live = {"layer.weight": torch.nn.Parameter(torch.zeros(4, 4, dtype=torch.int8), requires_grad=False)}
    with pytest.raises(EngineError, match=r"'layer\.weight' has dtype torch\.int8"):
        discover_layout(live, {"w": (4, 4)}, lambda pairs: None)
