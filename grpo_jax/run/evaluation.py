"""Evaluates a policy on held-out problems: accuracy, pass@k, maj@k, avg@k and rm@k, or the reward.

What can be estimated depends on the config: accuracy, avg@k and pass@k need `eval.correct`, maj@k
needs `eval.extract` too. Without `eval.correct` the metric is the mean reward of greedy answers.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int
from ml_collections import ConfigDict

from grpo_jax import data, rewards
from grpo_jax.run import hosts
from grpo_jax.run.episodes.recorded import RecordedReplies
from grpo_jax.run.episodes.records import turn_records
from grpo_jax.run.errors import ConfigError, caught, naming
from grpo_jax.run.graded_texts import GradedTexts, grade_texts, on_host
from grpo_jax.run.problems import Problems
from grpo_jax.run.rollout_rewards import RolloutRewards
from grpo_jax.run.setup import Sampler
from grpo_jax.run.shared_grading import grade_in_shares, select_groups
from grpo_jax.run.statistics import maj_at_k, pass_at_k, rm_at_k
from grpo_jax.types import Params, Rollout, Sampling

Ranker = Callable[[Rollout, GradedTexts], Float[np.ndarray, ' N']]
# (rollout, number of its first groups) -> their rewards; with an environment also `books`, the
# replies to the rollout.
Rewarder = Callable[..., RolloutRewards]


class Answers(NamedTuple):
    """A policy's answers to N problems, in the order of the data set."""

    values: dict[str, Float[np.ndarray, ' N']]  # metric -> one estimate per problem
    prompts: list[str]
    completions: list[str]  # greedy
    extracted: Sequence[str | None] = ()  # the answers in them; empty without an extractor
    correct: Sequence[bool] = ()  # whether they are right; empty if that is unknown
    rewards: Sequence[float] = ()  # of them, where it is unknown whether they are right
    sampled_extracted: Sequence[list[str | None]] = ()  # [N][samples]
    sampled_correct: Sequence[list[bool]] = ()  # [N][samples]
    episodes: Sequence[dict[str, Any]] = ()  # of greedy answers, see `episodes.records`


class Evaluation(NamedTuple):
    """The part of `Answers` that is recorded while training."""

    metrics: dict[str, float]  # the means of `values`, and `spread`
    prompts: list[str]
    completions: list[str]
    correct: Sequence[bool] = ()  # empty if that is unknown
    rewards: Sequence[float] = ()  # of greedy answers, where it is unknown


class _Completions(NamedTuple):
    """G completions for each of N problems."""

    prompts: list[str]  # N * G texts, one for each completion
    completions: list[str]
    total: Float[np.ndarray, 'N G']  # rewards
    ended: Bool[np.ndarray, 'N G']
    length: Int[np.ndarray, 'N G']  # tokens
    scores: Float[np.ndarray, 'N G'] | None  # of the reward model
    episodes: list[dict[str, Any]]  # with an environment, of each greedy answer


def answer_problems(
    sampler: Sampler,
    params: Params,
    problems: Problems,
    *,
    correct: rewards.RewardFunction | None = None,
    extract: Callable[[str], str | None] | None = None,
    batch_size: int,
    samples: int = 0,
    k: Sequence[int] = (),
    temperature: float = 1.0,
    rank: Ranker | None = None,
    reward: Rewarder | None = None,
    call: rewards.CallOptions | None = None,
    book: Callable[[], RecordedReplies | None] = lambda: None,
) -> Answers:
    """Sample one greedy completion of every problem, and `samples` at `temperature`.

    Sampled completions use the same random numbers at every call (common random numbers), which
    reduces the noise when two policies are compared.

    Args:
      sampler: `sample.sample` with the model and its other settings bound.
      params: parameters of the policy.
      problems: held-out problems.
      correct: a reward function; a completion is right where it gives at least 1. Without it only
        greedy completions are sampled.
      extract: returns the answer for which a completion votes, or None if it does not vote.
      batch_size: prompts decoded at a time.
      samples: completions per problem in addition to the greedy one.
      k: sizes for pass@k and maj@k, each at most `samples`; see `statistics`.
      temperature: of the samples.
      rank: returns a reward model's scores of a rollout's completions, of those that it gets the
        texts of, for rm@k (best of k).
      reward: returns the rewards of the first groups of a rollout, see `Rewarder`, which are the
        metric without `correct`. The groups after them fill up a batch, with copies.
      call: how `correct` is called; its deadline is that of `extract` too.
      book: returns what keeps an environment's replies to a batch, see `EpisodeSampler.book`.

    Returns:
      Answers with the values `eval/accuracy` (without `correct` it is `eval/reward`),
      `eval/mean_length` (tokens) and `eval/clipped_ratio` of the greedy completions; with samples
      also `eval/avg@<samples>`, `eval/pass@k`, with `extract` `eval/maj@k` and with `rank`
      `eval/rm@k`.

    Raises:
      ValueError: neither `correct` nor `reward`.
    """
    call = call or rewards.CallOptions()
    grade = reward if correct is None else _grader_of(correct, problems, call)
    if grade is None:
        raise ValueError('nothing grades the answers: give correct or reward')

    def complete(group_size: int, temperature: float, rank: Ranker | None = None) -> _Completions:
        sample = functools.partial(
            sampler, params, step=0, sampling=Sampling(temperature), group_size=group_size
        )
        return _complete(sample, problems, grade, batch_size, rank, book)

    def answers_in(completions: list[str]) -> list[str | None]:
        if extract is None:
            return []
        return rewards.extract_answers(extract, completions, timeout=call.timeout)

    greedy = complete(1, 0.0)
    total, right = greedy.total[:, 0], greedy.total[:, 0] >= 1
    metric = {'eval/reward': total} if correct is None else {'eval/accuracy': right}
    values = {name: column.astype(float) for name, column in metric.items()} | {
        'eval/mean_length': greedy.length[:, 0].astype(float),
        'eval/clipped_ratio': 1.0 - greedy.ended[:, 0],
    }
    answers = Answers(values, greedy.prompts, greedy.completions, answers_in(greedy.completions))
    answers = answers._replace(episodes=greedy.episodes)
    if correct is None:
        return answers._replace(rewards=total.tolist())
    answers = answers._replace(correct=right.tolist())
    if not samples:
        return answers
    sampled = complete(samples, temperature, rank)
    extracted = answers_in(sampled.completions)
    starts = range(0, len(extracted), samples)
    voting = [extracted[start : start + samples] for start in starts]
    sampled_right = sampled.total >= 1
    values[f'eval/avg@{samples}'] = sampled_right.mean(1)
    values |= _estimates_at_k(sampled_right.tolist(), voting, sampled.scores, k)
    return answers._replace(sampled_extracted=voting, sampled_correct=sampled_right.tolist())


def evaluate(sampler: Sampler, params: Params, problems: Problems, **options: Any) -> Evaluation:
    """Return the mean of each metric; the arguments are those of `answer_problems`."""
    answers = answer_problems(sampler, params, problems, **options)
    metrics = {name: float(column.mean()) for name, column in answers.values.items()}
    metrics |= spread(answers)
    return Evaluation(
        metrics, answers.prompts, answers.completions, answers.correct, answers.rewards
    )


def spread(answers: Answers) -> dict[str, float]:
    """Return `eval/reward_std`, the sample standard deviation over problems, if there are rewards.

    It is 0 for a single problem.
    """
    rewards = answers.values.get('eval/reward')
    if rewards is None:
        return {}
    return {'eval/reward_std': float(rewards.std(ddof=1)) if len(rewards) > 1 else 0.0}


def answer_records(answers: Answers) -> Iterator[dict[str, Any]]:
    """Yield one JSON object per problem: the prompt, the answers and whether they are right."""
    for i, prompt in enumerate(answers.prompts):
        record: dict[str, Any] = {'prompt': prompt, 'completion': answers.completions[i]}
        columns = {
            'extracted': answers.extracted,
            'correct': answers.correct,
            'reward': answers.rewards,
            'sampled_extracted': answers.sampled_extracted,
            'sampled_correct': answers.sampled_correct,
        }
        record |= {name: column[i] for name, column in columns.items() if column}
        yield record | (answers.episodes[i] if answers.episodes else {})


def evaluation_options(config: ConfigDict) -> dict[str, Any]:
    """Return keyword arguments of `answer_problems` from the config's `eval` section.

    Raises:
      ConfigError: unknown functions, or a k larger than the number of samples.
    """
    numbers = {name: config[name] for name in ('batch_size', 'samples', 'k', 'temperature')}
    problems = [
        f'eval.k={size} needs at least {size} samples: eval.samples={numbers["samples"]}'
        for size in (numbers['k'] if numbers['samples'] else ())
        if not 1 <= size <= numbers['samples']
    ]
    options: dict[str, Any] = numbers | {'correct': None, 'extract': None}
    if config['extract']:
        with caught(problems), naming('eval.extract'):
            options['extract'] = rewards.extractor(config['extract'])
    if config['correct']:
        with caught(problems), naming('eval.correct'):
            functions, _ = rewards.build({config['correct']: 1.0})
            options['correct'] = functions[config['correct']]
    if problems:
        raise ConfigError(problems)
    return options


def _estimates_at_k(
    correct: list[list[bool]],
    extracted: list[list[str | None]],
    scores: Float[np.ndarray, 'N G'] | None,
    sizes: Sequence[int],
) -> dict[str, Float[np.ndarray, ' N']]:
    votes = [rewards.equivalence_classes(group) for group in extracted]
    values: dict[str, np.ndarray] = {}
    for k in sizes:
        values[f'eval/pass@{k}'] = np.array([pass_at_k(len(g), sum(g), k) for g in correct])
        if votes:
            voted = [maj_at_k(*pair, k) for pair in zip(votes, correct, strict=True)]
            values[f'eval/maj@{k}'] = np.array(voted)
        if scores is not None:
            pairs = zip(scores.tolist(), correct, strict=True)
            values[f'eval/rm@{k}'] = np.array([rm_at_k(*pair, k) for pair in pairs])
    return values


def _grader_of(
    correct: rewards.RewardFunction, problems: Problems, call: rewards.CallOptions
) -> Rewarder:
    """Return a function that grades a rollout by the reward function `correct` alone.

    Completions on which it fails are not right.
    """

    def grade(
        rollout: Rollout, groups: int, books: Sequence[RecordedReplies] = ()
    ) -> RolloutRewards:
        host, functions = on_host(rollout, groups), {'correct': correct}

        def grade_share(share: Int[np.ndarray, ' M']) -> tuple[GradedTexts, None]:
            selected, weights = select_groups(host, share), {'correct': 1.0}
            calls = {'correct': call}
            texts = grade_texts(selected, problems, functions, weights, calls=calls, books=books)
            return texts, None

        texts, _ = grade_in_shares(host, problems, grade_share, functions=functions)
        return RolloutRewards(texts, texts.scores.total.reshape(host.ended.shape), None, None)

    return grade


def _complete(
    sample: Callable[..., Rollout],
    problems: Problems,
    grade: Rewarder,
    batch_size: int,
    rank: Ranker | None,
    book: Callable[[], RecordedReplies | None],
) -> _Completions:
    """Sample and grade completions of all problems; `sample` takes a batch of prompts."""
    parts: list[_Completions] = []
    for prompts, count in data.in_order(problems.table, batch_size):
        # The last batch is filled up with copies.
        episodes: list[dict[str, Any]] = []
        if (kept := book()) is None:
            rollout = sample(prompts)
            graded = grade(rollout, count)
        else:
            rollout = sample(prompts, book=kept)
            graded = grade(rollout, count, books=[kept])
            if graded.total.shape[1] == 1:  # of greedy answers alone
                turns = graded.texts.turns or []
                episodes = list(turn_records(on_host(rollout, count), turns, [kept]))
        texts, total = graded.texts, np.asarray(graded.total)
        scores = None if rank is None else rank(rollout, texts).reshape(total.shape)
        host: Any = hosts.fetch((rollout.ended, rollout.policy_mask))
        ended, mask = (x[:count] for x in host)
        written = texts.prompts, list(texts.completions)
        parts.append(_Completions(*written, total, ended, mask.sum(-1), scores, episodes))
    return _Completions(
        [text for part in parts for text in part.prompts],
        [text for part in parts for text in part.completions],
        np.concatenate([part.total for part in parts]),
        np.concatenate([part.ended for part in parts]),
        np.concatenate([part.length for part in parts]),
        None if rank is None else np.concatenate([part.scores for part in parts]),
        [record for part in parts for record in part.episodes],
    )
