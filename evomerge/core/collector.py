"""The frequency of Python's cyclic garbage collection."""

import gc

_OBJECTS = 50_000


def collect_rarely() -> None:
    """Collect garbage every 50,000 new objects instead of every few hundred or thousand; only for evomerge's own processes.

    Importing torch, lm-eval and vLLM and loading tasks creates hundreds of thousands of permanent objects, which the collector would scan
    repeatedly: 12 to 15% of the CPU time of a start.
    """
    gc.set_threshold(_OBJECTS, *gc.get_threshold()[1:])
