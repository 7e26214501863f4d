"""Times the bare loops of `benchmarks/bare.py` in turn with our programs, and checks them.

    python -m benchmarks.step --workload=W1 --floors
    python -m benchmarks.step --workload=smoke --check

Ratios are of calls that follow one another, so that a busy machine slows both.
"""

import functools
import time
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import bare, timing
from benchmarks.ours import Ours, make_params
from benchmarks.workloads import Workload
from grpo_jax.types import Params, Prompts, Rollout

TOLERANCE = 1e-4  # of log-probs in float32, in nats
SAME_DRAWS = 0.95  # a rounding error changes about one draw in some hundreds


class Floors:
    """The bare programs of one workload, compiled, and the seconds that each call took."""

    def __init__(self, workload: Workload, params: Params, lengths: np.ndarray) -> None:
        """Arranges the weights.

        Args:
          workload: sizes.
          params: ours, whose values the bare loops take over.
          lengths: i32[B, G] of a first rollout. Where rows end, `score` and `gradient` compute
            rows of their mean length, so that floors are for as many tokens as are real.
        """
        c = workload.shape
        self.workload = workload
        self.columns = max(2, round(float(lengths.mean())))
        self.weights = jax.jit(functools.partial(bare.arrange, c=c))(params)
        self._programs = {
            'sample': jax.jit(
                functools.partial(
                    bare.generate, c, group_size=workload.group_size, length=workload.completion
                )
            ),
            'score': jax.jit(functools.partial(bare.score, c)),
            'gradient': jax.jit(functools.partial(bare.gradient, c)),
        }
        self._times: list[dict[str, float]] = []

    def run(self, prompts: Prompts, rollout: Rollout, k: int) -> None:
        """Calls each program once on the batch of step k."""
        tokens = jnp.asarray(rollout.tokens)[..., : self.columns]
        given = jnp.asarray(prompts.tokens)
        arguments = {
            'sample': (given, jax.random.key(k)),
            'score': (given, tokens),
            'gradient': (given, tokens),
        }
        took = {}
        for name, program in self._programs.items():
            start = time.perf_counter()
            jax.block_until_ready(program(self.weights, *arguments[name]))
            took[name] = time.perf_counter() - start
        self._times.append(took)

    def compare(
        self, steps: Sequence[dict[str, float]], tokens: Sequence[int]
    ) -> dict[str, dict[str, dict[str, float]]]:
        """Seconds of the floors, and how many times as long ours took in the same step.

        Args:
          steps: our phases of the last calls of `run`.
          tokens: real completion tokens of each; the floors of score and gradient are scaled to
            them.
        """
        floors = []
        for took, real in zip(self._times[-len(steps) :], tokens, strict=True):
            scale = real / (self.workload.rows * self.columns)
            gradient, score = took['gradient'] * scale, took['score'] * scale
            floors.append(
                {
                    'sample': took['sample'],
                    'update': gradient,
                    'update and reference': gradient + score,
                }
            )
        return {
            name: {
                'seconds': timing.summary([floor[name] for floor in floors]),
                'ratio': timing.summary(
                    [
                        step[name.split()[0]] / floor[name]
                        for step, floor in zip(steps, floors, strict=True)
                    ]
                ),
            }
            for name in floors[0]
        }


def check(ours: Ours) -> dict[str, float]:
    """Whether the bare programs compute what ours do, from the same weights.

    Args:
      ours: on a workload whose rows run to their full length.

    Returns:
      The largest difference of log-probs, and the share of sampled tokens that the same random
      numbers draw from the logits of the bare forward pass: a shift of the distribution by one
      token's mass changes a draw, so it also compares decoding with that pass.
    """
    w, c = ours.workload, ours.workload.shape
    prompts = ours.prompts(0)
    rollout = ours.sample(prompts, 0)
    weights = bare.arrange(ours.reference, c)
    given = jnp.asarray(prompts.tokens)
    found = jax.jit(functools.partial(bare.score, c))(weights, given, rollout.tokens)

    @jax.jit
    def agree(params):
        weights, key = bare.arrange(params, c), jax.random.key(0)
        tokens = bare.generate(c, weights, given, key, group_size=w.group_size, length=w.completion)
        logits = jax.vmap(functools.partial(bare.group_logits, c, weights))(given, tokens)
        logits = logits.reshape(-1, *logits.shape[2:])
        again = [bare.draw(jax.random.fold_in(key, i), logits[:, i]) for i in range(w.completion)]
        return (jnp.stack(again, 1) == tokens.reshape(-1, w.completion)).mean()

    return {
        'logprob_difference': float(jnp.abs(found - ours.score(rollout)).max()),
        'same_draws': float(agree(make_params(ours.model, c.width**-0.5))),
    }
