"""Merging recipes in one line, with three small models that differ in every weight."""

from safetensors.torch import load_file

from evomerge.build import merge_recipe
from evomerge.testing.tiny_models import write_tiny_llama

LINEAR = "merge_method: linear\nmodels: [{model: a, parameters: {weight: 1}}, {model: b, parameters: {weight: 1}}]\n"


def three_models(folder):
    """Writes models a, b and c to `folder` and returns it."""
    for seed, name in enumerate("abc"):
        write_tiny_llama(folder / name, seed=seed, dtype="float32")
    return folder


def merge(folder, text, **options):
    """The merged tensors of the recipe `text`; the recipe is written to `folder`, and the result to its subfolder `out`."""
    (folder / "r.yml").write_text(text)
    return load_file(merge_recipe(folder / "r.yml", folder / "out", **options) / "model.safetensors")
