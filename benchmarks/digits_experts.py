"""Three experts of scikit-learn's digits as a merging problem: base + sum of w_i (expert_i - base), w in [0, 1]^3.

A 64-256-10 network (He initialisation, full-batch Adam, learning rate 0.003) is trained on all digits for 5 steps; from there one
expert each is trained for 100 steps on the digits 0-3, 4-6 and 7-9. The objectives are the error rates on the three groups
of the first 1437 images, with all ten digits as possible answers. Only a narrow region serves all three: the 9^3 grid
of weights has hypervolume .834 (reference point: all wrong), while 75 random points have about .5.
"""

from collections.abc import Callable

import numpy as np
from sklearn.datasets import load_digits

Floats = np.ndarray
Weights = list[np.ndarray]

GROUPS = ((0, 1, 2, 3), (4, 5, 6), (7, 8, 9))
N_IMAGES = 1437
BASE_STEPS, EXPERT_STEPS = 5, 100


def digits_experts(seed: int = 0) -> Callable[[Floats], Floats]:
    """Weights (3,) -> error rates (3,)."""
    images, labels = load_digits(return_X_y=True)
    images, labels = images[:N_IMAGES] / 16.0, labels[:N_IMAGES]
    generator = np.random.default_rng(seed)
    start = [
        generator.normal(size=(64, 256)) * np.sqrt(2 / 64),
        np.zeros(256),
        generator.normal(size=(256, 10)) * np.sqrt(2 / 256),
        np.zeros(10),
    ]
    base = train(start, images, labels, BASE_STEPS)
    inside = [np.isin(labels, group) for group in GROUPS]
    experts = [train(base, images[rows], labels[rows], EXPERT_STEPS) for rows in inside]
    deltas = [np.stack([expert[i] - base[i] for expert in experts]) for i in range(4)]
    images = images.astype(np.float32)

    def errors(weights: Floats) -> Floats:
        merged = [
            (part + np.tensordot(weights, delta, 1)).astype(np.float32)
            for part, delta in zip(base, deltas, strict=True)
        ]
        wrong = logits(merged, images)[1].argmax(axis=1) != labels
        return np.array([wrong[rows].mean() for rows in inside])

    return errors


def logits(weights: Weights, images: Floats) -> tuple[Floats, Floats]:
    """Hidden activations (n, 256) and logits (n, 10)."""
    hidden = np.maximum(images @ weights[0] + weights[1], 0.0)
    return hidden, hidden @ weights[2] + weights[3]


def train(start: Weights, images: Floats, labels: Floats, n_steps: int, learning_rate: float = 0.003) -> Weights:
    """Full-batch Adam on the cross-entropy."""
    weights = [part.copy() for part in start]
    first, second = [np.zeros_like(part) for part in start], [np.zeros_like(part) for part in start]
    targets = np.eye(10)[labels]
    for step in range(1, n_steps + 1):
        hidden, output = logits(weights, images)
        exponential = np.exp(output - output.max(axis=1, keepdims=True))
        slope = (exponential / exponential.sum(axis=1, keepdims=True) - targets) / len(images)
        inner = (slope @ weights[2].T) * (hidden > 0.0)
        gradients = [images.T @ inner, inner.sum(axis=0), hidden.T @ slope, slope.sum(axis=0)]
        for i, gradient in enumerate(gradients):
            first[i] = 0.9 * first[i] + 0.1 * gradient
            second[i] = 0.999 * second[i] + 0.001 * gradient**2
            move = first[i] / (1 - 0.9**step) / (np.sqrt(second[i] / (1 - 0.999**step)) + 1e-8)
            weights[i] = weights[i] - learning_rate * move
    return weights
