"""`emits`: defines functions for compiled code in terms of LLVM instructions."""

from collections.abc import Callable
from functools import wraps
from typing import Any

from numba import types
from numba.extending import intrinsic


def emits(result: types.Type, *arguments: types.Type) -> Callable[[Callable[..., Any]], Any]:
    """Turn a function of a builder and values, which emits instructions and returns their result, into a function of `arguments` for compiled code.

    Args:
        result: type of the result; `types.void` for none.
        arguments: types of the arguments.
    """

    def decorate(emit: Callable[..., Any]) -> Any:
        @wraps(emit)  # including its signature, whose first argument numba drops
        def typed(typing_context: Any, *given: Any) -> Any:
            def generate(context: Any, builder: Any, signature: Any, values: Any) -> Any:
                value = emit(builder, *values)
                return context.get_dummy_value() if result == types.void else value

            return result(*arguments), generate

        return intrinsic(typed)

    return decorate
