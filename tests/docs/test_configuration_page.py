"""docs/configuration.md, stacking.md, tasks.md, strategies.md and niches.md explain every setting, and the links of all pages have targets."""

import re
from pathlib import Path

import pytest

from evomerge.config.load import _all_keys
from evomerge.config.schema import SearchConfig, SyntheticConfig
from evomerge.strategy import STRATEGIES, strategy_options_schema

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"


def first_cells(page: str) -> str:
    """The first two cells of every table row of a page."""
    rows = [line for line in (DOCS / page).read_text(encoding="utf-8").splitlines() if line.startswith("| ")]
    return "\n".join("|".join(row.split(" | ")[:2]) for row in rows)


def test_every_setting_is_explained() -> None:
    pages = {"space.stacking.": "stacking.md", "tasks.": "tasks.md", "": "configuration.md"}
    synthetic = {f"evaluation.{name}" for name in SyntheticConfig.model_fields} - {"evaluation.kind"}
    missing = []
    for key in set(_all_keys(SearchConfig)) - synthetic:
        above = next(above for above in pages if key.startswith(above))
        if key in {"strategy.name", "models.base.path", "models.base.lora"}:  # documented in their short forms
            continue
        section = any(other.startswith(f"{key}.") for other in _all_keys(SearchConfig))
        if f"`{key.removeprefix(above)}`" not in first_cells(pages[above]) and not section:
            missing.append(key)
    assert not missing


def test_every_explained_setting_exists() -> None:
    keys = set(_all_keys(SearchConfig)) | {"models.experts"}
    assert set(
        re.findall(
            r"`([a-z_.]+)`", "\n".join(row.split("|")[0] for row in first_cells("configuration.md").splitlines())
        )
    ) <= keys | {"key"}


@pytest.mark.parametrize("name", sorted(STRATEGIES))
def test_every_option_of_a_strategy_is_explained(name: str) -> None:
    wanted = set(strategy_options_schema(name).get("properties", {})) - {"chromosomes"}
    text = (
        first_cells("niches.md").replace("strategy.", "") + " `on`" if name == "m2n2" else first_cells("strategies.md")
    )
    assert {option for option in wanted if f"`{option}`" not in text} == set()


@pytest.mark.parametrize("page", ["README.md", *(f"docs/{path.name}" for path in sorted(DOCS.glob("*.md")))])
def test_every_link_has_a_target(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)]+)\)", text):
        if target.startswith("http"):
            continue
        place, _, anchor = target.partition("#")
        file = ((ROOT / page).parent / place).resolve() if place else ROOT / page
        assert file.exists(), target
        if anchor:
            titles = re.findall(r"^#+ (.*)$", file.read_text(encoding="utf-8"), re.MULTILINE)
            assert anchor in {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}, target
