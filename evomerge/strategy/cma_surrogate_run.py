"""A run of pycma in which a quadratic model replaces part of the evaluations of every generation: lq-CMA-ES, one result at a time.

A generation's samples are evaluated, the most promising first, until the model ranks the latest results like the true losses
(Kendall's tau of 0.85; Hansen 2019, 10.1145/3321707.3321842); pycma is told the model's values for the rest. The model's minimum
within the distribution's reach becomes a sample of the next generation.

Asynchronous: a result may come at any time; one whose generation is over still feeds the model. If more workers are free than a
generation has samples, further samples of the same distribution are proposed, which feed the model too.
"""

import warnings
from collections.abc import Callable, Mapping, Sequence
from math import ceil, sqrt

import numpy as np
from numpy.typing import NDArray

from evomerge.core import Json
from evomerge.strategy.base import Floats
from evomerge.strategy.cma_run import make_pycma, padded, pycma_stop_reasons, widen_where_noise_decides
from evomerge.strategy.mean_loss import behind_all
from evomerge.strategy.rank_weighted_quadratic import RankWeightedQuadratic

_TAU = 0.85
"""Rank agreement that ends a generation (Hansen 2019)."""
_LEAST_SHARE = 0.02
"""Fraction of a generation that is always evaluated (Hansen 2019), which matters for populations that restarts have enlarged."""
_REACH = 0.7
"""Radius in which the model's minimum is searched, as a multiple of the typical length of a sample, sigma sqrt(d)."""


class SurrogateRun:
    """Like `CmaRun`, full covariance, with a model.

    Args:
        mean: first mean (d,), in [0, 1].
        sigma: first step size.
        population_size: samples per generation, >= 3.
        generator: source of all normal numbers.
        known: points (d,) with their losses, with which the model starts.
        full: whether the model may become a full quadratic; otherwise it stays diagonal.
        families: (d,), families of coordinates that the model first treats together; see `RankWeightedQuadratic`.
        correlation: see `make_pycma`.
    """

    def __init__(
        self,
        mean: Floats,
        sigma: float,
        population_size: int,
        generator: np.random.Generator,
        known: Sequence[tuple[tuple[float, ...], float]],
        *,
        full: bool,
        families: Sequence[int] | None,
        correlation: Floats | None,
    ) -> None:
        self._dimension = len(mean)
        self._population_size = population_size
        self._es = make_pycma(mean, sigma, population_size, "full", generator, correlation)
        # do not shorten the model's proposals to the length of a typical sample
        self._es.opts.set({"CMA_injections_threshold_keep_len": 1})
        self._model = RankWeightedQuadratic(self._dimension, population_size, full=full, families=families)
        for point, loss in known:
            self._model.add(np.array(point), loss)
        self._model.sort_latest(len(known))
        self._sent: dict[int, tuple[int, int]] = {}
        self._spare: dict[int, Floats] = {}
        self._past: dict[int, Floats] = {}
        self._n_sampled = 0
        self._generation = 0
        self._unjudged = False
        self._injected = False
        self._next_generation()

    def sample(self) -> tuple[int, tuple[float, ...]]:
        """A number that identifies the sample in `tell`, and the most promising sample (d,) of the generation not yet proposed."""
        self._settle()
        if not self._waiting and self._is_trusted:
            # all samples are proposed, but more workers are free: use the model for those still running
            self._close()
        if self._waiting:
            row = self._waiting[0]
            if self._can_predict:
                row = self._waiting[int(np.argmin(self._model.predict(self._inside[self._waiting])))]
            return self._send(row), tuple(self._inside[row].tolist())
        self._n_sampled += 1
        point = self._spare[self._n_sampled] = self._clipped(self._ask(1))[0]
        return self._n_sampled, tuple(point.tolist())

    def recall(
        self, was: Callable[[tuple[float, ...]], bool], real: NDArray[np.bool_]
    ) -> tuple[int, tuple[float, ...]] | None:
        """`sample` in a replay, where the proposed point is known (`was`): if it is one of this generation's, the generation was not over yet.

        Skips judging the model and ranking the samples, which take most of a replay's time. None if the point is not one of the waiting samples,
        or if one of these may repeat a known point, which is answered instead of asked: then `sample` must be called. That can be a point
        in a corner, or the model's minimum, which stays the same until the model changes. `real` (d,): mask of real coordinates.
        """
        if self._injected and 0 in self._waiting:
            return None
        inside = self._inside[self._waiting][:, real]
        if ((inside == 0.0) | (inside == 1.0)).all(axis=1).any():
            return None
        # without a model the first waiting sample is next
        for row in self._waiting if self._can_predict else self._waiting[:1]:
            point = tuple(self._inside[row].tolist())
            if was(point):
                self._settle(goes_on=True)
                return self._send(row), point
        return None

    def adopt(self, number: int, point: tuple[float, ...]) -> None:
        """Replace the point sampled as `number` by another point (d,); pycma treats it as an injected one."""
        if number in self._spare:
            self._spare[number] = np.array(point)
            return
        _, row = self._sent[number]
        self._inside[row] = point
        self._samples[row] = padded(point)

    def withdraw(self, number: int) -> None:
        """Forget the point just sampled as `number`, which will not be told; another sample replaces it in its generation."""
        if number in self._spare:
            del self._spare[number]
            return
        _, row = self._sent.pop(number)
        self._samples[row] = self._ask(1)[0]
        self._inside[row] = self._clipped([self._samples[row]])[0]
        self._waiting.append(row)

    def tell(self, number: int, loss: float | None, noise: float = 0.0) -> None:
        """Take the loss of the point sampled as `number` and its standard error.

        A loss of None means that it failed: it ranks last in its generation, and the model gets the worst loss it knows, so that it does not lead there again.
        """
        self._settle()
        if number in self._spare:
            point, generation, row = self._spare.pop(number), -1, -1
        else:
            generation, row = self._sent.pop(number)
            point = self._past[generation][row]
        modelled = self._model.worst() if loss is None else loss
        if modelled is not None:
            self._model.add(point, modelled)
        if generation == self._generation:
            self._losses[row] = loss
            self._noise[row] = noise
            self._n_good += loss is not None
            self._n_modelled += modelled is not None
            self._unjudged = True

    def stop_reasons(self) -> Mapping[str, Json]:
        """See `pycma_stop_reasons`."""
        self._settle()
        return pycma_stop_reasons(self._es)

    @property
    def _can_predict(self) -> bool:
        return len(self._model) >= self._model.min_results

    @property
    def _is_trusted(self) -> bool:
        """Whether the model ranks this generation's results like the true losses."""
        return self._n_good > 0 and self._can_predict and self._model.agreement(self._n_modelled) >= _TAU

    def _send(self, row: int) -> int:
        """Mark a sample of the generation as proposed; return its number."""
        self._waiting.remove(row)
        self._n_sampled += 1
        self._sent[self._n_sampled] = (self._generation, row)
        return self._n_sampled

    def _settle(self, *, goes_on: bool = False) -> None:
        """End the generation if all of it is known or the model is trusted; checked after 1, 2, 3, 5, 8, 12, ... results (populations below fifty).

        Deferred until the outcome matters: a replay knows if the generation continued (`goes_on`), and then does not evaluate the model.
        """
        if not self._unjudged:
            return
        self._unjudged = False
        n_told = len(self._losses)
        if n_told < min(self._next_check, self._population_size):
            return
        self._next_check += ceil(self._next_check / 2)
        self._model.sort_latest(self._n_modelled)
        if goes_on:
            return
        if n_told == self._population_size or self._is_trusted:
            self._close()

    def _close(self) -> None:
        """Update the distribution with the known losses, and the model's values for the rest."""
        self._injected = self._n_good > 0 and self._can_predict
        if self._n_good:
            with warnings.catch_warnings(action="ignore"):
                self._es.tell(self._samples, self._values().tolist())
            good = {row: loss for row, loss in self._losses.items() if loss is not None}
            widen_where_noise_decides(self._es, list(good.values()), [self._noise[row] for row in good])
            if self._injected:
                self._inject_minimum()
        self._next_generation()

    def _values(self) -> Floats:
        known = {row: loss for row, loss in self._losses.items() if loss is not None}
        if len(self._losses) == self._population_size:
            last = behind_all(list(known.values()))
            return np.array([known.get(row, last) for row in range(self._population_size)])
        values = self._model.predict(self._inside)
        values += min(known.values()) - values.min()
        for row, loss in self._losses.items():
            if loss is None:
                values[row] = behind_all(values)
        return values

    def _inject_minimum(self) -> None:
        """Make the model's minimum the first sample of the next generation."""
        d = self._dimension
        mean = self._clipped([np.asarray(self._es.result.xfavorite)])[0]
        # sampled covariances are positive definite; the ridge covers rounding
        covariance = self._es.sm.covariance_matrix[:d, :d]
        root = self._es.sigma * np.linalg.cholesky(covariance + 1e-14 * np.trace(covariance) * np.eye(d))
        # near the bounds, pycma scales its samples down
        root = root * np.broadcast_to(self._es.sigma_vec.scaling, len(padded(mean)))[:d, None]
        minimum = np.clip(self._model.minimum(mean, root, _REACH * sqrt(d)), 0.0, 1.0)
        self._es.inject([padded(minimum)], force=True)

    def _next_generation(self) -> None:
        self._generation += 1
        self._samples = self._ask(self._population_size)
        self._inside = self._clipped(self._samples)
        self._past[self._generation] = self._inside
        in_use = {generation for generation, _ in self._sent.values()} | {self._generation}
        self._past = {generation: points for generation, points in self._past.items() if generation in in_use}
        self._waiting = list(range(self._population_size))
        self._losses: dict[int, float | None] = {}
        self._noise: dict[int, float] = {}
        self._n_good = self._n_modelled = 0
        self._next_check = max(
            1 + int(_LEAST_SHARE * self._population_size), self._model.min_results + 1 - len(self._model)
        )

    def _ask(self, count: int) -> list[Floats]:
        with warnings.catch_warnings(action="ignore"):
            return list(self._es.ask(count))

    def _clipped(self, points: Sequence[Floats]) -> Floats:
        return np.clip(np.array(points)[:, : self._dimension], 0.0, 1.0)
