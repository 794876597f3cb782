"""Few or many items per candidate, on a problem that takes milliseconds: three experts for MNIST digits.

    python benchmarks/items_mnist.py mnist.npz --items 27000 --search-items 300 150 75 30 15 --seeds 20

`mnist.npz` holds `x_train`, `y_train`, `x_test`, `y_test`. A network of 784, three times 48 and 10 units is trained on all digits for 25 steps; from there one expert each is
trained for 250 steps on the digits 0 to 2, 3 to 5 and 6 to 9. The search space has a weight for each expert, layer and half of a layer's units. Every search may score the given
number of items, nine baselines included; its best eight and the candidate that the strategy recommends are ranked on 300 further items of each task. Prints the winner's accuracy on the test images.
"""

import argparse
import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

from datetime import date
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from torch.nn.functional import cross_entropy

from evomerge.core import Candidate, Evaluation, Objective, Split, Status, VectorGenome
from evomerge.strategy import make_strategy

UNITS = (784, 48, 48, 48, 10)
GROUPS = ((0, 1, 2), (3, 4, 5), (6, 7, 8, 9))
OBJECTIVES = [Objective(name) for name in ("low", "middle", "high")]
SHAPE = (len(GROUPS), len(UNITS) - 1, 2)
"""shape of the weights: expert, layer, half of its units"""
HIGHEST = 1.5
N_TRAIN, N_BASE, N_SPLIT = 20_000, 2_000, 300
Weights = list[torch.Tensor]


class Mnist:
    """The images, the experts, and the scores of their merges."""

    def __init__(self, path: Path) -> None:
        data = np.load(path)
        self.images, self.test_images = (
            torch.tensor(data[name].astype(np.float32) / 255) for name in ("x_train", "x_test")
        )
        self.labels, self.test_labels = (torch.tensor(data[name].astype(np.int64)) for name in ("y_train", "y_test"))
        images, labels = self.images[:N_TRAIN], self.labels[:N_TRAIN]
        self._base = trained(first_weights(), images[:N_BASE], labels[:N_BASE], n_steps=25, seed=0)
        inside = [torch.isin(labels, torch.tensor(group)) for group in GROUPS]
        experts = [trained(self._base, images[rows], labels[rows], n_steps=250, seed=1) for rows in inside]
        self._deltas = [[one - base for one, base in zip(expert, self._base, strict=True)] for expert in experts]

    def merged(self, weights: np.ndarray) -> Weights:
        """The network merged with `weights` of shape `SHAPE`."""
        network = []
        for number, base in enumerate(self._base):
            n_units = base.shape[-1]
            merged = base.clone()
            for expert, delta in enumerate(self._deltas):
                of_units = torch.full((n_units,), float(weights[expert, number // 2, 0]))
                of_units[n_units // 2 :] = float(weights[expert, number // 2, 1])
                merged += of_units * delta[number]
            network.append(merged)
        return network

    def items(self, seed: int) -> tuple[list[np.ndarray], list[np.ndarray]]:
        """Image numbers of the search and the select items of each task, among images that no expert has seen."""
        rows = np.arange(N_TRAIN, len(self.images))
        np.random.default_rng(seed).shuffle(rows)
        of_tasks = [rows[np.isin(self.labels[rows].numpy(), group)] for group in GROUPS]
        return [one[:N_SPLIT] for one in of_tasks], [one[N_SPLIT : 2 * N_SPLIT] for one in of_tasks]

    def right(self, weights: np.ndarray, items: list[np.ndarray]) -> list[np.ndarray]:
        """Task -> for each of its items, whether it is answered correctly."""
        rows = np.concatenate(items)
        answers = outputs(self.merged(weights), self.images[rows]).argmax(1) == self.labels[rows]
        return np.split(answers.numpy().astype(float), np.cumsum([len(one) for one in items])[:-1])

    def accuracy(self, weights: np.ndarray) -> float:
        """The mean over the tasks on the test images."""
        answers = outputs(self.merged(weights), self.test_images).argmax(1) == self.test_labels
        return float(
            np.mean(
                [float(answers[torch.isin(self.test_labels, torch.tensor(group))].float().mean()) for group in GROUPS]
            )
        )


def first_weights() -> Weights:
    generator = torch.Generator().manual_seed(0)
    pairs = pairwise(UNITS)
    return [
        part for n, m in pairs for part in (torch.randn(n, m, generator=generator) * (2 / n) ** 0.5, torch.zeros(m))
    ]


def outputs(network: Weights, images: torch.Tensor) -> torch.Tensor:
    for layer in range(0, len(network), 2):
        images = images @ network[layer] + network[layer + 1]
        if layer + 2 < len(network):
            images = images.relu()
    return images


def trained(start: Weights, images: torch.Tensor, labels: torch.Tensor, n_steps: int, seed: int) -> Weights:
    network = [part.clone().requires_grad_() for part in start]
    optimiser, generator = torch.optim.Adam(network, lr=1e-3), torch.Generator().manual_seed(seed)
    for _ in range(n_steps):
        rows = torch.randint(len(images), (64,), generator=generator)
        optimiser.zero_grad()
        cross_entropy(outputs(network, images[rows]), labels[rows]).backward()
        optimiser.step()
    return [part.detach() for part in network]


def search(
    mnist: Mnist,
    n_items: int,
    n_scored: int,
    seed: int,
    name: str = "cma_es",
    families: bool = False,
    mean_alone: bool = False,
    **options: object,
) -> tuple[float, int]:
    """The winner's accuracy on the test images, and the number of candidates, baselines included.

    Args:
        n_items: search items per task.
        n_scored: items that may be scored in total.
        seed: seed of the items and the strategy.
        name, options: of the strategy.
        families: whether the strategy is told which weights belong to the same expert.
        mean_alone: whether the strategy sees the mean of the tasks instead of each task.
    """
    all_items, select = mnist.items(seed)
    draw = np.random.default_rng(seed + 77)
    items = [one[draw.permutation(N_SPLIT)[:n_items]] for one in all_items]
    weights_of: dict[str, np.ndarray] = {}
    mean_of: dict[str, float] = {}

    def score(name: str, weights: np.ndarray) -> Evaluation:
        right = dict(zip((goal.name for goal in OBJECTIVES), mnist.right(weights, items), strict=True))
        scores = {task: float(values.mean()) for task, values in right.items()}
        errors = {task: float(values.std(ddof=1) / len(values) ** 0.5) for task, values in right.items()}
        weights_of[name], mean_of[name] = weights, float(np.mean(list(scores.values())))
        if mean_alone:
            scores, errors = (
                {"mean": mean_of[name]},
                {"mean": float(np.linalg.norm(list(errors.values())) / len(errors))},
            )
        return Evaluation(name, Split.SEARCH, Status.OK, scores, errors)

    baselines = [np.full(SHAPE, value) for value in (0.0, 1 / 6, 1 / 3, 0.5, 0.7, 1.0)]
    for expert in range(SHAPE[0]):
        baselines.append(np.zeros(SHAPE))
        baselines[-1][expert] = 1.0
    strategy = make_strategy(
        name,
        dimension=int(np.prod(SHAPE)),
        objectives=[Objective("mean")] if mean_alone else OBJECTIVES,
        seed=seed,
        families=np.repeat(np.arange(SHAPE[0]), np.prod(SHAPE[1:])).tolist() if families else None,
        **options,
    )
    seeds = [Candidate(f"b{i}", VectorGenome(tuple(one.ravel() / HIGHEST))) for i, one in enumerate(baselines)]
    strategy.seed(seeds, [score(seed.id, one) for seed, one in zip(seeds, baselines, strict=True)])
    pending: list[Candidate] = []
    while len(mean_of) * sum(map(len, items)) < n_scored and not strategy.stop_reasons():
        pending += strategy.ask(2 - len(pending))
        candidate = pending.pop(0)
        strategy.tell([score(candidate.id, np.array(candidate.genome.values).reshape(SHAPE) * HIGHEST)])
    finalists = [*sorted(mean_of, key=mean_of.__getitem__, reverse=True)[:8], strategy.recommend().id]
    on_select = {name: np.mean([one.mean() for one in mnist.right(weights_of[name], select)]) for name in finalists}
    return mnist.accuracy(weights_of[max(on_select, key=on_select.__getitem__)]), len(mean_of)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("mnist", type=Path)
    parser.add_argument("--items", type=int, required=True, help="budget of each search")
    parser.add_argument("--search-items", type=int, nargs="+", required=True, help="of each task")
    parser.add_argument("--seeds", type=int, default=20)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    mnist = Mnist(arguments.mnist)
    averages = ", ".join(
        f"{value:.2g}: {mnist.accuracy(np.full(SHAPE, value)):.3f}" for value in (0.0, 1 / 3, 0.5, 0.7, 1.0)
    )
    print(
        f"{arguments.items:,} items for each search, {arguments.seeds} seeds, {date.today()}; accuracy of equal weights: {averages}\n"
    )
    print("| items of a task | candidates | accuracy, mean +- standard error |\n|---|---|---|")
    for n_items in arguments.search_items:
        found = np.array(
            [search(mnist, n_items, arguments.items, seed, sigma0=0.15) for seed in range(arguments.seeds)]
        )
        error = found[:, 0].std(ddof=1) / len(found) ** 0.5
        print(f"| {n_items} | {found[:, 1].mean():.0f} | {found[:, 0].mean():.4f} +- {error:.4f} |", flush=True)


if __name__ == "__main__":
    main()
