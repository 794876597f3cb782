"""How often Python looks for objects that only refer to each other."""

import gc

_OBJECTS = 50_000


def collect_rarely() -> None:
    """Looks for garbage every 50,000 new objects instead of every 700; for processes that are evomerge's own.

    Importing torch, lm-eval and vLLM and reading tasks makes hundreds of thousands of objects that stay, among which Python would look
    again and again: 12 to 15% of the processor time of a start.
    """
    gc.set_threshold(_OBJECTS, *gc.get_threshold()[1:])
