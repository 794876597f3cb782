"""`Items`: the engine requests of the items of a task or group, their size, and the scores of the answers."""

from abc import ABC, abstractmethod
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from evomerge.core import EvaluationError
from evomerge.engine import GenerateRequest, Generation, LogLikelihood, LogLikelihoodRequest


class Items(ABC):
    """The items of one split of a task or group, in the data set's order.

    Args:
        where: task and split, for messages.
        likelihoods, generations: the requests; for a single task one of the two is empty.
        counts: number of requests of each item.
        n_dropped: items of the data that were left out (`TaskSpec.drop_shared`).
        represents: number of items of the data per item here, if these are a sample (`TaskSpec.search_items`).

    Attributes:
        likelihoods, generations, counts, n_dropped, represents: as given.
        prompt_tokens: tokens that the model reads.
    """

    def __init__(
        self,
        where: str,
        likelihoods: Sequence[LogLikelihoodRequest],
        generations: Sequence[GenerateRequest],
        counts: Sequence[int],
        n_dropped: int = 0,
        represents: float = 1.0,
    ) -> None:
        self._where, self.n_dropped, self.represents = where, n_dropped, represents
        self.likelihoods, self.generations, self.counts = tuple(likelihoods), tuple(generations), tuple(counts)
        read = [len(request.context) + len(request.continuation) for request in likelihoods]
        read += [len(request.prompt) for request in generations]
        self.prompt_tokens = sum(read)

    def __len__(self) -> int:
        return len(self.counts)

    @property
    def parts(self) -> "tuple[Items, ...]":
        """The items of each task; here there is only one."""
        return (self,)

    @abstractmethod
    def score(self, likelihoods: Sequence[LogLikelihood], generations: Sequence[Generation]) -> NDArray[np.float64]:
        """Scores of the items, shape (n,): those of lm-eval's `process_results` if the metric is their mean, else `jackknife.item_scores`.

        Args:
            likelihoods, generations: the engine's answers to `self.likelihoods` and `self.generations`.

        Raises:
            EvaluationError: a scorer fails on an item or returns a value that cannot be averaged (names the item), or the metric over all items
                is not finite.
        """

    @abstractmethod
    def target(self, number: int) -> str | None:
        """The right answer of an item according to the task, as text; None if it is not known here."""

    @property
    def longest(self) -> int:
        """Tokens of the longest request, prompt and output together."""
        return max(self._sizes())

    def check_lengths(self, max_length: int) -> None:
        """Check that an engine with room for `max_length` tokens can serve every item without truncation.

        Raises:
            EvaluationError: names the longest item.
        """
        sizes = self._sizes()
        longest = max(range(len(sizes)), key=sizes.__getitem__)
        if sizes[longest] > max_length:
            number = int(np.searchsorted(np.cumsum(self.counts), longest, side="right"))
            what = "prompt and max_gen_toks" if self.generations else "context and continuation"
            raise EvaluationError(
                f"{self._where}, item {number}: {what} take {sizes[longest]} tokens, but the engine has room for {max_length} "
                f"({sum(size > max_length for size in sizes)} of {len(sizes)} requests are too long); raise engine.max_model_len"
                + (", or lower generation_kwargs.max_gen_toks in the task file" if self.generations else "")
            )

    def _sizes(self) -> list[int]:
        sizes = [len(request.context) + len(request.continuation) for request in self.likelihoods]
        return sizes + [len(request.prompt) + request.max_tokens for request in self.generations]
