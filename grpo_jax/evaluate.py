"""Accuracy, pass@k and maj@k on held-out problems, while training and as a command.

python -m grpo_jax.evaluate --workdir=FOLDER [--config.eval.samples=64 --config.eval.k=(1,64)]
"""

import collections
import dataclasses
import functools
import json
import logging
import math
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from ml_collections import ConfigDict

from grpo_jax import checkpoint, data, models, rewards, sharding
from grpo_jax.config import check_values, run_command
from grpo_jax.sample import sample
from grpo_jax.tokens import eos_ids, load_tokenizer, texts
from grpo_jax.types import Params, Prompts, Rollout, Sampling

log = logging.getLogger('grpo_jax')

Sampler = Callable[..., Rollout]  # (params, prompts, *, step, sampling, group_size) -> Rollout


class Problems(NamedTuple):
    """A data set's problems, ready to be asked and judged."""

    rows: data.Rows
    table: data.PromptTable
    tokenizer: Any


class Judged(NamedTuple):
    """The texts of a rollout and what the reward functions say of them, in lists of B * G."""

    prompts: list[str]
    completions: list[str]
    scores: rewards.Scores


class Evaluation(NamedTuple):
    """What the policy made of every held-out problem, in the data set's order."""

    metrics: dict[str, float]
    prompts: list[str]
    completions: list[str]  # greedy
    correct: list[bool]  # of those


def pass_at_k(samples: int, correct: int, k: int) -> float:
    """Unbiased estimate of the chance that one of k samples is right: 1 - C(n-c, k) / C(n, k).

    Chen et al., arXiv 2107.03374, eq. 1.

    Raises:
      ValueError: k is more than the number of samples.
    """
    if not 1 <= k <= samples:
        raise ValueError(
            f'pass@{k} cannot be estimated from {samples} samples: k is 1 to {samples}'
        )
    return 1 - math.comb(samples - correct, k) / math.comb(samples, k)


def maj_at_k(answers: Sequence[str | None], correct: Sequence[bool], k: int) -> bool:
    """Whether the most frequent of the first k answers is right; ties go to the one seen first.

    Samples without an answer (None) do not vote. Answers vote together when their texts are equal,
    so extraction has to normalise them.

    Raises:
      ValueError: k is more than the number of samples.
    """
    if not 1 <= k <= len(answers):
        raise ValueError(f'maj@{k} needs {k} samples, there are {len(answers)}')
    votes = collections.Counter(answer for answer in answers[:k] if answer is not None)
    if not votes:
        return False
    winner, _ = votes.most_common(1)[0]  # in order of first appearance among equals
    return correct[list(answers).index(winner)]


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
    completions = texts(problems.tokenizer, tokens, mask)
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


def evaluate(
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
) -> Evaluation:
    """Greedy accuracy, and pass@k and maj@k of `samples` sampled completions, over all problems.

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
      k: sizes for pass@k and maj@k, each at most `samples`.
      temperature: of the samples.

    Returns:
      metrics `eval/accuracy`, `eval/mean_length` (tokens), `eval/clipped_ratio`, `eval/pass@k` and
      `eval/maj@k`; and the greedy completions.
    """

    def ask(group_size: int, sampling: Sampling) -> tuple[Rollout, Judged]:
        rollouts, judged = [], []
        for prompts, count in data.in_order(problems.table, batch_size):
            rollout = sampler(params, prompts, step=0, sampling=sampling, group_size=group_size)
            rollout = jax.tree.map(lambda x, n=count: np.asarray(x)[:n], rollout)
            rollouts.append(rollout)
            judged.append(judge(rollout, problems, {'correct': correct}, {'correct': 1.0}))
        scores = rewards.Scores(np.concatenate([j.scores.total for j in judged]), {})
        prompts = [text for j in judged for text in j.prompts]
        completions = [text for j in judged for text in j.completions]
        whole = jax.tree.map(lambda *x: np.concatenate(x), *rollouts)
        return whole, Judged(prompts, completions, scores)

    rollout, greedy = ask(1, Sampling(temperature=0.0))
    right = greedy.scores.total >= 1
    metrics = {
        'eval/accuracy': float(right.mean()),
        'eval/mean_length': float(rollout.mask.sum(-1).mean()),
        'eval/clipped_ratio': float(1 - rollout.ended.mean()),
    }
    if samples:
        _, sampled = ask(samples, Sampling(temperature=temperature))
        verdicts = (sampled.scores.total >= 1).reshape(-1, samples).tolist()
        votes = _groups([extract(text) for text in sampled.completions], samples)
        for size in k:
            passed = [pass_at_k(samples, sum(group), size) for group in verdicts]
            voted = [maj_at_k(*pair, size) for pair in zip(votes, verdicts, strict=True)]
            metrics[f'eval/pass@{size}'] = float(np.mean(passed))
            metrics[f'eval/maj@{size}'] = float(np.mean(voted))
    return Evaluation(metrics, greedy.prompts, greedy.completions, right.tolist())


def settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """Keyword arguments of `evaluate` from the config's `eval` section.

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
    return {'correct': rewards.resolve(config['correct']), 'extract': extract, **chosen}


@dataclasses.dataclass(frozen=True)
class Setup:
    """What a policy needs to be asked questions, checked before anything is computed."""

    config: ConfigDict
    workdir: pathlib.Path
    mesh: jax.sharding.Mesh
    model: models.Transformer
    tokenizer: Any
    sampler: Sampler
    heldout: Problems


def prepare(config: ConfigDict, workdir: pathlib.Path) -> Setup:
    """Makes mesh, tokenizer, model and sampler, and opens the held-out problems.

    Raises:
      ValueError: anything in `config` that does not fit, or data that are missing or malformed.
    """
    check_values(config)
    mesh = sharding.make_mesh(**config.mesh)
    sharding.check_batch(config.eval.batch_size, config.eval.batch_size, mesh)
    tokenizer = load_tokenizer(config.tokenizer)
    model = models.Transformer(models.ModelConfig(vocab_size=len(tokenizer), **config.model))
    ends = np.array(eos_ids(tokenizer), np.int32)

    def sampler(params: Params, prompts: Prompts, **rest: Any) -> Rollout:
        return sample(
            model,
            params,
            sharding.put_groups(prompts, mesh),
            seed=config.seed,
            eos_ids=ends,
            max_tokens=config.data.completion_length,
            mesh=mesh,
            **rest,
        )

    heldout = load_problems(config, workdir, tokenizer, config.data.heldout_split)
    return Setup(config, workdir, mesh, model, tokenizer, sampler, heldout)


def load_problems(
    config: ConfigDict, workdir: pathlib.Path, tokenizer: Any, split: str
) -> Problems:
    """Opens one split of the config's data set; says how many prompts were too long and dropped."""
    cache = config.data.cache_dir or workdir / 'data'
    rows = data.load(config.data.name, split, cache_dir=cache, **config.data.options)
    table = data.tokenize_prompts(
        rows, tokenizer, template=config.data.prompt, prompt_length=config.data.prompt_length
    )
    if table.dropped:
        log.warning('%s: dropped %d of %d prompts, too long', split, table.dropped, len(rows))
    return Problems(rows, table, tokenizer)


def main(config: ConfigDict, workdir: str) -> None:
    """Evaluates the newest checkpoint of a run; prints one JSON object."""
    setup = prepare(config, pathlib.Path(workdir).absolute())
    chosen = settings(config.eval)
    abstract = jax.eval_shape(functools.partial(models.init, setup.model), jax.random.key(0))
    manager = checkpoint.newest_manager(setup.workdir)
    params = checkpoint.restore_params(manager, abstract, setup.mesh)
    evaluation = evaluate(setup.sampler, params, setup.heldout, **chosen)
    rows = zip(*evaluation[1:], strict=True)
    with (setup.workdir / 'evaluation.jsonl').open('w') as file:
        for prompt, completion, correct in rows:
            row = {'prompt': prompt, 'completion': completion, 'correct': correct}
            file.write(json.dumps(row, ensure_ascii=False) + '\n')
    found = {'checkpoint': f'{manager.directory.name}/{manager.latest_step()}'}
    print(json.dumps(found | {'problems': len(evaluation.correct)} | evaluation.metrics))


def run() -> None:
    """The console entry point."""
    run_command(main, saved=True)


def _groups(values: list[Any], size: int) -> list[list[Any]]:
    return [values[start : start + size] for start in range(0, len(values), size)]


if __name__ == '__main__':
    run()
