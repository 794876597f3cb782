"""Method name -> its reference implementation, imported when first used.

A method is one file `evomerge/weights/methods/<name>.py` with a function `merge(group)`, and one row in `evomerge/recipe/methods.py`.
"""

from functools import cache
from importlib import import_module

from evomerge.recipe import method_spec
from evomerge.weights.tensor_group import MergeFunction

ELEMENTWISE = ("linear", "passthrough", "task_arithmetic", "nearswap", "ram")
"""methods that compute each element from the corresponding elements of the sources only, independent of its position"""


@cache
def reference(method: str) -> MergeFunction:
    """The plain torch implementation of `method`.

    Raises:
        RecipeError: there is no such method.
    """
    name = method_spec(method).name
    function: MergeFunction = import_module(f"evomerge.weights.methods.{name}").merge
    return function
