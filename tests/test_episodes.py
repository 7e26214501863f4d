"""Completions of several turns: forced tokens, what is drawn after them, and in which order."""

import functools

import caches
import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
import tiny
from scripted_replies import ScriptedReplies

from grpo_jax import sharding
from grpo_jax.algorithm.logprobs import completion_logprobs
from grpo_jax.algorithm.sample import last_block, sample_blocks
from grpo_jax.engine.token_sampling import completion_keys, draw
from grpo_jax.models import quantize, transformer
from grpo_jax.models.kernels import decode_token
from grpo_jax.types import Sampling

EOS = np.array([3, 11, 40, 50, 51, 52, 53, 60, 61, 62])
G, T = 4, 40


def episodes(model, params, prompts, exchange, **options):
    settings = {
        'seed': 0, 'step': 0, 'sampling': Sampling(), 'eos_ids': EOS, 'group_size': G,
        'max_tokens': T, 'block': 16, 'exchange': exchange,
    }  # fmt: skip
    return jax.device_get(last_block(sample_blocks(model, params, prompts, **settings | options)))


@pytest.fixture(scope='module')
def prompts(rollout):
    return rollout.prompts


@pytest.fixture(scope='module')
def drawn(model, params, prompts):
    exchange = ScriptedReplies()
    with caches.watched() as moments:
        rollout = episodes(model, params, prompts, exchange)
    assert caches.assert_one_copy(moments) > 4
    return rollout, exchange


def turns_of(rollout, place):
    """The runs of tokens of one completion: (whether the policy wrote them, tokens)."""
    tokens = rollout.tokens[place][rollout.mask[place]]
    trained = rollout.trained[place][rollout.mask[place]]
    edges = np.flatnonzero(np.diff(trained.astype(int))) + 1
    parts = zip(np.split(trained, edges), np.split(tokens, edges), strict=True)
    return [(bool(part[0]), ids) for part, ids in parts]


def test_turns_end_as_completions_do_and_replies_follow_them(drawn):
    rollout, exchange = drawn
    seen = 0
    for place in np.ndindex(rollout.ended.shape):
        runs = turns_of(rollout, place)
        assert runs[0][0]
        assert runs[-1][0]
        for turn, (mine, reply) in enumerate(zip(runs[::2], runs[1::2], strict=False)):
            assert mine[0]
            assert not reply[0]
            assert np.isin(mine[1], EOS).tolist() == [False] * (len(mine[1]) - 1) + [True]
            np.testing.assert_array_equal(reply[1], exchange.replies[(*place, turn)])
            seen += 1
        last = np.isin(runs[-1][1], EOS)
        assert not last[:-1].any()
        assert rollout.ended[place] == last[-1]
        length = rollout.mask[place].sum()
        assert rollout.mask[place][:length].all()
    assert seen == len(exchange.replies) > 20
    assert max(turn for *_, turn in exchange.replies) == 2
    assert (rollout.logprobs[~rollout.trained] == 0).all()
    assert (rollout.tokens[~rollout.mask] == 0).all()
    assert not (rollout.trained & ~rollout.mask).any()


def test_tokens_and_logprobs_are_those_of_a_plain_forward_pass(model, params, drawn):
    """The policy's tokens are drawn by their own keys from logits over the whole text before."""
    rollout, _ = drawn
    logits = oracle.completion_logits(oracle.float64(params), rollout, model.config)
    expected = oracle.logprobs(logits, rollout.tokens)
    trained = rollout.trained
    np.testing.assert_allclose(rollout.logprobs[trained], expected[trained], atol=1e-5)
    keys = completion_keys(0, 0, jnp.asarray(rollout.prompts.index), G)
    fold = jax.vmap(jax.vmap(jax.vmap(jax.random.fold_in, (None, 0)), (0, None)), (0, None))
    keys = fold(keys, np.arange(T)).reshape(-1)
    token, *_ = draw(keys, jnp.float32(logits.reshape(len(keys), -1)), Sampling())
    np.testing.assert_array_equal(
        np.reshape(token, trained.shape)[trained], rollout.tokens[trained]
    )


@pytest.mark.parametrize('delay', [1, 6])
def test_tokens_do_not_depend_on_when_replies_come(model, params, prompts, drawn, delay):
    late = episodes(model, params, prompts, ScriptedReplies(delay=delay))
    np.testing.assert_array_equal(late.tokens, drawn[0].tokens)
    np.testing.assert_array_equal(late.trained, drawn[0].trained)
    np.testing.assert_allclose(late.logprobs, drawn[0].logprobs, atol=1e-5)


def on_mesh(model, params, prompts, shape, **options):
    groups, completions, tensor = shape
    mesh = sharding.make_mesh(fsdp=groups * completions, completions=completions, tensor=tensor)
    placed = jax.device_put(params, sharding.shardings(params, mesh))
    return episodes(
        model, placed, sharding.put_groups(prompts, mesh), ScriptedReplies(delay=2), mesh=mesh,
        **options,
    )  # fmt: skip


MESHES = [(2, 2, 2), (2, 1, 1), (8, 1, 1), (1, 4, 2), (4, 2, 1)]


@pytest.mark.parametrize('shape', tiny.some_slow(MESHES, *MESHES[1:]), ids=str)
def test_the_mesh_changes_no_token(model, params, prompts, drawn, shape):
    groups = 8 if shape[0] == 8 else len(prompts.index)
    repeated = jax.tree.map(lambda x: np.resize(x, (groups, *x.shape[1:])), prompts)
    if groups == 8:
        repeated = repeated._replace(index=np.arange(10, 18, dtype=np.int32))
    expected = drawn[0]
    if groups == 8:
        expected = episodes(model, params, repeated, ScriptedReplies())
    ours = on_mesh(model, params, repeated, shape)
    for name in ('tokens', 'mask', 'trained', 'ended'):
        np.testing.assert_array_equal(getattr(ours, name), getattr(expected, name), name)
    np.testing.assert_allclose(ours.logprobs, expected.logprobs, atol=1e-5)


OPTIONS = {
    'separate layers': {'unroll': True},
    'quantized': {'weights': 'int8'},
    'filters and their support': {
        'sampling': Sampling(0.9, top_k=20, top_p=0.9), 'record': ('support',),
    },
}  # fmt: skip


@pytest.mark.parametrize('name', tiny.some_slow(OPTIONS, *OPTIONS))
def test_options_of_the_sampler(model, params, prompts, name):
    """Blocks and the times of replies change no token; sampler and scorer agree."""
    options = OPTIONS[name]
    first = episodes(model, params, prompts, ScriptedReplies(), **options)
    block = 16 if 'record' in options else 7  # other widths, and so other programs
    late = episodes(model, params, prompts, ScriptedReplies(delay=5), block=block, **options)
    for field in ('tokens', 'mask', 'trained', 'ended', 'support'):
        np.testing.assert_array_equal(getattr(first, field), getattr(late, field), field)
    sampling = options.get('sampling', Sampling())
    if 'weights' in options:
        params = quantize(params)
    logprobs, _ = tiny.jit(functools.partial(completion_logprobs, model))(params, first, sampling)
    np.testing.assert_allclose(logprobs[first.trained], first.logprobs[first.trained], atol=1e-5)
    assert np.isfinite(logprobs).all()


@pytest.mark.slow
def test_experts_are_recorded_for_replies_too():
    model = tiny.make_model(experts=4, experts_per_token=2, mlp_width=8)
    params = tiny.make_params(model)
    prompts = tiny.make_rollout().prompts
    rollout = episodes(model, params, prompts, ScriptedReplies(), record=('routing',))
    own = rollout._replace(routing=None, prompts=rollout.prompts._replace(routing=None))
    score = tiny.jit(functools.partial(completion_logprobs, model))
    for scored in (rollout, own):
        logprobs, _ = score(params, scored, Sampling())
        trained = rollout.trained
        np.testing.assert_allclose(logprobs[trained], rollout.logprobs[trained], atol=1e-5)


def test_an_environment_that_never_replies_changes_no_token(model, params, prompts):
    """Nor the number of blocks: it is asked when completions end, and then they are over."""
    silent = ScriptedReplies(turns=1)
    ours = episodes(model, params, prompts, silent)
    alone = episodes(model, params, prompts, None)
    assert alone.trained is None
    for field in ('tokens', 'mask', 'ended'):
        np.testing.assert_array_equal(getattr(ours, field), getattr(alone, field), field)
    np.testing.assert_array_equal(ours.trained, ours.mask)
    np.testing.assert_allclose(ours.logprobs, alone.logprobs, atol=1e-5)


def test_a_reply_without_room_after_it_is_an_error(model, params, prompts):
    long = ScriptedReplies(longest=T, max_tokens=10**6)
    with pytest.raises(ValueError, match=r'a reply makes completion \(\d+, \d+\) \d+ tokens long'):
        episodes(model, params, prompts, long)


@pytest.mark.slow
@pytest.mark.parametrize('shape', [None, (2, 1, 2)], ids=str)
def test_decoding_by_the_kernel_for_gpus(monkeypatch, prompts, shape):
    """Interpreted: it reads as many columns of each row as the row has."""
    model = tiny.make_model(head_dim=16)
    params = tiny.make_params(model)
    expected = episodes(model, params, prompts, ScriptedReplies())
    kernel = functools.partial(decode_token.attend_token, interpret=True)
    monkeypatch.setattr(decode_token, 'attend_token', kernel)
    monkeypatch.setattr(transformer, 'caches_in_place', lambda config: True)
    jax.clear_caches()
    if shape is None:
        ours = episodes(model, params, prompts, ScriptedReplies(), unroll=False)
    else:
        ours = on_mesh(model, params, prompts, shape, unroll=False)
    np.testing.assert_array_equal(ours.tokens, expected.tokens)
    np.testing.assert_allclose(ours.logprobs, expected.logprobs, atol=1e-5)
