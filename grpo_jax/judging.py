"""Turns rollouts into texts and verdicts: rewards while training, accuracy on held-out problems."""

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from grpo_jax import data, rewards
from grpo_jax.estimates import maj_at_k, pass_at_k, rm_at_k
from grpo_jax.setup import Problems, Sampler
from grpo_jax.tokens import texts
from grpo_jax.types import Params, Rollout, Sampling


class Judged(NamedTuple):
    """The texts of a rollout and what the reward functions say of them, in lists of B * G."""

    prompts: list[str]
    completions: list[str]
    scores: rewards.Scores

    def choose(self, rows: np.ndarray) -> 'Judged':
        """Those of some completions i64[N], in their order."""
        parts = {name: part[rows] for name, part in self.scores.parts.items()}
        return Judged(
            [self.prompts[row] for row in rows],
            [self.completions[row] for row in rows],
            self.scores._replace(total=self.scores.total[rows], parts=parts),
        )


class Answers(NamedTuple):
    """What the policy made of N problems, in the data set's order."""

    values: dict[str, np.ndarray]  # metric -> f64[N], one estimate per problem
    prompts: list[str]
    completions: list[str]  # greedy
    extracted: list[str | None]  # the answers in those
    correct: list[bool]  # of those
    sampled_extracted: list[list[str | None]]  # [N][samples]
    sampled_correct: list[list[bool]]  # [N][samples]


class Evaluation(NamedTuple):
    """What is kept of `Answers` while training."""

    metrics: dict[str, float]  # the means of `values`
    prompts: list[str]
    completions: list[str]
    correct: list[bool]


class _Asked(NamedTuple):
    """G completions for each of N problems."""

    prompts: list[str]  # N * G, as the next
    completions: list[str]
    correct: np.ndarray  # bool[N, G], as the next
    ended: np.ndarray
    length: np.ndarray  # i64[N, G], tokens
    scores: np.ndarray | None  # f32[N, G] of the reward model


def judge(
    rollout: Rollout,
    problems: Problems,
    functions: Mapping[str, Callable[..., Any]],
    weights: Mapping[str, float],
) -> Judged:
    """Turns a rollout's tokens into text and the text into rewards, on the host.

    Args:
      rollout: [B, G, T] arrays on the host.
      problems: where the prompts come from.
      functions: reward functions by name.
      weights: of the same names.

    Raises:
      rewards.RewardError: see `rewards.score`.
    """
    prompts, (batch, group_size, _) = rollout.prompts, rollout.tokens.shape
    columns = data.columns(problems.rows, prompts.index, group_size)
    real = np.arange(prompts.tokens.shape[1]) < prompts.length[:, None]
    questions = texts(problems.tokenizer, prompts.tokens, real)
    questions = [text for text in questions for _ in range(group_size)]
    tokens, mask = (np.reshape(x, (batch * group_size, -1)) for x in (rollout.tokens, rollout.mask))
    completions = texts(problems.tokenizer, tokens, mask, problems.stops)
    ids = [row[kept].tolist() for row, kept in zip(tokens, mask, strict=True)]
    scores = rewards.score(
        functions,
        weights,
        prompts=questions,
        completions=completions,
        columns=columns,
        completion_ids=ids,
    )
    return Judged(questions, completions, scores)


def together(parts: Sequence[Judged]) -> Judged:
    """Parts of a batch as one."""
    prompts = [text for part in parts for text in part.prompts]
    completions = [text for part in parts for text in part.completions]
    scores = [part.scores for part in parts]
    table = {name: np.concatenate([s.parts[name] for s in scores]) for name in scores[0].parts}
    total = np.concatenate([s.total for s in scores])
    return Judged(
        prompts, completions, rewards.Scores(total, table, sum(s.timeouts for s in scores))
    )


def answer(
    sampler: Sampler,
    params: Params,
    problems: Problems,
    *,
    correct: Callable[..., Any],
    extract: Callable[[str], str | None],
    batch_size: int,
    samples: int = 0,
    k: Sequence[int] = (),
    temperature: float = 1.0,
    rank: Callable[[Rollout, Judged], np.ndarray] | None = None,
) -> Answers:
    """Asks every problem once greedily, and `samples` times at `temperature`.

    Sampled completions use the same random numbers at every call, so two policies are compared on
    common noise.

    Args:
      sampler: `sample.sample` with the model and its other settings bound.
      params: the policy's parameters.
      problems: what to ask.
      correct: a reward function; a completion is right where it gives at least 1.
      extract: completion text to the answer it votes for; None does not vote.
      batch_size: prompts decoded at a time.
      samples: completions per problem beside the greedy one.
      k: sizes for pass@k and maj@k, each at most `samples`; see `estimates`.
      temperature: of the samples.
      rank: a reward model's scores f32[B * G] of a rollout, for rm@k (best of k).

    Returns:
      values `eval/accuracy`, `eval/mean_length` (tokens) and `eval/clipped_ratio` of the greedy
      completions; with samples also `eval/avg@<samples>`, `eval/pass@k` and `eval/maj@k`, and
      with `rank` `eval/rm@k`.
    """
    ask = functools.partial(_ask, sampler, params, problems, correct=correct, batch_size=batch_size)
    greedy = ask(1, Sampling(temperature=0.0))
    right = greedy.correct[:, 0]
    values = {
        'eval/accuracy': right.astype(float),
        'eval/mean_length': greedy.length[:, 0].astype(float),
        'eval/clipped_ratio': 1.0 - greedy.ended[:, 0],
    }
    extracted = [extract(text) for text in greedy.completions]
    given: list[list[str | None]] = []
    verdicts: list[list[bool]] = []
    if samples:
        sampled = ask(samples, Sampling(temperature=temperature), rank=rank)
        flat = [extract(text) for text in sampled.completions]
        given = [flat[start : start + samples] for start in range(0, len(flat), samples)]
        verdicts = sampled.correct.tolist()
        votes = [rewards.equivalence_classes(group) for group in given]
        values[f'eval/avg@{samples}'] = sampled.correct.mean(1)
        for size in k:
            passed = [pass_at_k(samples, sum(group), size) for group in verdicts]
            voted = [maj_at_k(*pair, size) for pair in zip(votes, verdicts, strict=True)]
            values |= {f'eval/pass@{size}': np.array(passed), f'eval/maj@{size}': np.array(voted)}
            if sampled.scores is not None:
                pairs = zip(sampled.scores, verdicts, strict=True)
                values[f'eval/rm@{size}'] = np.array([rm_at_k(*pair, size) for pair in pairs])
    return Answers(
        values, greedy.prompts, greedy.completions, extracted, right.tolist(), given, verdicts
    )


def evaluate(sampler: Sampler, params: Params, problems: Problems, **settings: Any) -> Evaluation:
    """The means of `answer`, which has the same arguments."""
    found = answer(sampler, params, problems, **settings)
    metrics = {name: float(column.mean()) for name, column in found.values.items()}
    return Evaluation(metrics, found.prompts, found.completions, found.correct)


def rows(answers: Answers) -> Iterator[dict[str, Any]]:
    """One JSON object per problem: what was asked and answered, and whether it was right."""
    for i, prompt in enumerate(answers.prompts):
        row: dict[str, Any] = {
            'prompt': prompt,
            'completion': answers.completions[i],
            'extracted': answers.extracted[i],
            'correct': answers.correct[i],
        }
        if answers.sampled_correct:
            row['sampled_extracted'] = answers.sampled_extracted[i]
            row['sampled_correct'] = answers.sampled_correct[i]
        yield row


def settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """Keyword arguments of `answer` from the config's `eval` section.

    Raises:
      ValueError: an unknown function, or a k that the number of samples cannot give.
    """
    if not config['correct']:
        raise ValueError(
            'eval.correct is empty: name the reward function that is 1 where an answer is right'
        )
    for size in config['k'] if config['samples'] else ():
        if not 1 <= size <= config['samples']:
            raise ValueError(
                f'eval.k={size} needs at least {size} samples: eval.samples={config["samples"]}'
            )
    extract = rewards.extractor(config['extract'])
    names = ('batch_size', 'samples', 'k', 'temperature')
    chosen = {name: config[name] for name in names}
    functions, _ = rewards.build({config['correct']: 1.0})
    return {'correct': functions[config['correct']], 'extract': extract, **chosen}


def _ask(
    sampler: Sampler,
    params: Params,
    problems: Problems,
    group_size: int,
    sampling: Sampling,
    *,
    correct: Callable[..., Any],
    batch_size: int,
    rank: Callable[[Rollout, Judged], np.ndarray] | None = None,
) -> _Asked:
    parts = []
    for prompts, count in data.in_order(problems.table, batch_size):
        rollout = sampler(params, prompts, step=0, sampling=sampling, group_size=group_size)
        judged = judge(jax.device_get(rollout), problems, {'correct': correct}, {'correct': 1.0})
        scores = None if rank is None else rank(rollout, judged).reshape(-1, group_size)[:count]
        right = (judged.scores.total >= 1).reshape(-1, group_size)[:count]
        rows = count * group_size  # the rest fills the last batch up
        ended, mask = (np.asarray(x)[:count] for x in (rollout.ended, rollout.mask))
        texts_of = (judged.prompts[:rows], judged.completions[:rows])
        parts.append(_Asked(*texts_of, right, ended, mask.sum(-1), scores))
    return _Asked(
        [text for part in parts for text in part.prompts],
        [text for part in parts for text in part.completions],
        np.concatenate([part.correct for part in parts]),
        np.concatenate([part.ended for part in parts]),
        np.concatenate([part.length for part in parts]),
        None if rank is None else np.concatenate([part.scores for part in parts]),
    )
