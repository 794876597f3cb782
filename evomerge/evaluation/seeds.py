"""Python's and NumPy's global generators as lm-eval leaves them to the code of tasks."""

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np

PYTHON_SEED, NUMPY_SEED, FEWSHOT_SEED = 0, 1234, 1234
"""lm-eval's defaults (`simple_evaluate(random_seed=..., numpy_random_seed=..., fewshot_random_seed=...)`)."""


@contextmanager
def lm_evals_seeds(number: int = 0) -> Iterator[None]:
    """Both as `simple_evaluate` seeds them by default, and afterwards as they were: `process_docs` of GPQA shuffles choices with them.

    Another `number` gives other seeds: scorers that guess where an answer says nothing do so anew for each item.
    """
    python, numpy = random.getstate(), np.random.get_state()  # noqa: NPY002  (the generator that tasks use)
    random.seed(PYTHON_SEED + number)
    np.random.seed(NUMPY_SEED + number)  # noqa: NPY002
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)  # noqa: NPY002
