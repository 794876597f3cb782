"""One run of pycma, from a mean and a step size to convergence, with random numbers from our own stream."""

import warnings
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import cma
import numpy as np
from cma.restricted_gaussian_sampler import GaussVkDSampler
from cma.sigma_adaptation import CMAAdaptSigmaCSA
from scipy.special import ndtr

from evomerge.core import Json
from evomerge.strategy.base import Floats
from evomerge.strategy.mean_loss import behind_all

_MAX_GROWTH = 1e4
"""maximum growth of the step size within a run; pycma's own limit is 1e3 for the deviations, which are in [0, 1] here"""

_MAX_SWAPPED = 0.2
"""maximum fraction of pairs of results that would swap places in a repeated measurement; with pure noise it is half"""

Variant = Literal["full", "sep", "vkd"]


def make_pycma(
    mean: Floats,
    sigma: float,
    population_size: int,
    variant: Variant,
    generator: np.random.Generator,
    correlation: Floats | None,
) -> Any:
    """pycma's `CMAEvolutionStrategy` on [0, 1]^d (`padded`), drawing from `generator` and using no global state or files.

    With the variant `full`, the first steps may have a `correlation` (d, d); None = uncorrelated.
    """

    def normal(*shape: int) -> Floats:
        return generator.standard_normal(shape)

    options: dict[str, Any] = {
        "bounds": [0.0, 1.0],
        "popsize": population_size,
        "seed": np.nan,  # leave numpy's global generator alone
        "randn": normal,
        "verbose": -9,
        "verb_log": 0,
        "verb_disp": 0,
        "signals_filename": None,  # otherwise pycma reads a file in the working directory
        # mirrored samples and the two-point rule, which are defaults at some sizes, need whole generations
        "CMA_mirrors": 0,
        "AdaptSigma": CMAAdaptSigmaCSA,
    }
    if variant == "sep":
        options["CMA_diagonal"] = True
    if variant == "vkd":
        options = GaussVkDSampler.extend_cma_options(options)
        options["CMA_sampler_options"] = {"randn": normal}
    with warnings.catch_warnings(action="ignore"):
        es = cma.CMAEvolutionStrategy(padded(mean), sigma, options)
    if correlation is not None:
        es.sm.C = correlation.copy()
        es.sm.update_now(-1)
    return es


def padded(point: Sequence[float] | Floats) -> Floats:
    """A point (d,) in pycma's form: pycma does not support one dimension, so a neutral second coordinate is added."""
    return np.append(point, 0.5) if len(point) == 1 else np.array(point)


def pycma_stop_reasons(es: Any) -> Mapping[str, Json]:
    """pycma's termination criteria that are met, and `sigma` if its step size has diverged.

    If the optimum is in a corner, pycma keeps the deviations within the bounds by scaling them down, while step size and
    covariance grow until they overflow; its own criteria look at the product, which stays constant.
    """
    if es.countiter == 0:
        return {}
    reasons: dict[str, Json] = {str(reason): str(value) for reason, value in es.stop().items()}
    if es.sigma > _MAX_GROWTH * es.sigma0:
        reasons["sigma"] = float(es.sigma)
    return reasons


def widen_where_noise_decides(es: Any, losses: Sequence[float], noise: Sequence[float]) -> None:
    """Raise pycma's step size slightly if the order of the latest results is largely random.

    The rule of UH-CMA-ES (Hansen et al., 10.1109/TEVC.2008.924423): a search among differences smaller than the noise would converge
    prematurely, so it is kept from shrinking. UH-CMA-ES repeats measurements to see how the order changes; here the fraction of
    pairs that would swap places is computed from the standard errors `noise` (n,) of the `losses` (n,).
    """
    first, second = np.triu_indices(len(losses), 1)
    if len(first) == 0 or not any(noise):
        return
    values, variances = np.array(losses), np.array(noise) ** 2
    deviations = np.sqrt(variances[first] + variances[second])
    gaps = np.abs(values[first] - values[second])
    swapped = ndtr(-gaps / np.where(deviations > 0.0, deviations, 1e-300))
    if swapped.mean() > _MAX_SWAPPED:
        es.sigma *= 1.0 + 2.0 / (es.N + 10.0)


class CmaRun:
    """Samples points of [0, 1]^d one at a time and updates its distribution with every `population_size` results.

    Args:
        mean: first mean (d,), in [0, 1].
        sigma: first step size.
        population_size: results per update, >= 3.
        variant: `full`, `sep` or `vkd`.
        generator: source of all normal numbers.
        correlation: see `make_pycma`.
    """

    def __init__(
        self,
        mean: Floats,
        sigma: float,
        population_size: int,
        variant: Variant,
        generator: np.random.Generator,
        correlation: Floats | None,
    ) -> None:
        self._dimension = len(mean)
        self._population_size = population_size
        self._strict = variant == "vkd"
        self._queue: deque[Floats] = deque()
        self._n_sampled = 0
        self._sent: dict[int, tuple[Floats, int]] = {}
        self._batch: list[tuple[int, float | None]] = []
        self._noise: list[float] = []
        self._asked = False
        self._es = make_pycma(mean, sigma, population_size, variant, generator, correlation)

    def sample(self) -> tuple[int, tuple[float, ...]] | None:
        """A number that identifies the sample in `tell`, and a point of the current distribution (d,).

        None if `vkd` has to wait for the rest of its generation.
        """
        if self._strict and not self._queue and self._asked:
            return None
        if not self._queue:
            with warnings.catch_warnings(action="ignore"):
                self._queue.extend(self._es.ask(self._population_size if self._strict else 1))
            self._asked = True
        point = self._queue.popleft()
        self._n_sampled += 1
        self._sent[self._n_sampled] = (point, self._es.countiter)
        return self._n_sampled, tuple(np.clip(point[: self._dimension], 0.0, 1.0).tolist())

    def adopt(self, number: int, point: tuple[float, ...]) -> None:
        """Replace the point sampled as `number` by another point (d,); pycma treats it as an injected one."""
        self._sent[number] = (padded(point), self._sent[number][1])

    def withdraw(self, number: int) -> None:
        """Forget the point just sampled as `number`, which will not be told. Not possible with `vkd`, which needs the whole generation."""
        del self._sent[number]

    def tell(self, number: int, loss: float | None, noise: float = 0.0) -> None:
        """Take the loss of the point sampled as `number` and its standard error; a loss of None ranks last in its batch."""
        self._batch.append((number, loss))
        if loss is not None:
            self._noise.append(noise)
        if len(self._batch) == self._population_size:
            self._update()
            self._batch.clear()
            self._noise.clear()
            self._asked = False

    def _update(self) -> None:
        sent = [self._sent.pop(number) for number, _ in self._batch]
        losses = [loss for _, loss in self._batch if loss is not None]
        if not losses:
            return
        last = behind_all(losses)
        late = [row for row, (_, generation) in enumerate(sent) if generation < self._es.countiter]
        with warnings.catch_warnings(action="ignore"):
            if not self._asked:
                self._es.ask(1)  # pycma requires this between two updates, even if there are enough results already
            self._es.tell(
                [point for point, _ in sent],
                [last if loss is None else loss for _, loss in self._batch],
                check_points=late or None,
            )
        widen_where_noise_decides(self._es, losses, self._noise)

    def stop_reasons(self) -> Mapping[str, Json]:
        """See `pycma_stop_reasons`."""
        return pycma_stop_reasons(self._es)
