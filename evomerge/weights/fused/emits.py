"""`emits`: functions of compiled code that are written in the compiler's own instructions."""

from collections.abc import Callable
from functools import wraps
from typing import Any

from numba import types
from numba.extending import intrinsic


def emits(result: types.Type, *arguments: types.Type) -> Callable[[Callable[..., Any]], Any]:
    """Makes a function of a builder and values, which emits instructions and returns their result, one of `arguments` for compiled code.

    Args:
        result: what it returns; `types.void` where that is nothing.
        arguments: what it is called with.
    """

    def decorate(emit: Callable[..., Any]) -> Any:
        @wraps(emit)  # also its signature, of which numba leaves out the first argument
        def typed(typing_context: Any, *given: Any) -> Any:
            def generate(context: Any, builder: Any, signature: Any, values: Any) -> Any:
                value = emit(builder, *values)
                return context.get_dummy_value() if result == types.void else value

            return result(*arguments), generate

        return intrinsic(typed)

    return decorate
