"""Recipe files of several documents, some of which define models used by others."""

import pytest

from evomerge.core import RecipeError
from evomerge.recipe import read_recipe, read_recipe_file, recipe_file_from_yaml, recipe_to_yaml

DOCUMENTS = """
name: first
merge_method: linear
models: [{model: a, parameters: {weight: 1}}, {model: b, parameters: {weight: 3}}]
---
merge_method: ties
base_model: a
models: [{model: first, parameters: {weight: 0.5}}, {model: second, parameters: {weight: 0.5}}]
---
name: second
merge_method: slerp
base_model: first
models: [{model: first}, {model: b}]
parameters: {t: 0.5}
"""


def test_documents_refer_to_one_another(tmp_path):
    for name in "ab":
        (tmp_path / name).mkdir()
    (tmp_path / "r.yml").write_text(DOCUMENTS)
    file = read_recipe_file(tmp_path / "r.yml")
    assert file.order() == ("first", "second")
    assert [source.model for source in file.final.slices[0].sources] == ["first", "second"]
    assert file.named["second"].base == "first"
    assert file.named["first"].slices[0].sources[0].model == str(tmp_path / "a")
    assert recipe_file_from_yaml(recipe_to_yaml(file)) == file
    body = recipe_to_yaml(file)
    assert recipe_file_from_yaml(body[: body.index("# evomerge-recipe")]) == file
    with pytest.raises(RecipeError, match="contains 3 recipes, of which first, second must be merged first"):
        read_recipe(tmp_path / "r.yml")


def test_result_may_have_a_name_too(tmp_path):
    text = DOCUMENTS.replace("\nmerge_method: ties", "\nname: result\nmerge_method: ties")
    assert recipe_file_from_yaml(text).final.name == "result"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("name: second", "name: first"), "'first' appears twice"),
        (("name: second\n", ""), "2 documents have no name"),
        (("model: a,", "model: second,"), "first -> second|second -> first"),
        (("name: second", "name: ../second"), "expected a word"),
        (("{model: second, parameters: {weight: 0.5}}", "{model: b, parameters: {weight: 0.5}}"), None),
        (("weight: 3", "wieght: 3"), "document 1|document 'first'.*did you mean 'weight'"),
    ],
)
def test_inconsistent_documents_are_refused(change, message):
    text = DOCUMENTS.replace(*change)
    if message is None:
        assert recipe_file_from_yaml(text).order() == ("first",)  # a recipe that no other needs is not merged
        return
    with pytest.raises(RecipeError, match=message):
        recipe_file_from_yaml(text)


@pytest.mark.parametrize("name", ["../first", "/first", "..", "fi\\u0000rst"])
def test_names_outside_the_merge_folder_are_refused_in_the_comment_too(name):
    yaml, mark, comment = recipe_to_yaml(recipe_file_from_yaml(DOCUMENTS)).rpartition("# evomerge-recipe: ")
    with pytest.raises(RecipeError, match=r"^r\.yml: name: expected a word"):
        recipe_file_from_yaml(yaml + mark + comment.replace('"first"', f'"{name}"'), "r.yml")
