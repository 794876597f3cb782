"""scikit-learn's digits and the 64-256-10 perceptron of the M2N2 paper: data, evaluation, models to start from. It contains no search."""

from functools import cache

import numpy as np
from jax_random import normal, split
from sklearn.datasets import load_digits

Floats = np.ndarray
N_TRAIN = 1437
SIZES = (64 * 256, 256, 256 * 10, 10)
N_WEIGHTS = sum(SIZES)
SIGMA = np.float32(0.01)
"""of the initial weights, and of mutations"""


@cache
def digits(dtype: type = np.float32) -> tuple[Floats, Floats, Floats, Floats]:
    """Training images (1437, 64) in [0, 16] and labels, test images (360, 64) and labels."""
    images, labels = load_digits(return_X_y=True)
    images = images.astype(dtype)
    return images[:N_TRAIN], labels[:N_TRAIN], images[N_TRAIN:], labels[N_TRAIN:]


def layers(weights: Floats) -> tuple[Floats, Floats, Floats, Floats]:
    """Views (64, 256), (256,), (256, 10), (10,) of a flat vector, in the published order."""
    first, bias, second, last = np.split(weights, np.cumsum(SIZES)[:-1])
    return first.reshape(64, 256), bias, second.reshape(256, 10), last


def solved(weights: Floats, images: Floats, labels: Floats) -> Floats:
    """Which items a model gets right, (n_items,) bool, in plain NumPy."""
    first, bias, second, last = layers(weights)
    hidden = np.maximum(images @ first + bias, 0.0)
    return (hidden @ second + last).argmax(axis=1) == labels


def adam(weights: Floats, images: Floats, labels: Floats, rate: float = 0.003, steps: int = 10) -> Floats:
    """Full-batch Adam (0.9, 0.999, 1e-8) on cross-entropy."""
    weights = weights.astype(np.float64)
    mean, square = np.zeros(N_WEIGHTS), np.zeros(N_WEIGHTS)
    for step in range(1, steps + 1):
        slope = gradient(weights, images, labels)
        mean = 0.9 * mean + 0.1 * slope
        square = 0.999 * square + 0.001 * slope**2
        weights -= rate * (mean / (1 - 0.9**step)) / (np.sqrt(square / (1 - 0.999**step)) + 1e-8)
    return weights.astype(np.float32)


def gradient(weights: Floats, images: Floats, labels: Floats) -> Floats:
    """The gradient of the mean cross-entropy."""
    first, bias, second, last = layers(weights)
    hidden = np.maximum(images @ first + bias, 0.0)
    logits = hidden @ second + last
    shares = np.exp(logits - logits.max(axis=1, keepdims=True))
    shares /= shares.sum(axis=1, keepdims=True)
    shares[np.arange(len(labels)), labels] -= 1.0
    shares /= len(labels)
    back = (shares @ second.T) * (hidden > 0.0)
    parts = (images.T @ back, back.sum(axis=0), hidden.T @ shares, shares.sum(axis=0))
    return np.concatenate([part.ravel() for part in parts])


def random_models(pair: int | str) -> list[Floats]:
    """Two models with normal weights of standard deviation 0.01; "published" gives those of the released code."""
    if pair == "published":
        return [SIGMA * normal(key, N_WEIGHTS) for key in split(42, 2)]
    stream = np.random.default_rng([pair, 2])
    return [SIGMA * stream.standard_normal(N_WEIGHTS, dtype=np.float32) for _ in range(2)]


@cache
def specialists(pair: int | str) -> list[Floats]:
    """`random_models` after 10 full-batch Adam steps (rate 0.003) on the digits 0-4 and on 5-9."""
    images, labels, _, _ = digits()
    low = labels < 5
    return [
        adam(model, images[mask], labels[mask]) for model, mask in zip(random_models(pair), (low, ~low), strict=True)
    ]
