"""evomerge: find the best way to merge language models.

The main commands are functions here; `open_run` gives an `evomerge.build.Run`:

    config = evomerge.load_config("search.yaml")
    evomerge.run_search(config, "runs/mine")
    evomerge.open_run("runs/mine").summary()
    pandas.DataFrame(evomerge.open_run("runs/mine").records())
    evomerge.write_report("runs/mine")
    evomerge.export_recipe("runs/mine", "best", "best.yaml")
    evomerge.merge_recipe("best.yaml", "merged")

Names are loaded when they are first used, so that `import evomerge` costs nothing.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from evomerge.build import (
        evaluate_model,
        export_recipe,
        load_config,
        make_problem,
        merge_recipe,
        open_run,
        resume_search,
    )
    from evomerge.build import start_search as run_search
    from evomerge.build.commands.report import write_report
    from evomerge.core import EvomergeError
    from evomerge.strategy import make_strategy
    from evomerge.zoo import build_zoo

__all__ = [
    "EvomergeError",
    "build_zoo",
    "evaluate_model",
    "export_recipe",
    "load_config",
    "make_problem",
    "make_strategy",
    "merge_recipe",
    "open_run",
    "resume_search",
    "run_search",
    "write_report",
]

_HOMES = {
    "EvomergeError": "evomerge.core",
    "build_zoo": "evomerge.zoo",
    "make_strategy": "evomerge.strategy",
    "write_report": "evomerge.build.commands.report",
}


def __dir__() -> list[str]:
    return [*__all__, "__version__"]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return import_module("importlib.metadata").version("evomerge")
    if name not in __all__:
        raise AttributeError(f"module 'evomerge' has no attribute {name!r}")
    home = import_module(_HOMES.get(name, "evomerge.build"))
    return getattr(home, "start_search" if name == "run_search" else name)
