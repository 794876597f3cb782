"""Differences between a run as it was started and as it is resumed: which are allowed, and how others are reported."""

import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from evomerge.config import Overrides, SearchConfig, parse_config, settings_in
from evomerge.core import ConfigError, JournalError, Json, canonical_json, why_unreadable
from evomerge.search import Resolved, RunDirectory

logger = logging.getLogger(__name__)

CHANGEABLE_ON_RESUME = ("budget", "cluster", "finals")
"""The sections that may differ from the configuration a run was started with; other changes would make its results incomparable."""


def resumed_config(
    directory: RunDirectory, resolved: Resolved, overrides: Overrides
) -> tuple[SearchConfig, dict[str, Json]]:
    """The stored configuration with the edits made in the run's config.yaml and the overrides; and the settings in that file.

    Raises:
        ConfigError: an edit or override of a setting that may not change; the message lists all such edits.
    """
    overrides = [overrides] if isinstance(overrides, str) else overrides
    for override in overrides:  # for a mapping: its keys
        if override.split(".")[0].split("=")[0].strip() not in CHANGEABLE_ON_RESUME:
            raise ConfigError(
                f"--set {override}: only {', '.join(CHANGEABLE_ON_RESUME)} can be changed when a run is resumed; for anything else start a new search"
            )
    edited = _settings_now(directory, resolved)
    changes = list(differences(resolved.given, edited))
    refused = [change for change in changes if change[0].split(".")[0] not in CHANGEABLE_ON_RESUME]
    if refused:
        lines = "\n".join(f"  - {key}: {_shown(old)} -> {_shown(new)}" for key, old, new in refused)
        raise ConfigError(
            f"{directory.config} has been edited since the run was started\n{lines}\n"
            f"only {', '.join(CHANGEABLE_ON_RESUME)} can be changed when a run is resumed; undo the edit, or start a new search"
        )
    stored = dict(resolved.config)
    for key, _, new in changes:
        _put(stored, key.split("."), new)
    where = directory.config if changes else directory.resolved
    config = parse_config(stored, folder=Path("/"), where=str(where), overrides=overrides)
    return config, edited


def differences(old: Json, new: Json, prefix: str = "") -> Iterator[tuple[str, Json, Json]]:
    """(dotted key, old, new) wherever the settings differ; absent values are None, absent mappings are empty."""
    if isinstance(old, Mapping) and new is None:
        new = {}
    if isinstance(new, Mapping) and old is None:
        old = {}
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        for key in dict.fromkeys([*old, *new]):
            yield from differences(old.get(key), new.get(key), f"{prefix}.{key}" if prefix else str(key))
    elif canonical_json(old) != canonical_json(new):
        yield prefix, old, new


def refuse_changed(old: Resolved, new: Resolved) -> None:
    """Compare `resolved.json` as it was recorded with what it would be now.

    Raises:
        ConfigError: models, tasks, recipes or the space have changed; the message lists them.
    """
    changed = [
        f"{kind} {name}"
        for kind in ("models", "tasks", "baselines")
        for name, mark in getattr(old, kind).items()
        if getattr(new, kind).get(name) != mark
    ]
    if old.space.fingerprint != new.space.fingerprint:
        changed.append("the search space")
    if changed:
        raise ConfigError(
            f"changed since the run was started: {', '.join(changed)}; undo the change, or start a new search"
        )


def warn_of_other_versions(old: Resolved, new: Resolved) -> None:
    """Log a warning if package versions differ from those in `resolved.json`."""
    now = new.versions
    other = [
        f"{name} {now.get(name)} instead of {version}"
        for name, version in old.versions.items()
        if now.get(name) != version
    ]
    if other:
        logger.warning("this session has %s: scores and proposals may differ", ", ".join(other))


def _settings_now(directory: RunDirectory, resolved: Resolved) -> dict[str, Json]:
    try:
        return settings_in(directory.config.read_text(encoding="utf-8"), str(directory.config))
    except FileNotFoundError:
        return resolved.given
    except (OSError, UnicodeDecodeError) as problem:
        raise JournalError(f"{directory.config}: {why_unreadable(problem)}") from None


def _put(settings: dict[str, Any], path: Sequence[str], value: Json) -> None:
    """Set a nested value; None (the line was removed from the file) removes it, so that the default applies."""
    *parents, last = path
    for parent in parents:
        settings[parent] = dict(settings.get(parent) or {})
        settings = settings[parent]
    if value is None:
        settings.pop(last, None)
    else:
        settings[last] = value


def _shown(value: Json) -> str:
    return "(absent)" if value is None else canonical_json(value)
