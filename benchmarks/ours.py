"""Our own step on a workload: the library calls that the benchmarks time."""

import ast
import dataclasses
import functools
import inspect
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import timing, workloads
from benchmarks.workloads import Workload
from grpo_jax import models
from grpo_jax.algorithm.config import Algorithm
from grpo_jax.algorithm.logprobs import completion_logprobs
from grpo_jax.algorithm.optimizer import adamw
from grpo_jax.algorithm.program import init_state, make_train_step
from grpo_jax.algorithm.sample import sample
from grpo_jax.engine.compute import Compute, choose
from grpo_jax.types import Params, Prompts, Rollout, Sampling

# Options of `Compute` that suit a workload. On CPUs: one width where all completions are equally
# long, packing where lengths vary; logits that stay in the cache; layers that are not copied out of
# a stack. On accelerators: as many rows and logits as fit, and all prompts together.
_SUITED = ('unroll=True', 'widths=1')
_ACCELERATED = (*_SUITED, 'microbatch=4', 'rows=16', 'logprob_chunk=256')
_EQUAL_LENGTHS = (*_SUITED, 'microbatch=1', 'logprob_chunk=32')
SUITED = dict.fromkeys(('W1', 'W2', 'W4'), _EQUAL_LENGTHS) | {
    'W3': (*_SUITED, 'packed=True', 'microbatch=8', 'rows=2', 'logprob_chunk=64'),
    'qwen2.5-1.5b': _ACCELERATED,
    'qwen2.5-7b': _ACCELERATED,
}


class Options(NamedTuple):
    """Keyword arguments, by what takes them."""

    algorithm: dict[str, Any]
    compute: dict[str, Any]
    model: dict[str, Any]
    sample: dict[str, Any]


def parse_options(pairs: Sequence[str]) -> Options:
    """Sorts 'name=value' into options of `Algorithm`, `Compute`, `ModelConfig` and `sample`.

    The first of them that has the name takes it: `unroll` is an option of `Compute`.

    Raises:
      ValueError: a pair without '=', or a name that none of them has.
    """
    options = Options({}, {}, {}, {})
    known = [
        {field.name for field in dataclasses.fields(Algorithm)} - {'terms'},  # derived
        {field.name for field in dataclasses.fields(Compute)},
        {field.name for field in dataclasses.fields(models.ModelConfig)},
        set(inspect.signature(sample).parameters),
    ]
    for pair in pairs:
        name, _, text = pair.partition('=')
        homes = [home for home, names in zip(options, known, strict=True) if name in names]
        if not homes or not text:
            raise ValueError(
                f'option {pair!r}: use name=value, of Algorithm, Compute, ModelConfig or sample'
            )
        try:
            homes[0][name] = ast.literal_eval(text)
        except (SyntaxError, ValueError):  # a word, such as a dtype
            homes[0][name] = text
    return options


def make_model(shape: workloads.Shape, **options: Any) -> models.Transformer:
    """A Qwen2 decoder whose parameters have the dtype of its computation.

    Args:
      shape: its sizes.
      **options: fields of `ModelConfig`; activations are kept for the backward pass by default.
    """
    fields = dataclasses.asdict(shape) | {'attention_bias': True, 'remat': False} | options
    return models.Transformer(models.ModelConfig(**({'param_dtype': fields['dtype']} | fields)))


def make_params(model: models.Transformer, spread: float = workloads.SPREAD) -> Params:
    """Random matrices of a standard deviation, by default that of the peers; scales 1, biases 0."""

    def make(key):
        def fill(path, leaf):
            name = path[-1].key
            if name == 'scale':
                return jnp.ones(leaf.shape, leaf.dtype)
            if name.endswith('bias'):
                return jnp.zeros(leaf.shape, leaf.dtype)
            return spread * jax.random.normal(next(keys), leaf.shape, leaf.dtype)

        keys = iter(jax.random.split(key, 64))
        return jax.tree_util.tree_map_with_path(fill, jax.eval_shape(model_init, key))

    def model_init(key):
        return models.init_params(model, key)

    return jax.jit(make)(jax.random.key(0))


def of_model(workload: Workload, model: models.Transformer) -> Workload:
    """The workload with the dtype and the number of layers of the model."""
    c = model.config
    shape = dataclasses.replace(workload.shape, dtype=c.dtype, layers=c.layers)
    return dataclasses.replace(workload, shape=shape)


class Ours:
    """State, reference and programs; one method for each phase of a step."""

    def __init__(self, workload: Workload, options: Options) -> None:
        self.model = make_model(workload.shape, **options.model)
        self.workload = of_model(workload, self.model)
        self.algorithm = Algorithm(**({'beta': workloads.BETA} | options.algorithm))
        w = self.workload
        shape = w.groups, w.group_size, w.prompt, w.completion
        compute = Compute(**options.compute)
        self.compute = choose(compute, self.model.config, shape)
        self.reference = make_params(self.model)
        optimizer, _ = adamw(
            learning_rate=workloads.LEARNING_RATE, steps=10**6, clip_norm=workloads.CLIP_NORM
        )
        self.state = init_state(self.model, optimizer, self.reference)
        self._sample_options = options.sample
        self._step: Any = make_train_step(self.model, optimizer, self.algorithm, compute=compute)
        self._logprobs = jax.jit(self._map_logprobs)
        self._words = workloads.words(workload.shape.vocab_size)
        self._ids = {word: i for i, word in enumerate(self._words)}

    def step(self, clock: timing.Clock, k: int) -> Rollout:
        """Runs step k under the clock; prompts and rewards are computed on the host."""
        wait = jax.block_until_ready
        clock.start()
        prompts = clock.timed('prompts', self.prompts)(k)
        rollout: Rollout = clock.timed('sample', self.sample, wait)(prompts, k)
        rewards = clock.timed('reward', self.rewards)(rollout)
        clock.timed('update', self.update, lambda metrics: wait((metrics, self.state)))(
            rollout, rewards
        )
        clock.cut()
        return rollout

    def prompts(self, k: int) -> Prompts:
        """The prompts of step k."""
        w = self.workload
        texts = workloads.prompt_texts(w.groups, w.prompt, seed=k)
        tokens: Any = workloads.encode(texts, self._ids)
        length: Any = np.full(w.groups, w.prompt, np.int32)
        index: Any = np.arange(w.groups, dtype=np.int32) + k * w.groups
        return Prompts(tokens, length, index)

    def sample(self, prompts: Prompts, k: int) -> Rollout:
        """The completions of step k."""
        return self._sample(self.state.params, prompts, k)

    def _sample(self, params: Params, prompts: Prompts, k: int) -> Rollout:
        eos_ids: Any = np.asarray(self.workload.eos_ids, np.int32)
        return sample(
            self.model,
            params,
            prompts,
            seed=0,
            step=k,
            sampling=Sampling(),
            eos_ids=eos_ids,
            group_size=self.workload.group_size,
            max_tokens=self.workload.completion,
            **self._sample_options,
        )

    def rewards(self, rollout: Rollout) -> np.ndarray:
        """f32[B, G], computed on the host."""
        tokens, mask = np.asarray(rollout.tokens), np.asarray(rollout.mask)
        scored = [
            workloads.reward(workloads.decode(row[real], self._words))
            for row, real in zip(
                tokens.reshape(-1, tokens.shape[-1]), mask.reshape(-1, mask.shape[-1]), strict=True
            )
        ]
        return np.asarray(scored, np.float32).reshape(tokens.shape[:2])

    def update(self, rollout: Rollout, rewards: np.ndarray) -> dict[str, jax.Array]:
        """Scores the reference, updates the state and returns the metrics."""
        self.state, metrics = self._step(
            self.state,
            self.reference,
            rollout,
            rewards,
            Sampling(),
            self.algorithm,
        )
        return metrics

    def score(self, rollout: Rollout) -> jax.Array:
        """Log-probs f32[B, G, T] of the reference alone, which `update` computes as well."""
        return self._logprobs(self.reference, rollout)

    def _map_logprobs(self, params: Params, rollout: Rollout) -> jax.Array:
        chunk = self.compute.logprob_chunk
        groups = jax.tree.map(lambda x: x[:, None], rollout)

        def one(group):
            return completion_logprobs(self.model, params, group, Sampling(), chunk=chunk)[0]

        return jax.lax.map(one, groups).reshape(rollout.tokens.shape)

    def temporaries(self) -> dict[str, int]:
        """Bytes that the compiled programs need besides their arguments and results.

        Only for completions of one block of the sampler, since more blocks cannot be traced.
        """
        w, prompts = self.workload, self.prompts(0)
        draw = jax.jit(functools.partial(self._sample, k=0))
        rollout = jax.eval_shape(draw, self.state.params, prompts)
        programs = {
            'sample': draw.lower(self.state.params, prompts),
            'update': self._step.lower(
                self.state,
                self.reference,
                rollout,
                np.zeros((w.groups, w.group_size), np.float32),
                Sampling(),
                self.algorithm,
            ),
        }
        quick = {'xla_backend_optimization_level': 0}  # does not change the memory
        return {
            name: int(program.compile(quick).memory_analysis().temp_size_in_bytes)
            for name, program in programs.items()
        }
