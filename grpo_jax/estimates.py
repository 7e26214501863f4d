"""What one can say of a policy from n samples per problem, and how sure one can be of it.

The first three functions take the samples of one problem and estimate what k fresh samples would
give, on average over subsets of the n. avg@k, the mean correctness of k samples, needs no function:
its expectation is the same for every k, so all n samples go into the mean. Estimates of all
problems go to `interval`.
"""

import functools
import itertools
import math
from collections.abc import Mapping, Sequence

import numpy as np

SUBSETS = 256  # how many subsets a majority vote is averaged over


def pass_at_k(samples: int, correct: int, k: int) -> float:
    """Chance that at least one of k samples is right: 1 - C(n-c, k) / C(n, k). Unbiased.

    Chen et al., arXiv 2107.03374, eq. 1.

    Raises:
      ValueError: k is more than the number of samples.
    """
    _check('pass', samples, k)
    return 1 - math.comb(samples - correct, k) / math.comb(samples, k)


def maj_at_k(votes: Sequence[int | None], correct: Sequence[bool], k: int, seed: int = 0) -> float:
    """Chance that the most frequent answer of k samples is right.

    The mean over all subsets of size k where there are at most `SUBSETS`, as for k = 1 and k = n,
    else over that many random ones. Taking the first k samples alone would leave the noise of a
    single draw in the estimate, which counts where problems are few. A subset keeps the order of
    the samples, and among equally frequent answers the one that comes first in it wins.

    Args:
      votes: n numbers, equal for equivalent answers; None where a sample gives no answer, which
        does not vote. A subset of such samples alone is wrong.
      correct: n verdicts. The winner is as right as the first sample of the subset that gave it.
      k: size of the subsets.
      seed: of random subsets. The same seed, n and k give the same subsets, for all problems.

    Raises:
      ValueError: k is more than the number of samples.
    """
    _check('maj', len(votes), k)
    subsets = _subsets(len(votes), k, seed)
    classes = sorted({vote for vote in votes if vote is not None})
    if not classes:
        return 0.0
    gave = np.array([[vote == c for c in classes] for vote in votes])[subsets]  # [subset, k, class]
    count, first = gave.sum(1), gave.argmax(1)
    winner = (count * k - first).argmax(1)[:, None]
    right = np.take_along_axis(np.array(correct)[subsets], first, 1) & (count > 0)
    return float(np.take_along_axis(right, winner, 1).mean())


def rm_at_k(scores: Sequence[float], correct: Sequence[bool], k: int) -> float:
    """Chance that the sample with the highest score among k is right (best of k). Unbiased.

    Exact over all subsets: in ascending order, the samples at ranks a to b (excluded) share a
    score, and the highest score of a subset is theirs in C(b, k) - C(a, k) of the C(n, k) subsets.
    Equal highest scores are a draw by lot, so such a group is as right as its mean.

    Raises:
      ValueError: k is more than the number of samples.
    """
    _check('rm', len(scores), k)
    total, start = 0.0, 0
    ranked = sorted(zip(scores, correct, strict=True), key=lambda pair: pair[0])
    for _, group in itertools.groupby(ranked, key=lambda pair: pair[0]):
        verdicts = [right for _, right in group]
        end = start + len(verdicts)
        chosen = math.comb(end, k) - math.comb(start, k)
        total += chosen / math.comb(len(scores), k) * sum(verdicts) / len(verdicts)
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
    """Percentile bootstrap over problems: where the mean lies if other problems were drawn.

    Problems are drawn whole, since the samples of one problem are not independent. For a change
    between two policies give the differences of their values for the same problems. The interval
    has no width where all problems have one value, and is too short for fewer than some 20.

    Args:
      values: f64[N] or f64[N, M], one estimate of each kind for every problem. All M columns see
        the same resamples.
      weights: of the same shape, for a mean weighted by problem; equal if None.
      level: probability that the interval is to hold.
      resamples: draws of N problems with replacement.
      seed: of the draws.

    Returns:
      f64[2] or f64[2, M], the lower and the upper end.

    Raises:
      ValueError: no problems.
    """
    values = np.asarray(values, np.float64)
    weights = np.ones(values.shape) if weights is None else np.asarray(weights, np.float64)
    if not len(values):
        raise ValueError('an interval needs at least one problem, there are none')
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
    """`name`, `name/low` and `name/high` for each name: the mean over problems, 95 % interval.

    Args:
      values: name -> N estimates.
      weights: name -> N weights, for the names whose mean is weighted.
    """
    given = dict(weights or {})
    table = np.array([*values.values()], np.float64).T
    scale = np.array([given.get(name, np.ones(len(table))) for name in values], np.float64).T
    means, (lows, highs) = (table * scale).sum(0) / scale.sum(0), interval(table, scale)
    found: dict[str, float] = {}
    for name, mean, low, high in zip(values, means, lows, highs, strict=True):
        found |= {name: float(mean), f'{name}/low': float(low), f'{name}/high': float(high)}
    return found


def _check(name: str, samples: int, k: int) -> None:
    if not 1 <= k <= samples:
        raise ValueError(
            f'{name}@{k} cannot be estimated from {samples} samples: k is 1 to {samples}'
        )


@functools.lru_cache(maxsize=64)
def _subsets(n: int, k: int, seed: int) -> np.ndarray:
    """i64[subset, k]: all subsets of range(n), or `SUBSETS` random ones, each in rising order."""
    if math.comb(n, k) <= SUBSETS:
        return np.array([*itertools.combinations(range(n), k)])
    order = np.random.default_rng(seed).random((SUBSETS, n)).argsort(1)
    return np.sort(order[:, :k], 1)
