"""Templates of tasks are compiled once instead of for every item.

lm-eval 0.4.13 (`lm_eval.utils.apply_template`) compiles a template each time it is rendered, which takes half a millisecond: for targets and
choices that is once an item and candidate, ten times as long as everything else that scoring does.
"""

from functools import lru_cache

MOST_TEMPLATES = 1024
"""Kept at a time: a few for every task, unless a task's items bring templates of their own."""


def keep_compiled_templates() -> None:
    """Makes lm-eval's template environment remember what it has compiled. Rendering keeps no state, so nothing else changes."""
    from lm_eval.utils import env

    if not hasattr(env.from_string, "cache_info"):
        env.from_string = lru_cache(MOST_TEMPLATES)(env.from_string)
