"""How an update is computed: what is chosen, and the plans that need less memory."""

import dataclasses

import jax
import optax
import pytest
import tiny

from grpo_jax import sharding
from grpo_jax.algorithm.config import Algorithm
from grpo_jax.algorithm.program import init_state, make_train_step
from grpo_jax.engine import compute
from grpo_jax.engine.bundles import check_rows
from grpo_jax.engine.compute import Compute, alternatives, choose
from grpo_jax.models import ModelConfig

CONFIG = ModelConfig(
    vocab_size=2**15, width=64, layers=8, heads=4, kv_heads=4, head_dim=16, mlp_width=128
)
SHAPE = (32, 8, 100, 300)  # B, G, P, T
# 8 layers of 5 * 64 + 2 * 192 + 2 * 128 = 960 floats for each of 2,500 tokens of a group, or with
# recomputation only their 8 inputs and one layer.
STORED, RECOMPUTED = 4 * 8 * 960 * 2500, 4 * (8 * 64 + 960) * 2500


def options(plans):
    return [(p.remat, p.logprob_chunk, p.microbatch, p.rows) for p in plans]


def test_activations_of_a_group_by_hand():
    for remat, expected in ((False, STORED), (True, RECOMPUTED)):
        assert compute._activation_bytes(CONFIG, SHAPE, None, remat=remat) == expected


def test_one_option_after_the_other_needs_less():
    """512 MiB hold 36 groups that are recomputed, and six that are stored, of which four divide.

    64 MiB of logits are four positions of 256 completions, but chunks have at least 16.
    """
    assert 4 * STORED < 2**29 < 8 * STORED
    assert 32 * RECOMPUTED < 2**29
    assert options(alternatives(Compute(), CONFIG, SHAPE)) == [
        (False, 16, 4, 0),
        (True, 16, 32, 0),
        (True, 16, 8, 0), (True, 16, 1, 0),
        (True, 16, 1, 2), (True, 16, 1, 1),
    ]  # fmt: skip
    small = dataclasses.replace(CONFIG, vocab_size=128)
    chunks = [plan.logprob_chunk for plan in alternatives(Compute(), small, SHAPE)]
    assert chunks == [128, 128, 32, 32, 32, 32, 32]


def test_the_formula_alone_recomputes_as_the_decoder_says():
    """Nothing is chosen by memory where devices do not report it."""
    for remat in (True, False):
        config = dataclasses.replace(CONFIG, remat=remat)
        assert choose(Compute(), config, SHAPE).remat is remat
        assert choose(Compute(remat=not remat), config, SHAPE).remat is not remat
    assert choose(Compute(), CONFIG, SHAPE).microbatch == 32
    assert choose(Compute(remat=False), CONFIG, SHAPE).microbatch == 4


def test_explicit_options_stay():
    explicit = Compute(microbatch=16, rows=64, logprob_chunk=48, remat=True)
    (plan,) = alternatives(explicit, CONFIG, SHAPE)
    assert options([plan]) == [(True, 48, 16, 64)]
    assert all(not p.remat for p in alternatives(Compute(remat=False), CONFIG, SHAPE))
    assert {p.rows for p in alternatives(Compute(packed=True, rows=4), CONFIG, SHAPE)} == {4}


def test_layers_that_do_not_fit_one_group_are_not_stored():
    long = (32, 8, 100, 6000)
    assert compute._activation_bytes(CONFIG, long, None, remat=False) > 2**29
    assert all(plan.remat for plan in alternatives(Compute(), CONFIG, long))


@pytest.mark.parametrize(('fsdp', 'completions'), [(4, 1), (8, 1), (8, 2)])
def test_every_alternative_can_be_cut_over_a_mesh(fsdp, completions):
    mesh = sharding.make_mesh(fsdp=fsdp, completions=completions)
    plans = alternatives(Compute(), CONFIG, (16, 4, 100, 300), mesh)
    assert len(plans) > 2
    for plan in plans:
        sharding.check_batch(16, plan.microbatch, mesh, group_size=4)
        check_rows(plan.rows, plan.microbatch * 4, mesh)


def test_a_plan_configures_the_decoder():
    model = tiny.make_model(remat=False)
    plan = choose(Compute(), model.config, (4, 4, 4, 4))
    assert plan.configure(model) is model
    changed = plan._replace(remat=True).configure(model)
    assert changed.config == dataclasses.replace(model.config, remat=True)


def test_the_update_recomputes_layers_as_the_plan_says(rollout, rewards):
    """Whatever the decoder's own config says."""

    def products(own, remat):
        model = tiny.make_model(layers=1, remat=own)
        step = make_train_step(
            model, optax.identity(), Algorithm(), compute=Compute(widths=1, remat=remat)
        )
        params = tiny.shapes(model)
        state = jax.eval_shape(lambda p: init_state(model, optax.identity(), p), params)
        return str(step.trace(state, None, rollout, rewards).jaxpr).count('dot_general')

    stored = products(False, None)
    assert products(False, True) == products(True, None) > stored
