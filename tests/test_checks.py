"""Where Python runs a loss: in `checks.trace_loss`, and nowhere inside of the engine's loops."""

import traceback

import jax
import numpy as np
import optax
import pytest
import tiny

from grpo_jax import sharding
from grpo_jax.algorithm import losses
from grpo_jax.algorithm.config import Algorithm
from grpo_jax.algorithm.program import init_state, make_train_step
from grpo_jax.engine.compute import Compute
from grpo_jax.models import ModelConfig, Transformer
from grpo_jax.types import Prompts, Rollout

GROUPS, GROUP_SIZE, LENGTH = 4, 2, 80  # long enough for two widths

CASES = {
    'one chunk': ({}, Compute(logprob_chunk=128)),
    'chunks': ({}, Compute(logprob_chunk=16)),
    'microbatches': ({'beta': 0.1, 'inner_updates': 2}, Compute(microbatch=2)),
    'bundles': ({'entropy': True}, Compute(rows=4, widths=2)),
    'packed': ({}, Compute(rows=4, packed=True, logprob_chunk=32)),
    'sequence': ({'ratio': 'sequence'}, Compute(widths=2)),
    'sequence, bundles': ({'importance': 'sequence'}, Compute(rows=2, widths=2)),
    'batch scale': ({'scale': 'batch', 'top_entropy': 0.5}, Compute()),
}


def trace(algorithm, compute, mesh=None):
    """Traces a training step with abstract arrays; nothing is compiled."""
    config = ModelConfig(
        vocab_size=20, width=16, layers=1, heads=2, kv_heads=2, head_dim=8, mlp_width=32
    )
    model, optimizer = Transformer(config), optax.sgd(1e-2)
    state = jax.eval_shape(lambda: init_state(model, optimizer, jax.random.key(0)))
    f32 = jax.ShapeDtypeStruct((GROUPS, GROUP_SIZE, LENGTH), np.float32)
    i32, mask = jax.tree.map(lambda dtype: jax.ShapeDtypeStruct(f32.shape, dtype), (np.int32, bool))
    row = jax.ShapeDtypeStruct((GROUPS,), np.int32)
    prompts = Prompts(jax.ShapeDtypeStruct((GROUPS, 8), np.int32), row, row)
    flag = jax.ShapeDtypeStruct(f32.shape[:2], bool)
    rewards = jax.ShapeDtypeStruct(f32.shape[:2], np.float32)
    step = make_train_step(model, optimizer, algorithm, mesh, compute=compute)
    reference = state.params if algorithm.uses_reference else None
    step.trace(state, reference, Rollout(prompts, i32, mask, f32, flag), rewards)


@pytest.fixture
def stacks(monkeypatch):
    """The package's functions from `train_step` to the loss, for each time that Python runs it."""
    recorded = []
    clipped = losses.clipped

    def recording(logprobs, old_logprobs, advantages, *, clip_low, clip_high, dual_clip):
        frames = [f.name for f in traceback.extract_stack() if '/grpo_jax/' in f.filename]
        recorded.append([*frames[frames.index('train_step') :], 'clipped'])
        return clipped(
            logprobs, old_logprobs, advantages, clip_low=clip_low, clip_high=clip_high,
            dual_clip=dual_clip,
        )  # fmt: skip

    jax.clear_caches()  # of earlier traces of the same shapes
    monkeypatch.setitem(losses.LOSSES, 'clipped', recording)
    yield recorded
    jax.clear_caches()


@pytest.mark.parametrize(
    'case', tiny.some_slow(CASES, 'one chunk', 'chunks', 'bundles', 'sequence')
)
def test_at_most_six_frames_from_train_step_to_the_loss(stacks, case):
    options, compute = CASES[case]
    trace(Algorithm(**options), compute)
    assert max(map(len, stacks)) <= 6, stacks
    assert stacks[0] == [
        'train_step', 'trace_loss', 'loss_fn', 'group_loss', 'policy_loss', 'clipped',
    ]  # fmt: skip
    assert len(stacks) <= 5  # once for each of at most four widths, and once for the metrics


def test_at_most_six_frames_on_a_mesh(stacks):
    trace(Algorithm(), Compute(rows=4, widths=2), sharding.make_mesh(fsdp=2, tensor=1))
    assert max(map(len, stacks)) <= 6, stacks
