"""Seeds Python's and NumPy's global random generators for task code as lm-eval does."""

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np

PYTHON_SEED, NUMPY_SEED, FEWSHOT_SEED = 0, 1234, 1234
"""lm-eval's defaults (`simple_evaluate(random_seed=..., numpy_random_seed=..., fewshot_random_seed=...)`)."""


@contextmanager
def lm_evals_seeds(number: int = 0) -> Iterator[None]:
    """Seed both as `simple_evaluate` does by default and restore them afterwards; for example, `process_docs` of GPQA shuffles choices with them.

    `number` is added to the seeds, so that scorers that guess when an answer is unusable guess independently for each item.
    """
    python, numpy = random.getstate(), np.random.get_state()  # noqa: NPY002  (the generator that tasks use)
    random.seed(PYTHON_SEED + number)
    np.random.seed(NUMPY_SEED + number)  # noqa: NPY002
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)  # noqa: NPY002
