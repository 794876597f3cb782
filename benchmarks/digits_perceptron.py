"""scikit-learn's digits and the 64-256-10 perceptron of the M2N2 paper: data, evaluation, gradient training. No search in here."""

from functools import cache

import numba
import numpy as np
from sklearn.datasets import load_digits

Floats = np.ndarray
N_TRAIN = 1437
SIZES = (64 * 256, 256, 256 * 10, 10)
N_WEIGHTS = sum(SIZES)


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
    """Which items a model gets right, (n_items,) bool, as one would write it down."""
    first, bias, second, last = layers(weights)
    hidden = np.maximum(images @ first + bias, 0.0)
    return (hidden @ second + last).argmax(axis=1) == labels


class Items:
    """Labelled images in the form that `solved` takes: half of all pixels are 0, so only the others are kept, four at a time."""

    def __init__(self, images: Floats, labels: Floats) -> None:
        columns: list[int] = []
        values: list[float] = []
        starts = [0]
        for image in images:
            lit = np.flatnonzero(image)
            padding = -len(lit) % 4
            columns += [*lit.tolist(), *[0] * padding]
            values += [*image[lit].tolist(), *[0.0] * padding]
            starts.append(len(columns))
        self._arrays = (np.array(starts), np.array(columns), np.array(values, np.float32), labels)

    def solved(self, weights: Floats) -> Floats:
        """Which items a float32 model gets right, (n_items,) bool; holds no interpreter lock."""
        right = np.empty(len(self._arrays[-1]), np.bool_)
        _solve(weights, *self._arrays, right)
        return right


_ANY_ORDER = {"contract", "nsz", "reassoc"}
"""of sums, so that they can be vectorised"""


@numba.njit(cache=True, fastmath=_ANY_ORDER, nogil=True, inline="never")
def _add_pixels(hidden, row0, row1, row2, row3, value0, value1, value2, value3):
    for k in range(256):
        hidden[k] += value0 * row0[k] + value1 * row1[k] + value2 * row2[k] + value3 * row3[k]


@numba.njit(cache=True, fastmath=_ANY_ORDER, nogil=True, inline="never")
def _five_classes(hidden, second, logits):
    sum0 = sum1 = sum2 = sum3 = sum4 = np.float32(0.0)
    for k in range(256):
        value = max(hidden[k], np.float32(0.0))
        sum0 += value * second[0, k]
        sum1 += value * second[1, k]
        sum2 += value * second[2, k]
        sum3 += value * second[3, k]
        sum4 += value * second[4, k]
    logits[0], logits[1], logits[2], logits[3], logits[4] = sum0, sum1, sum2, sum3, sum4


@numba.njit(cache=True, fastmath=_ANY_ORDER, nogil=True)
def _solve(weights, starts, columns, values, labels, right):
    first, bias = weights[:16384].reshape(64, 256), weights[16384:16640]
    second, last = np.ascontiguousarray(weights[16640:19200].reshape(256, 10).T), weights[19200:]
    hidden, logits = np.empty(256, np.float32), np.empty(10, np.float32)
    for item in range(len(labels)):
        hidden[:] = bias
        for j in range(starts[item], starts[item + 1], 4):
            rows = columns[j : j + 4]
            _add_pixels(
                hidden,
                first[rows[0]],
                first[rows[1]],
                first[rows[2]],
                first[rows[3]],
                values[j],
                values[j + 1],
                values[j + 2],
                values[j + 3],
            )
        _five_classes(hidden, second[:5], logits[:5])
        _five_classes(hidden, second[5:], logits[5:])
        right[item] = np.argmax(logits + last) == labels[item]


@cache
def items() -> tuple[Items, Items]:
    """Training and test items."""
    images, labels, test_images, test_labels = digits()
    return Items(images, labels), Items(test_images, test_labels)


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
    """Of the mean cross-entropy."""
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
