"""Arguments and options shared by several commands."""

from pathlib import Path
from typing import Annotated, Any

import typer


def flag(*names: str, help: str = "", hidden: bool = False) -> Any:
    """A switch. The empty `metavar` keeps typer's help from showing it as an option that takes a value."""
    return typer.Option(*names, metavar="", help=help, hidden=hidden)


Config = Annotated[Path, typer.Argument(help="Search configuration (YAML).", show_default=False)]
Run = Annotated[Path, typer.Argument(metavar="RUN", help="Run directory.", show_default=False)]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Override a setting, e.g. budget.evaluations=200; repeatable."),
]
Overwrite = Annotated[bool, flag("--overwrite", help="Replace the file if it exists.")]
AsJson = Annotated[bool, flag("--json", help="Print JSON.")]
