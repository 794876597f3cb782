import json
import os
import re
import resource
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pytest
from packaging.version import Version

from evomerge.core import (
    ConfigError,
    Direction,
    Evaluation,
    EvaluationError,
    Objective,
    Split,
    Status,
    atomic_write_json,
    atomic_write_text,
    canonical_json,
    fingerprint,
    load_yaml,
    random_stream,
    to_losses,
)
from evomerge.core.safe_yaml import MAX_YAML_BYTES


def test_random_streams_are_independent_and_repeatable() -> None:
    first = random_stream(1, "a", 2).random(4)
    assert np.array_equal(first, random_stream(1, "a", 2).random(4))
    for other in (random_stream(1, "a", 3), random_stream(1, "b", 2), random_stream(2, "a", 2), random_stream(1, "a2")):
        assert not np.array_equal(first, other.random(4))


def test_canonical_json_is_the_same_for_equal_values_and_refuses_nan() -> None:
    assert canonical_json({"b": 1.0, "a": [True, None]}) == canonical_json(json.loads('{"a":[true,null],"b":1.0}'))
    assert fingerprint({"a": 1}) != fingerprint({"a": 2})
    with pytest.raises(ValueError, match="not JSON compliant"):
        canonical_json({"a": float("nan")})


def test_atomic_write_leaves_the_old_file_when_it_fails(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    atomic_write_json(path, {"a": 1})
    with pytest.raises(ValueError, match="not JSON compliant"):
        atomic_write_json(path, {"a": float("inf")})
    assert json.loads(path.read_text()) == {"a": 1}
    assert os.listdir(tmp_path) == ["x.json"]


def test_a_full_disk_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "x"
    atomic_write_text(path, "old")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10, limits[1]))
    try:
        with pytest.raises(OSError, match="too large"):
            atomic_write_text(path, "new" * 10)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["x"]


def test_readers_of_the_old_file_keep_reading_it(tmp_path: Path) -> None:
    path = tmp_path / "x"
    atomic_write_text(path, "old")
    with path.open() as stream:
        atomic_write_text(path, "new")
        assert stream.read() == "old"
    assert path.read_text() == "new"


@pytest.mark.parametrize(("mask", "mode"), [(0o077, 0o600), (0o002, 0o664)])
def test_the_umask_determines_who_may_read_a_new_file(tmp_path: Path, mask: int, mode: int) -> None:
    path = tmp_path / "x"
    before = os.umask(mask)
    try:
        atomic_write_text(path, "one")
        assert path.stat().st_mode & 0o777 == mode
        path.chmod(0o640)
        atomic_write_text(path, "two")
        assert path.stat().st_mode & 0o777 == 0o640
    finally:
        os.umask(before)


def test_links_pipes_and_names_that_are_not_utf_8_can_be_written(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "there" / "file")
    for text in ("one", "two"):
        atomic_write_text(tmp_path / "link", text)
        assert (tmp_path / "link").is_symlink()
        assert (tmp_path / "there" / "file").read_text() == text
    os.mkfifo(tmp_path / "pipe")
    reader = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    atomic_write_text(tmp_path / "pipe", "through")
    assert os.read(reader, 100) == b"through"
    os.close(reader)
    name = os.fsdecode(b"/models/z\xff")
    atomic_write_json(tmp_path / "x.json", {"a": name})
    assert (
        json.loads((tmp_path / "x.json").read_text()) == json.loads(canonical_json({"a": name}).encode()) == {"a": name}
    )


def test_losses_flip_the_sign_of_maximised_scores_only() -> None:
    good = Evaluation("c1", Split.SEARCH, Status.OK, scores={"f": 0.75}, cost={"tokens": 12.0})
    bad = Evaluation("c2", Split.SEARCH, Status.FAILED, error="no")
    objectives = [Objective("f"), Objective("cost.tokens", Direction.MINIMIZE)]
    losses = to_losses(objectives, [good, bad])
    assert losses[0].tolist() == [-0.75, 12.0]
    assert np.isnan(losses[1]).all()
    with pytest.raises(EvaluationError, match=r"no score 'g'; it has: cost.tokens, f"):
        to_losses([Objective("g")], [good])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1\na: 2", "line 2, column 1: key 'a' appears twice"),
        ("!!python/object/apply:os.system [ls]", "not supported"),
        ("a: [1", "expected ',' or ']'"),
        ("a: 1\nb: !mine {c: 1}", "line 2, column 4: tag '!mine' is not supported"),
        ("a: 1\nb: !!bool maybe", "line 2, column 4: 'maybe' is not a valid bool"),
        ("a: 1\nb: !!int ''", "line 2, column 4: '' is not a valid int"),
        ("a: 1\nb: !!timestamp soon", "line 2, column 4: 'soon' is not a valid timestamp"),
        ("a: 1\nb: !!map [c]", "line 2, column 4: expected a mapping"),
        ("a: 1\nb: \x00", "line 2: character"),
        ("a: 1\nb: *c", "line 2, column 4: found undefined alias 'c'"),
        ("a: &x 1\nb: &x 2", "line 2, column 4: anchor &x appears twice"),
        ("a: 1\nb: &b\n  c: [*b]", "line 3, column 7: alias *b is inside the value that it refers to"),
        ("\n".join(["a0: &a0 [x, x, x, x]", *(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 8)}]" for i in range(1, 10))]), "expand"),
        ("a: &x 1\nb: [" + ", ".join(["*x"] * 101) + "]", "more than 100 aliases"),
        ("a: 1\n---\nb: 2", "expected one YAML document, found 2"),
        ("# no more than this", "file.yaml: is empty"),
        ('a: 1\nb: "\\ud83d"', "line 2, column 4: lone surrogate"),
        ("? [1, 2]\n: 3", "cannot be a key"),
        ("[" * 2000, "cannot be read as YAML"),
        ("[" * 150 + "]" * 150, "nested more than 100 levels"),
        ("#" * (MAX_YAML_BYTES + 1), "the limit for YAML is"),
    ],
)  # fmt: skip
def test_hostile_yaml_is_refused_with_its_position(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)) as caught:
        load_yaml(text, "file.yaml")
    assert str(caught.value).startswith("file.yaml")


def test_merge_keys_are_no_alias_bomb() -> None:
    """PyYAML from 6.0.4 on merges every key once; earlier versions would make a mapping of 9^11 pairs, which is refused."""
    merged = "\n".join(f"a{i}: &a{i} {{<<: [{', '.join([f'*a{i - 1}'] * 9)}]}}" for i in range(1, 12))
    text = "a0: &a0 {x: 1}\n" + merged
    if Version(version("pyyaml")) >= Version("6.0.4"):
        assert load_yaml(text, "file.yaml")["a11"] == {"x": 1}
    else:
        with pytest.raises(ConfigError, match="aliases expand to more than"):
            load_yaml(text, "file.yaml")


def test_names_that_look_like_dates_are_text() -> None:
    assert load_yaml("name: 2024-01-31\nother: =", "f") == {"name": "2024-01-31", "other": "="}


def test_surrogate_pairs_in_json_become_one_character() -> None:
    assert load_yaml(json.dumps({"\U0001f600": ["\u00e9", "a\U0001f600"]}), "f") == {
        "\U0001f600": ["\u00e9", "a\U0001f600"]
    }


def test_bytes_of_a_name_that_is_not_utf_8_are_kept() -> None:
    name = os.fsdecode(b"\xff/\xf0\x9f\x98\x80")
    assert load_yaml(json.dumps([name]), "f") == [name]


def test_times_are_text() -> None:
    """YAML 1.1 reads 1:30 as 90, which would be a budget of that many hours."""
    assert load_yaml("{hours: 1:30, more: 1:30.5, none: 90}", "f") == {"hours": "1:30", "more": "1:30.5", "none": 90}


def test_on_is_text_as_a_key_and_true_as_a_value() -> None:
    assert load_yaml("{name: m2n2, on: recipes, split_point: on}", "f") == {
        "name": "m2n2",
        "on": "recipes",
        "split_point": True,
    }


def test_ordinary_anchors_work() -> None:
    assert load_yaml("base: &b {x: 1}\nmore: {<<: *b, y: 2}", "f") == {"base": {"x": 1}, "more": {"x": 1, "y": 2}}
