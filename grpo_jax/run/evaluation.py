"""Evaluates a policy on held-out problems: accuracy, pass@k, maj@k, avg@k and rm@k."""

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Bool, Float, Int
from ml_collections import ConfigDict

from grpo_jax import data, rewards
from grpo_jax.run.grading import GradedTexts, grade_texts
from grpo_jax.run.problems import Problems
from grpo_jax.run.setup import Sampler
from grpo_jax.run.statistics import maj_at_k, pass_at_k, rm_at_k
from grpo_jax.types import Params, Rollout, Sampling

Ranker = Callable[[Rollout, GradedTexts], Float[np.ndarray, ' N']]


class Answers(NamedTuple):
    """A policy's answers to N problems, in the order of the data set."""

    values: dict[str, Float[np.ndarray, ' N']]  # metric -> one estimate per problem
    prompts: list[str]
    completions: list[str]  # greedy
    extracted: list[str | None]  # the answers in the greedy completions
    correct: list[bool]  # whether the greedy completions are right
    sampled_extracted: list[list[str | None]]  # [N][samples]
    sampled_correct: list[list[bool]]  # [N][samples]


class Evaluation(NamedTuple):
    """The part of `Answers` that is recorded while training."""

    metrics: dict[str, float]  # the means of `values`
    prompts: list[str]
    completions: list[str]
    correct: list[bool]


class _Completions(NamedTuple):
    """G completions for each of N problems."""

    prompts: list[str]  # N * G texts, one for each completion
    completions: list[str]
    correct: Bool[np.ndarray, 'N G']
    ended: Bool[np.ndarray, 'N G']
    length: Int[np.ndarray, 'N G']  # tokens
    scores: Float[np.ndarray, 'N G'] | None  # of the reward model


def answer_problems(
    sampler: Sampler,
    params: Params,
    problems: Problems,
    *,
    correct: rewards.RewardFunction,
    extract: Callable[[str], str | None],
    batch_size: int,
    samples: int = 0,
    k: Sequence[int] = (),
    temperature: float = 1.0,
    rank: Ranker | None = None,
) -> Answers:
    """Sample one greedy completion of every problem, and `samples` at `temperature`.

    Sampled completions use the same random numbers at every call (common random numbers), which
    reduces the noise when two policies are compared.

    Args:
      sampler: `sample.sample` with the model and its other settings bound.
      params: parameters of the policy.
      problems: held-out problems.
      correct: a reward function; a completion is right where it gives at least 1.
      extract: returns the answer for which a completion votes, or None if it does not vote.
      batch_size: prompts decoded at a time.
      samples: completions per problem in addition to the greedy one.
      k: sizes for pass@k and maj@k, each at most `samples`; see `statistics`.
      temperature: of the samples.
      rank: returns a reward model's scores of B * G completions, for rm@k (best of k).

    Returns:
      Answers with the values `eval/accuracy`, `eval/mean_length` (tokens) and `eval/clipped_ratio`
      of the greedy completions; with samples also `eval/avg@<samples>`, `eval/pass@k` and
      `eval/maj@k`, and with `rank` `eval/rm@k`.
    """

    def complete(group_size: int, temperature: float, rank: Ranker | None = None) -> _Completions:
        sample = functools.partial(
            sampler, params, step=0, sampling=Sampling(temperature), group_size=group_size
        )
        return _complete(sample, problems, correct, batch_size, rank)

    greedy = complete(1, 0.0)
    right = greedy.correct[:, 0]
    values = {
        'eval/accuracy': right.astype(float),
        'eval/mean_length': greedy.length[:, 0].astype(float),
        'eval/clipped_ratio': 1.0 - greedy.ended[:, 0],
    }
    sampled_extracted: list[list[str | None]] = []
    sampled_correct: list[list[bool]] = []
    if samples:
        sampled = complete(samples, temperature, rank)
        extracted = [extract(text) for text in sampled.completions]
        starts = range(0, len(extracted), samples)
        sampled_extracted = [extracted[start : start + samples] for start in starts]
        sampled_correct = sampled.correct.tolist()
        values[f'eval/avg@{samples}'] = sampled.correct.mean(1)
        values |= _estimates_at_k(sampled, sampled_extracted, k)
    return Answers(
        values,
        greedy.prompts,
        greedy.completions,
        [extract(text) for text in greedy.completions],
        right.tolist(),
        sampled_extracted,
        sampled_correct,
    )


def evaluate(sampler: Sampler, params: Params, problems: Problems, **options: Any) -> Evaluation:
    """Return the mean of each metric; the arguments are those of `answer_problems`."""
    answers = answer_problems(sampler, params, problems, **options)
    metrics = {name: float(column.mean()) for name, column in answers.values.items()}
    return Evaluation(metrics, answers.prompts, answers.completions, answers.correct)


def answer_records(answers: Answers) -> Iterator[dict[str, Any]]:
    """Yield one JSON object per problem: the prompt, the answers and whether they are right."""
    for i, prompt in enumerate(answers.prompts):
        record: dict[str, Any] = {
            'prompt': prompt,
            'completion': answers.completions[i],
            'extracted': answers.extracted[i],
            'correct': answers.correct[i],
        }
        if answers.sampled_correct:
            record['sampled_extracted'] = answers.sampled_extracted[i]
            record['sampled_correct'] = answers.sampled_correct[i]
        yield record


def evaluation_options(config: ConfigDict) -> dict[str, Any]:
    """Return keyword arguments of `answer_problems` from the config's `eval` section.

    Raises:
      ValueError: an unknown function, or a k larger than the number of samples.
    """
    if not config['correct']:
        raise ValueError(
            'eval.correct is empty: name the reward function that is 1 where an answer is right'
        )
    if not config['extract']:
        raise ValueError(
            'eval.extract is empty: name the function that finds the answer in a completion, such '
            "as 'extract_answer'"
        )
    for size in config['k'] if config['samples'] else ():
        if not 1 <= size <= config['samples']:
            raise ValueError(
                f'eval.k={size} needs at least {size} samples: eval.samples={config["samples"]}'
            )
    extract = rewards.extractor(config['extract'])
    numbers = {name: config[name] for name in ('batch_size', 'samples', 'k', 'temperature')}
    functions, _ = rewards.build({config['correct']: 1.0})
    return {'correct': functions[config['correct']], 'extract': extract, **numbers}


def _estimates_at_k(
    sampled: _Completions, extracted: list[list[str | None]], sizes: Sequence[int]
) -> dict[str, Float[np.ndarray, ' N']]:
    correct = sampled.correct.tolist()
    votes = [rewards.equivalence_classes(group) for group in extracted]
    values: dict[str, np.ndarray] = {}
    for k in sizes:
        passed = [pass_at_k(len(group), sum(group), k) for group in correct]
        voted = [maj_at_k(*pair, k) for pair in zip(votes, correct, strict=True)]
        values |= {f'eval/pass@{k}': np.array(passed), f'eval/maj@{k}': np.array(voted)}
        if sampled.scores is not None:
            pairs = zip(sampled.scores.tolist(), correct, strict=True)
            values[f'eval/rm@{k}'] = np.array([rm_at_k(*pair, k) for pair in pairs])
    return values


def _complete(
    sample: Callable[..., Rollout],
    problems: Problems,
    correct: rewards.RewardFunction,
    batch_size: int,
    rank: Ranker | None,
) -> _Completions:
    """Sample and grade completions of all problems; `sample` takes a batch of prompts."""
    parts = []
    for prompts, count in data.in_order(problems.table, batch_size):
        rollout = sample(prompts)
        texts = grade_texts(
            jax.device_get(rollout), problems, {'correct': correct}, {'correct': 1.0}
        )
        group_size = rollout.ended.shape[1]
        scores = None if rank is None else rank(rollout, texts).reshape(-1, group_size)[:count]
        right = (texts.scores.total >= 1).reshape(-1, group_size)[:count]
        end = count * group_size  # the last batch is filled up with copies
        ended, mask = (np.asarray(x)[:count] for x in (rollout.ended, rollout.mask))
        parts.append(
            _Completions(
                texts.prompts[:end], texts.completions[:end], right, ended, mask.sum(-1), scores
            )
        )
    return _Completions(
        [text for part in parts for text in part.prompts],
        [text for part in parts for text in part.completions],
        np.concatenate([part.correct for part in parts]),
        np.concatenate([part.ended for part in parts]),
        np.concatenate([part.length for part in parts]),
        None if rank is None else np.concatenate([part.scores for part in parts]),
    )
