"""Estimates of a policy's accuracy from n samples per problem, and their confidence intervals.

`pass_at_k`, `maj_at_k` and `rm_at_k` take the n samples of one problem and estimate the accuracy of
k fresh samples, as the average over subsets of the n. avg@k, the mean correctness of k samples,
needs no function: its expectation does not depend on k, so it is the mean of all n. `interval`
takes the estimates of all problems.
"""

import functools
import itertools
import math
from collections.abc import Mapping, Sequence

import numpy as np

SUBSETS = 256  # largest number of subsets that a majority vote is averaged over


def pass_at_k(samples: int, correct: int, k: int) -> float:
    """Estimate the probability that at least one of k samples is right. Unbiased.

    1 - C(n - c, k) / C(n, k): Chen et al., arXiv 2107.03374, eq. 1.

    Args:
      samples: n.
      correct: c, how many of them are right.
      k: at most n.

    Raises:
      ValueError: k is more than the number of samples.
    """
    _check('pass', samples, k)
    return 1 - math.comb(samples - correct, k) / math.comb(samples, k)


def maj_at_k(votes: Sequence[int | None], correct: Sequence[bool], k: int, seed: int = 0) -> float:
    """Estimate the probability that the most frequent answer of k samples is right.

    The mean over all subsets of size k if there are at most `SUBSETS` of them, as for k = 1 and
    k = n, else over `SUBSETS` random ones. The first k samples alone would leave the noise of a
    single draw in the estimate, which matters if there are few problems. A subset keeps the order
    of the samples; of equally frequent answers the one that comes first in it wins.

    Args:
      votes: n numbers, equal for equivalent answers; None for a sample without an answer, which
        does not vote. A subset of only such samples is wrong.
      correct: whether each of the n samples is right. The winner is right if the first sample of
        the subset with this answer is.
      k: size of the subsets.
      seed: seed of the random subsets. The same seed, n and k give the same subsets for all
        problems.

    Raises:
      ValueError: k is more than the number of samples.
    """
    _check('maj', len(votes), k)
    subsets = _subsets(len(votes), k, seed)
    classes = sorted({vote for vote in votes if vote is not None})
    if not classes:
        return 0.0
    voted = np.array([[vote == c for c in classes] for vote in votes])[subsets]
    count, first = voted.sum(1), voted.argmax(1)  # [subset, class], from [subset, k, class]
    winner = (count * k - first).argmax(1)[:, None]
    right = np.take_along_axis(np.array(correct)[subsets], first, 1) & (count > 0)
    return float(np.take_along_axis(right, winner, 1).mean())


def rm_at_k(scores: Sequence[float], correct: Sequence[bool], k: int) -> float:
    """Estimate the probability that the sample of the highest score among k is right. Unbiased.

    Also called best of k. Exact over all subsets: if in ascending order the samples at ranks a to b
    (excluded) share a score, it is the highest of a subset in C(b, k) - C(a, k) of the C(n, k)
    subsets. Among equal highest scores one sample is drawn at random, so they count by their mean.

    Args:
      scores: scores of the n samples.
      correct: whether each of the n samples is right.
      k: at most n.

    Raises:
      ValueError: k is more than the number of samples.
    """
    _check('rm', len(scores), k)
    total, start = 0.0, 0
    ranked = sorted(zip(scores, correct, strict=True), key=lambda pair: pair[0])
    for _, group in itertools.groupby(ranked, key=lambda pair: pair[0]):
        tied = [right for _, right in group]
        end = start + len(tied)
        subsets = math.comb(end, k) - math.comb(start, k)
        total += subsets / math.comb(len(scores), k) * sum(tied) / len(tied)
        start = end
    return total


def interval(
    values: np.ndarray,
    weights: np.ndarray | None = None,
    *,
    level: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> np.ndarray:
    """Compute a percentile bootstrap interval of the mean, with resampled problems.

    Problems are drawn with all their samples, which are not independent. For the difference between
    two policies pass the differences of their values on the same problems. The interval has no
    width if all problems have the same value, and is too short for fewer than about 20.

    Args:
      values: f64[N] or f64[N, M], one estimate of each kind for every problem. All M columns use
        the same resamples.
      weights: of the same shape, for a mean weighted by problem; None: equal weights.
      level: probability that the interval contains the mean.
      resamples: number of draws of N problems with replacement.
      seed: seed of the draws.

    Returns:
      f64[2] or f64[2, M], the lower and the upper bound.

    Raises:
      ValueError: no problems.
    """
    values = np.asarray(values, np.float64)
    weights = np.ones(values.shape) if weights is None else np.asarray(weights, np.float64)
    if not len(values):
        raise ValueError('an interval needs at least one problem, and there are none')
    rng, n = np.random.default_rng(seed), len(values)
    chunk = max(1, 1_000_000 // n)  # bounds the memory
    means = []
    for start in range(0, resamples, chunk):
        rows = min(chunk, resamples - start)
        drawn = rng.integers(n, size=(rows, n)) + n * np.arange(rows)[:, None]
        counts = np.bincount(drawn.ravel(), minlength=rows * n).reshape(rows, n)
        means.append(counts @ (weights * values) / (counts @ weights))
    tail = (1 - level) / 2
    return np.quantile(np.concatenate(means), [tail, 1 - tail], axis=0)


def with_intervals(
    values: Mapping[str, np.ndarray | Sequence[float]],
    weights: Mapping[str, np.ndarray | Sequence[float]] | None = None,
) -> dict[str, float]:
    """Return the mean over problems and its 95 % interval: `name`, `name/low`, `name/high`.

    Args:
      values: name -> N estimates.
      weights: name -> N weights, for the names whose mean is weighted.

    Raises:
      ValueError: no problems.
    """
    weights = weights or {}
    table = np.array([*values.values()], np.float64).T
    scale = np.array([weights.get(name, np.ones(len(table))) for name in values], np.float64).T
    means, (lows, highs) = (table * scale).sum(0) / scale.sum(0), interval(table, scale)
    metrics: dict[str, float] = {}
    for name, mean, low, high in zip(values, means, lows, highs, strict=True):
        metrics |= {name: float(mean), f'{name}/low': float(low), f'{name}/high': float(high)}
    return metrics


def _check(name: str, samples: int, k: int) -> None:
    if not 1 <= k <= samples:
        raise ValueError(
            f'{name}@{k} cannot be estimated from {samples} samples: k is 1 to {samples}'
        )


@functools.lru_cache(maxsize=64)
def _subsets(n: int, k: int, seed: int) -> np.ndarray:
    """Return i64[subset, k]: all subsets of range(n), or `SUBSETS` random ones, sorted."""
    if math.comb(n, k) <= SUBSETS:
        return np.array([*itertools.combinations(range(n), k)])
    order = np.random.default_rng(seed).random((SUBSETS, n)).argsort(1)
    return np.sort(order[:, :k], 1)
