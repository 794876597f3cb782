"""`evomerge zoo`: the demo models."""

from pathlib import Path
from typing import Annotated

import typer

zoo = typer.Typer(help="Train the small demo models.", no_args_is_help=True)


@zoo.command("build")
def zoo_build(
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for the models.")] = Path("zoo"),
    seed: Annotated[int, typer.Option(min=0, help="Random seed of the training.")] = 0,
) -> None:
    """Train the demo models, a base and three experts (minutes on two cores). Existing ones are reused."""
    from evomerge.zoo import build_zoo

    report = build_zoo(out, seed=seed, progress=print)
    print(report)
