"""The programs that a run dispatches, with their abstract arguments."""

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax

from grpo_jax import models
from grpo_jax.algorithm import reward_model
from grpo_jax.engine.calls import Call
from grpo_jax.engine.compute import Compute, choose
from grpo_jax.engine.sampler_calls import describe
from grpo_jax.engine.sampling_params import completed
from grpo_jax.run import abstract
from grpo_jax.run.plan.sampling import Move, Sample
from grpo_jax.run.setup import Setup
from grpo_jax.run.stages import Stage
from grpo_jax.types import Params, Sampling, TrainState


@dataclasses.dataclass(frozen=True)
class Program:
    """A program of a run.

    Attributes:
      name: such as 'grpo: update'; of a sampler, with its sizes.
      kind: the same without sizes; by default the name.
      build: returns its call, and abstract arrays that are on the devices while it runs, by what
        they are; those of its arguments among them are counted once.
      columns: columns that it decodes, the trips of its loop; 0: it decodes none.
      per_step: how often a training step runs it, if all completions are as long as they may be;
        0: only evaluations do, or for fewer completions.
      listed_only: it is not compiled, since it needs less memory than another one.
    """

    name: str
    build: Callable[[], tuple[Call, dict[str, Any]]]
    columns: int = 0
    per_step: float = 1.0
    listed_only: bool = False
    kind: str = ''

    def __post_init__(self) -> None:
        object.__setattr__(self, 'kind', self.kind or self.name)

    @functools.cached_property
    def _built(self) -> tuple[Call, dict[str, Any]]:
        return self.build()

    @property
    def call(self) -> Call:
        """The call, with abstract arguments."""
        return self._built[0]

    @property
    def resident(self) -> dict[str, Any]:
        """Abstract arrays that are on the devices while it runs."""
        return self._built[1]


# The abstract results of a program that was yielded before; compiled ones have shardings.
Results = Callable[[Program], Any]


def programs_of(setup: Setup, stage: Stage, results: Results) -> Iterator[Program]:
    """Yields the programs of a stage, the update first.

    A sampler has a program for each length of its caches and number of completions that are still
    decoded. Compiled are those of the first block of columns, which reads the prompts, of the
    last block with all completions, and the largest growth and compaction of the caches with the
    copies of prompts' caches, each of which changes one array at a time.

    Args:
      setup: the run.
      stage: one of its stages.
      results: called with a program that was yielded before, when one is built that takes its
        results.
    """
    make_update = stage.update
    if make_update is None:
        return

    def build_update() -> tuple[Call, dict[str, Any]]:
        update = make_update(None)  # which may compile programs to settle how it is computed
        return update, _state_of(setup, stage, update)

    yield Program(f'{stage.name}: update', build_update)
    update = make_update(choose(Compute(), setup.model.config, stage.shape, setup.mesh))
    resident = _state_of(setup, stage, update)
    policy, config = _policy(setup, update), setup.config
    record, weights = tuple(config.grpo.record), config.grpo.weights
    samples = functools.partial(_sampler, setup, policy, resident, results)
    if stage.name.startswith('grpo'):
        sampling = Sampling(**config.grpo.sampling)
        make = Sample(setup, stage.shape, sampling, weights=weights, record=record)
        yield from samples(f'{stage.name}: sampler', make)
        if stage.algorithm is not None and stage.algorithm.baseline == 'greedy':
            make = Sample(setup, _with_group(stage.shape, 1), Sampling(0.0), weights=weights)
            yield from samples(f'{stage.name}: greedy baseline', make)
        if setup.reward_model is not None:
            yield _scorer(setup, stage, resident)
    if stage.name.startswith('reward'):
        make = Sample(setup, stage.shape, Sampling(**config.grpo.sampling))
        yield from samples(f'{stage.name}: sampler', make)
    if stage.heldout is not None:
        shape = (config.eval.batch_size, 1, *stage.shape[2:3], config.data.completion_length)
        make = Sample(setup, shape, Sampling(0.0))
        yield from samples(f'{stage.name}: evaluation, greedy', make, per_step=0.0)
        if config.eval.samples and config.eval.correct:
            drawn = _with_group(shape, config.eval.samples)
            make = Sample(setup, drawn, Sampling(config.eval.temperature))
            yield from samples(f'{stage.name}: evaluation, samples', make, per_step=0.0)


def _with_group(shape: abstract.Shape, size: int) -> abstract.Shape:
    return shape[0], size, shape[2], shape[3]


def _sampler(
    setup: Setup, policy: Params, resident: dict[str, Any], results: Results, name: str,
    sample: Sample, *, per_step: float = 1.0,
) -> Iterator[Program]:  # fmt: skip
    """The programs of one sampler: a copy of the weights, the first block and the last one."""
    converted = sample.conversion(policy)
    copy = Program(f'{name}, weights', lambda: (_call(converted), resident), per_step=per_step)
    if converted is not None:
        yield copy

    def weights() -> tuple[Params, dict[str, Any]]:
        if converted is None:
            return policy, resident
        made = results(copy)
        return completed(policy, made), resident | {'weights to sample with': made}

    def build_first() -> tuple[Call, dict[str, Any]]:
        params, on_devices = weights()
        return sample.first(params), on_devices

    def build(move: Move) -> tuple[Call, dict[str, Any]]:
        params, on_devices = weights()
        made = results(first)
        return sample.call(move, params, made), on_devices | sample.beside(move, made)

    width = sample.calls.first_width
    first = Program(f'{name}, prompts and first block', build_first, width, per_step)
    yield first
    largest = {m.kind: m for m in sorted(sample.moves, key=lambda m: (m.size, m.after))}
    for move in sample.moves:
        is_largest = move == largest[move.kind] and move.kind != 'choice'  # which has no caches
        of_block = move.kind == 'block' and is_largest
        times = per_step * (sample.blocks if of_block else 0)
        columns = sample.shape[3] - sample.blocks * sample.calls.block if of_block else 0
        yield Program(
            f'{name}, {describe(*move)}', functools.partial(build, move), columns, times,
            listed_only=not is_largest, kind=f'{name}, {move.kind}',
        )  # fmt: skip


def _call(call: Call | None) -> Call:
    assert call is not None
    return call


def _scorer(setup: Setup, stage: Stage, resident: dict[str, Any]) -> Program:
    model = setup.reward_model
    assert model is not None
    scorer = reward_model.make_scorer(model, setup.mesh, kind=setup.config.reward_model.kind)
    rollout, _ = abstract.on_mesh(setup, abstract.rollout(stage.shape), None)
    call = Call(scorer, (resident['reward model'], rollout), name='reward model')
    return Program(f'{stage.name}: reward model', lambda: (call, resident))


def _state_of(setup: Setup, stage: Stage, update: Call) -> dict[str, Any]:
    """What is on the devices all the time, by name."""
    state: TrainState = update.arguments[0]
    kind = 'reward model' if stage.name.startswith('reward') else 'policy'
    parts = {
        kind: state.params,
        'moments': state.opt_state,
        'critic': state.value_params,
        "critic's moments": state.value_opt_state,
        'moving reference': state.reference,
    }
    if stage.name.startswith('reward'):
        parts['policy'] = abstract.params(setup, models.Transformer(setup.model.config.base))
        return _present(parts)
    frozen = update.arguments[1]
    has_base = bool(setup.model.config.lora.rank)
    parts['base' if has_base else 'reference'] = frozen
    if setup.reward_model is not None:
        parts['reward model'] = abstract.params(setup, setup.reward_model)
    return _present(parts)


def _present(parts: dict[str, Any]) -> dict[str, Any]:
    return {name: tree for name, tree in parts.items() if jax.tree.leaves(tree)}


def _policy(setup: Setup, update: Call) -> Params:
    """The parameters that are sampled from."""
    if not isinstance(update.arguments[1], dict) or not setup.model.config.lora.rank:
        return update.arguments[0].params
    return models.join_adapters(update.arguments[1], update.arguments[0].params)
