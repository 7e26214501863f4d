"""The stages of a training run: what each begins with, learns from, and leaves to the next."""

import dataclasses
import functools
import logging
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
from ml_collections import ConfigDict

from grpo_jax import collect as collecting
from grpo_jax import data, judging, models, reward_model, rewards, setup, sharding, update
from grpo_jax.advantages import check_group_options
from grpo_jax.algorithm import Algorithm
from grpo_jax.collect import Collected
from grpo_jax.distribution import check_sampling
from grpo_jax.methods import Parts, parts_of
from grpo_jax.optimizer import adamw
from grpo_jax.overlap import Blocks, eager_first
from grpo_jax.preferences import PAIRWISE
from grpo_jax.replay import Replay
from grpo_jax.sample import blocks, last
from grpo_jax.setup import Problems, Setup
from grpo_jax.types import Objective, Params, Rollout, Sampling, TrainState
from grpo_jax.verdicts import Judge

log = logging.getLogger('grpo_jax')

SFT = Algorithm(loss='nll', baseline='none', scale='none', aggregation='token_mean', kl='none')
_REWARD_STEPS = 1 << 20  # where the random numbers of a reward model's samples begin


class Models(NamedTuple):
    """The parameters that stages hand on."""

    policy: Params  # without adapters
    adapters: Params = None  # of the policy, while they are not folded in
    reward: Params = None  # of the reward model
    values: Params = None  # of the critic


@dataclasses.dataclass(frozen=True)
class Stage:
    """One training stage. What can be wrong with it was checked when it was made."""

    name: str
    steps: int
    updates: int  # of the optimizer per step
    schedule: optax.Schedule | None  # of the learning rate; None: there is none
    start: Callable[[Models], TrainState]  # may take the policy's memory over
    step: Callable[[TrainState, Models, Collected], tuple[TrainState, dict[str, jax.Array]]]
    # Dispatches the sampling of a step: (step, policy, what the stage began with). Gives rollouts,
    # or where the stage is not `ahead` also the blocks of rollouts that are drawn when asked for.
    sample: Callable[[int, Params, Models], Iterable[Any]]
    # Waits for it and judges it: (step, what was sampled, policy, what the stage began with).
    collect: Callable[[int, Iterable[Any], Params, Models], Collected]
    policy: Callable[[TrainState, Models], Params]  # that samples and is evaluated
    finish: Callable[[Models, TrainState], Models]
    heldout: Callable[[Params], judging.Evaluation] | None = None  # asked every eval_every steps
    eval_every: int = 1
    parts: Any = None  # algorithm, sampling and objective of a policy's stage
    ahead: bool = False  # step k + 1 is sampled before the update of step k
    stale: bool = False  # by a policy that this update changes


def sft_stage(made: Setup, training: Problems, heldout: Problems | None = None) -> Stage:
    """Imitation of the demonstrations; `heldout` where it is the last stage."""
    c, config = made.config.sft, made.config
    algorithm = dataclasses.replace(SFT, microbatch=c.microbatch)
    ones = np.ones((c.batch_size, 1), np.float32)
    _check_batch(made, 'sft', 'microbatch', c.microbatch)
    table = data.tokenize_demonstrations(
        training.rows,
        made.tokenizer,
        completion_template=config.data.demonstration,
        completion_length=config.data.completion_length,
        **setup.prompting(config, made.workdir),
    )
    if table.prompts.dropped:
        log.warning('demonstrations: %s', table.prompts.summary())
    batches = data.batches(table, c.batch_size, seed=config.seed, name='sft.batch_size')

    def sample(step: int, policy: Params, began: Models) -> list[Rollout]:
        return [sharding.put_groups(batches[step], made.mesh)]

    def collect(step: int, sampled: Iterable[Rollout], policy: Params, began: Models) -> Collected:
        (demonstrations,) = sampled
        return Collected(demonstrations, ones, {}, [])

    optimizer, schedule = _optimizer(config, 'sft', c.steps)
    parts = Parts(algorithm, Objective(), Sampling())
    stage = _policy_stage(
        made, 'sft', c.steps, parts, optimizer, schedule, sample, collect, heldout
    )
    # Demonstrations have no sampler, rewards or lengths to speak of.
    kept = ('loss', 'grad_norm', 'num_tokens', 'skipped_updates')

    def step(state: TrainState, began: Models, collected: Collected) -> Any:
        state, metrics = stage.step(state, began, collected)
        return state, {name: metrics[name] for name in kept}

    return dataclasses.replace(stage, step=step, ahead=True)


def grpo_stage(made: Setup, training: Problems, heldout: Problems, iteration: int = 1) -> Stage:
    """GRPO, or another method by its options, on sampled completions."""
    c, config = made.config.grpo, made.config
    parts = parts_of(config)
    algorithm, _, sampling = parts
    check_sampling(sampling)
    check_group_options(c.group_size, baseline=algorithm.baseline, scale=algorithm.scale)
    _check_batch(made, 'grpo', 'algorithm.microbatch', algorithm.microbatch)
    if c.sample_batch:
        _check_batch(made, 'grpo', 'sample_batch', c.sample_batch)
    judge = _judge(made, training, algorithm)
    batches = data.batches(training.table, c.batch_size, seed=config.seed, name='grpo.batch_size')
    prompts = collecting.Prefetched(
        lambda number: collecting.cut(batches[number], c.sample_batch, made.mesh)
    )
    scale = config.reward_model.weight

    def draw(step: int, policy: Params, began: Models) -> collecting.Draw:
        policy = began.policy if c.source == 'reference' else policy
        first = ((iteration - 1) * c.steps + step) * (1 + c.refill)

        def drawn(number: int) -> Iterator[Blocks]:
            """The first block is dispatched at once, the others when they are asked for."""
            sampler = functools.partial(
                made.sampler,
                policy,
                draw=blocks,
                sampling=sampling,
                group_size=c.group_size,
                weights=c.weights,
            )
            batch = prompts(first + number)
            return eager_first(sampler(part, step=first + number) for part in batch)

        return drawn

    def sample(step: int, policy: Params, began: Models) -> Iterable[Any]:
        sampled = draw(step, policy, began)(0)
        prompts.prepare(((iteration - 1) * c.steps + step + 1) * (1 + c.refill))
        return [last(part) for part in sampled] if c.ahead else sampled

    def collect(step: int, sampled: Iterable[Any], policy: Params, began: Models) -> Collected:
        rollout, verdict, metrics = collecting.gather(
            ([part] for part in sampled) if c.ahead else sampled,
            draw(step, policy, began),
            lambda rollout, early: judge(rollout, began.reward, early),
            judge.early,
            parts=c.batch_size // (c.sample_batch or c.batch_size),
            refill=c.refill,
        )
        metrics |= collecting.statistics(verdict, config.eval.correct)
        if verdict.scores is not None and scale:
            metrics['rewards/reward_model/mean'] = float(verdict.scores.mean())
            metrics['rewards/reward_model/std'] = float(verdict.scores.std())
        some = collecting.completion_rows(verdict, config.log.completions)
        given: Any = verdict.total if verdict.steps is None else verdict.steps
        if algorithm.loss in PAIRWISE:
            rollout, given = collecting.pick_pairs(jax.device_get(rollout), verdict.total)
        if c.drop:
            host = jax.device_get(rollout)
            kept = collecting.kept_rows(host, verdict.judged.completions, verdict.total, c.drop)
            rollout = rollout._replace(kept=kept)
        return Collected(rollout, given, metrics, some)

    updates = c.steps * algorithm.inner_updates
    optimizer, schedule = _optimizer(config, 'grpo', updates)
    if algorithm.step == 'trust_region':
        optimizer, schedule = optax.identity(), None
    name = _numbered('grpo', iteration)
    stage = _policy_stage(made, name, c.steps, parts, optimizer, schedule, sample, collect, heldout)
    return dataclasses.replace(stage, ahead=c.ahead, stale=c.ahead and c.source == 'policy')


def _policy_stage(
    made: Setup, name: str, steps: int, parts: Parts, optimizer, schedule, sample, collect, heldout
) -> Stage:
    """A stage that trains the policy by the update program."""
    algorithm, objective, sampling = parts
    config, lora = made.config, bool(made.model.config.lora.rank)
    moving = objective.reference_decay < 1
    keeps = lora or (algorithm.reads_reference and not moving)
    keeps = keeps or (name != 'sft' and config.grpo.source == 'reference')
    critic = None
    if algorithm.has_critic:
        total = max(steps * algorithm.inner_updates, 1)
        values = models.Transformer(models.with_scalar_head(made.model.config))
        critic = update.Critic(values, _optimizer(config, 'critic', total)[0])

    @functools.cache
    def program():
        return update.make_step(
            made.model, optimizer, algorithm, made.mesh, critic=critic, moving_reference=moving
        )

    def start(began: Models) -> TrainState:
        values = began.values
        if critic is not None and values is None:
            values = models.scalar_params(began.policy, critic.model.config)
        return update.init_state(
            made.model,
            optimizer,
            setup.initial_adapters(made) if lora else began.policy,
            made.mesh,
            donate=lora or not (keeps or critic),
            critic=critic,
            value_params=values,
            moving_reference=moving,
        )

    def step(state: TrainState, began: Models, collected: Collected) -> Any:
        given = sharding.put_groups((collected.rollout, collected.rewards), made.mesh)
        frozen = began.policy if lora or (algorithm.reads_reference and not moving) else None
        return program()(state, frozen, *given, sampling, objective)

    def policy(state: TrainState, began: Models) -> Params:
        return models.join(began.policy, state.params) if lora else state.params

    def finish(began: Models, state: TrainState) -> Models:
        if lora:
            return began._replace(adapters=state.params, values=state.value_params)
        return began._replace(policy=state.params, values=state.value_params)

    ask = None
    if heldout is not None:
        ask = functools.partial(
            judging.evaluate, made.sampler, problems=heldout, **judging.settings(config.eval)
        )
    return Stage(
        name, steps, algorithm.inner_updates, schedule, start, step, sample, collect, policy,
        finish, ask, config.eval.every, parts,
    )  # fmt: skip


def reward_stage(made: Setup, training: Problems, iteration: int = 1) -> Stage:
    """Training of the reward model on samples of the policy as the iteration finds it.

    A share of the prompts and completions comes from what earlier iterations sampled, see `replay`.
    """
    c, config = made.config.reward_model, made.config
    parts_of(config)  # refuses what would do nothing
    assert made.reward_model is not None
    if (c.loss == 'step') != (c.kind == 'process'):
        raise ValueError(
            f'reward_model.loss={c.loss!r} with kind={c.kind!r}: an outcome model is trained by '
            "'bradley_terry' or 'label', a process model by 'step'"
        )
    if c.loss == 'bradley_terry' and c.group_size < 2:
        raise ValueError(
            f"reward_model.group_size={c.group_size} with loss='bradley_terry', which compares "
            "completions of one prompt: make it at least 2, or use loss='label'"
        )
    _check_batch(made, 'reward_model', 'microbatch', c.microbatch)
    sampling = Sampling(**config.grpo.sampling)
    correct, _ = rewards.build({config.eval.correct: 1.0})
    labels = _step_labels(config) if c.kind == 'process' else None
    judge = Judge(training, correct, {config.eval.correct: 0.0}, labels)
    batches = data.batches(
        training.table, c.batch_size, seed=config.seed + 1, name='reward_model.batch_size'
    )
    replay = Replay(made.workdir / 'replay', iteration, c.replay, config.seed)
    model, mesh = made.reward_model, made.mesh
    optimizer, schedule = _optimizer(config, 'reward_model', c.steps)

    @functools.cache
    def program():
        return reward_model.make_step(model, optimizer, c.loss, mesh, microbatch=c.microbatch)

    def sample(step: int, policy: Params, began: Models) -> list[Rollout]:
        number = (iteration - 1) * c.steps + step
        rollout = made.sampler(
            began.policy,
            batches[number],
            step=_REWARD_STEPS + number,
            sampling=sampling,
            group_size=c.group_size,
        )
        return [rollout]

    def collect(step: int, sampled: Iterable[Rollout], policy: Params, began: Models) -> Collected:
        (rollout,) = sampled
        host = jax.device_get(rollout)
        verdict = judge(host, None)
        right = verdict.judged.scores.parts[config.eval.correct]
        given: Any = right.reshape(host.ended.shape) if labels is None else verdict.steps
        host, given = replay.mix(step, (host, given))
        return Collected(host, given, {'accuracy': float(np.mean(right >= 1))}, [])

    def start(began: Models) -> TrainState:
        params = began.reward
        if params is None:
            params = models.scalar_params(began.policy, model.config)
        return update.init_state(model, optimizer, params, mesh)

    def step(state: TrainState, began: Models, collected: Collected) -> Any:
        rollout, given = sharding.put_groups((collected.rollout, collected.rewards), mesh)
        trained_on = (given,) if labels is None else tuple(given)
        state, metrics = program()(state, rollout, *trained_on)
        tokens = rollout.prompts.length.sum() + rollout.mask.sum()
        metrics = {f'reward_model/{name}': value for name, value in metrics.items()}
        metrics['skipped_updates'] = metrics.pop('reward_model/skipped_updates')
        return state, metrics | {'num_tokens': tokens}

    def finish(began: Models, state: TrainState) -> Models:
        return began._replace(reward=state.params)

    return Stage(
        _numbered('reward', iteration), c.steps, 1, schedule, start, step, sample, collect,
        lambda state, began: began.policy, finish,
    )  # fmt: skip


def ranking(
    made: Setup, problems: Problems
) -> Callable[[Rollout, judging.Judged], np.ndarray] | None:
    """Scores of the run's newest reward model, for rm@k; None where it has none."""
    params = setup.newest_reward_params(made)
    if params is None:
        return None
    judge = _judge(made, problems, parts_of(made.config).algorithm)
    return functools.partial(judge.rank, reward_params=params)


def _step_labels(config: ConfigDict) -> tuple[str, Callable[..., Any], float]:
    """The step function unweighted: the truth that a process reward model learns."""
    name, function, _ = rewards.build_steps(config.grpo.step_rewards)
    return name, function, 1.0


def _optimizer(
    config: ConfigDict, section: str, steps: int
) -> tuple[optax.GradientTransformation, optax.Schedule]:
    """That of a section; what is wrong with it is said with the section's name."""
    try:
        return adamw(steps=steps, **config[section].optimizer)
    except ValueError as error:
        raise ValueError(f'{section}.optimizer: {error}') from error


def _check_batch(made: Setup, section: str, name: str, microbatch: int) -> None:
    sharding.check_batch(
        made.config[section].batch_size, microbatch, made.mesh,
        of=f'{section}.batch_size', name=f'{section}.{name}',
    )  # fmt: skip


def _numbered(kind: str, iteration: int) -> str:
    return kind if iteration == 1 else f'{kind}-{iteration}'


def _judge(made: Setup, training: Problems, algorithm: Algorithm) -> Judge:
    """The rules, step rewards and reward model that the config names."""
    config, c = made.config, made.config.reward_model
    process = algorithm.supervision == 'process'
    if process and not config.grpo.step_rewards:
        raise ValueError(
            "grpo.algorithm.supervision='process' without step rewards: name a step function, "
            "such as grpo.step_rewards={'right_steps': 1.0}"
        )
    if config.grpo.step_rewards and not (process or (c.steps and c.kind == 'process')):
        raise ValueError(
            "grpo.step_rewards does nothing with supervision='outcome': use supervision='process'"
        )
    if made.reward_model is not None and (c.kind == 'process') != process:
        raise ValueError(
            f'reward_model.kind={c.kind!r} with supervision={algorithm.supervision!r}: use an '
            'outcome model for outcomes and a process model for processes'
        )
    if config.grpo.rewards or not (process or made.reward_model is not None):
        functions, weights = rewards.build(config.grpo.rewards)
    else:  # judged all the same, so that the run's accuracy is known
        functions, _ = rewards.build({config.eval.correct: 1.0})
        weights = {config.eval.correct: 0.0}
    scorer = None
    if made.reward_model is not None:
        scorer = reward_model.make_scorer(made.reward_model, made.mesh, kind=c.kind)
    steps = rewards.build_steps(config.grpo.step_rewards) if process else None
    return Judge(training, functions, weights, steps, scorer, c.weight)
