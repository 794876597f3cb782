"""Recipes merged in one line, of three small models that differ in every weight."""

from safetensors.torch import load_file

from evomerge.build import merge_recipe
from evomerge.testing.tiny_models import write_tiny_llama

LINEAR = "merge_method: linear\nmodels: [{model: a, parameters: {weight: 1}}, {model: b, parameters: {weight: 1}}]\n"


def three_models(folder):
    """Models a, b and c in `folder`, which is returned."""
    for seed, name in enumerate("abc"):
        write_tiny_llama(folder / name, seed=seed, dtype="float32")
    return folder


def merge(folder, text, **options):
    """The tensors of the recipe `text`, which is in `folder`, where the result is `out`."""
    (folder / "r.yml").write_text(text)
    return load_file(merge_recipe(folder / "r.yml", folder / "out", **options) / "model.safetensors")
