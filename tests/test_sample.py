"""Sampling: how completions end, when the batch is compacted, what random numbers depend on."""

import functools
import itertools
import random

import caches
import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
import tiny
import tokenizers
from jax.extend.core import jaxprs_in_params
from transformers import PreTrainedTokenizerFast

from grpo_jax import sharding
from grpo_jax.algorithm import sample as sample_module
from grpo_jax.algorithm.sample import sample
from grpo_jax.data import completion_texts, stop_table
from grpo_jax.engine import compaction, decode, sampler_calls
from grpo_jax.engine.decode import block_size
from grpo_jax.engine.token_sampling import completion_keys
from grpo_jax.models import Transformer
from grpo_jax.types import Prompts, Sampling

# Completions

EOS = np.array([3, 11, 40, 50, 51, 52, 53])


def completions(model, params, prompts, **options):
    settings = {
        'seed': 0,
        'step': 0,
        'sampling': Sampling(),
        'eos_ids': EOS,
        'group_size': 4,
        'max_tokens': 7,
    }
    return jax.device_get(sample(model, params, prompts, **(settings | options)))


@pytest.fixture(scope='module')
def prompts(rollout):
    return rollout.prompts


@pytest.fixture(scope='module')
def drawn(model, params, prompts):
    return completions(model, params, prompts)


def test_mask_holds_the_end_token_and_nothing_after(drawn, prompts):
    ends = np.isin(drawn.tokens, EOS)
    for b, g in np.ndindex(drawn.ended.shape):
        where = np.flatnonzero(ends[b, g] & drawn.mask[b, g])
        length = drawn.mask[b, g].sum()
        assert drawn.mask[b, g, :length].all()
        assert drawn.ended[b, g] == (len(where) > 0)
        assert where.tolist() == ([length - 1] if drawn.ended[b, g] else [])
        assert drawn.ended[b, g] or length == drawn.mask.shape[-1]
    assert (drawn.tokens[~drawn.mask] == 0).all()
    assert (drawn.logprobs[~drawn.mask] == 0).all()
    assert (drawn.logprobs[drawn.mask] < 0).all()
    assert drawn.ended.any()
    assert not drawn.ended.all()
    assert tiny.same(drawn.prompts, prompts)


def test_an_end_in_the_last_column_counts_as_ended(model, params, prompts):
    everything = np.arange(tiny.VOCAB)
    one = completions(model, params, prompts, eos_ids=everything, max_tokens=1)
    assert one.mask.all()
    assert one.ended.all()


def test_without_end_tokens_every_row_is_full(model, params, prompts):
    full = completions(model, params, prompts, eos_ids=np.zeros(0, np.int32))
    assert full.mask.all()
    assert not full.ended.any()


def test_greedy_equals_naive(model, params, prompts):
    """Every token is the largest logit of a plain forward pass over the tokens before it."""
    greedy = completions(model, params, prompts, sampling=Sampling(temperature=0.0))
    logits = oracle.completion_logits(oracle.float64(params), greedy, model.config)
    np.testing.assert_array_equal(greedy.tokens[greedy.mask], logits.argmax(-1)[greedy.mask])
    assert (greedy.tokens == greedy.tokens[:, :1]).all()  # equal in all completions of a group


def test_sampled_logprobs_equal_naive(model, params, drawn):
    logits = oracle.completion_logits(oracle.float64(params), drawn, model.config)
    expected = oracle.logprobs(logits, drawn.tokens)
    np.testing.assert_allclose(drawn.logprobs[drawn.mask], expected[drawn.mask], atol=1e-5)


STEPS: list[int] = []


def compiled():
    """How often the program of the first block has been compiled."""
    return decode.first_block._cache_size()


class Counting(Transformer):
    """Records each decode step."""

    def decode(self, token, t, *args):
        jax.debug.callback(lambda t: STEPS.append(int(t)), t)
        return super().decode(token, t, *args)


def test_the_loop_ends_with_the_last_completion(model, params, prompts, drawn):
    """As many decode steps as the longest completion has tokens, less the one from prefill."""
    counting = Counting(model.config)

    def steps(eos_ids, seed):
        STEPS.clear()
        eos_ids = np.resize(eos_ids, 34)  # one shape, one compilation
        out = completions(counting, params, prompts, eos_ids=eos_ids, seed=seed)
        jax.effects_barrier()
        assert sorted(set(STEPS)) == list(range(len(set(STEPS))))
        return len(set(STEPS)), out

    count, out = steps(EOS, seed=0)
    assert count == 6
    assert tiny.same(out, drawn)
    seen = set()
    for seed in range(6):
        count, out = steps(np.arange(0, tiny.VOCAB, 2), seed)  # half of all tokens end a completion
        assert count == out.mask.sum(-1).max() - 1
        assert out.ended.all() or count == 6
        seen.add(count)
    assert min(seen) < 5


# Stop strings

LETTERS = 'abcd\n'
NO_ENDS = np.full(len(EOS), -1)


@functools.cache
def speller():
    """A tokenizer of the model's vocabulary whose tokens have one to three of five letters."""
    words = [''.join(word) for n in (1, 2, 3) for word in itertools.product(LETTERS, repeat=n)]
    words = words[:5] + random.Random(0).sample(words[5:], tiny.VOCAB - 7) + ['<eos>', '<pad>']
    levels = tokenizers.models.WordLevel({word: i for i, word in enumerate(words)}, '<pad>')
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=tokenizers.Tokenizer(levels), eos_token='<eos>', pad_token='<pad>'
    )
    tokenizer.backend_tokenizer.decoder = tokenizers.decoders.Fuse()
    return tokenizer


def stopping(*strings):
    return stop_table(speller(), strings, tiny.VOCAB)


def cut(rollout, strings, eos_ids=EOS):
    """An unstopped rollout, cut where the text of its tokens first contains a stop string."""
    mask = np.zeros_like(rollout.mask)
    ended = np.zeros_like(rollout.ended)
    for place in np.ndindex(ended.shape):
        for t, token in enumerate(rollout.tokens[place]):
            text = speller().decode(rollout.tokens[place][: t + 1], skip_special_tokens=True)
            mask[place][t] = True
            ended[place] = token in eos_ids or any(string in text for string in strings)
            if ended[place]:
                break
    tokens = np.where(mask, rollout.tokens, 0)
    return rollout._replace(
        tokens=tokens, mask=mask, ended=ended, logprobs=np.where(mask, rollout.logprobs, 0)
    )


@hypothesis.settings(max_examples=25)
@hypothesis.given(
    seed=st.integers(0, 2**31 - 1),
    strings=st.sampled_from(list(itertools.product(LETTERS, repeat=2))).map(''.join),
    eos_ids=st.sampled_from([EOS, NO_ENDS]),
)
def test_a_stop_string_ends_a_completion(model, params, prompts, seed, strings, eos_ids):
    """At the token that completes it, whatever else that token holds; the rest is unchanged."""
    free = completions(model, params, prompts, seed=seed, eos_ids=NO_ENDS)
    stopped = completions(
        model, params, prompts, seed=seed, eos_ids=eos_ids, stops=stopping(strings)
    )
    expected = cut(free, [strings], eos_ids)
    for name in ('tokens', 'mask', 'ended'):
        np.testing.assert_array_equal(getattr(stopped, name), getattr(expected, name), name)
    np.testing.assert_allclose(stopped.logprobs, expected.logprobs, atol=1e-6)
    texts = completion_texts(
        speller(), stopped.tokens.reshape(16, -1), stopped.mask.reshape(16, -1), [strings]
    )
    for text, row in zip(texts, free.tokens.reshape(16, -1), strict=True):
        assert strings not in text[:-1]
        assert speller().decode(row, skip_special_tokens=True).startswith(text)


STOPS = ('ab', 'b\nb', 'dd', 'ca')


def test_several_stop_strings(model, params, prompts):
    """They compile once, whatever they are."""
    free = completions(model, params, prompts, eos_ids=NO_ENDS)
    stopped = completions(model, params, prompts, stops=stopping(*STOPS))
    assert tiny.same(stopped._replace(logprobs=0), cut(free, STOPS)._replace(logprobs=0))
    assert 0.5 < stopped.ended.mean() < 1
    before = compiled()
    other = completions(model, params, prompts, seed=1, stops=stopping('ba', 'a\na', 'cc', 'db'))
    assert compiled() == before
    assert tiny.gap(other.tokens, stopped.tokens) > 0
    logits = oracle.completion_logits(oracle.float64(params), stopped, model.config)
    expected = oracle.logprobs(logits, stopped.tokens)
    np.testing.assert_allclose(stopped.logprobs[stopped.mask], expected[stopped.mask], atol=1e-5)


@pytest.mark.slow
def test_stop_strings_on_a_mesh(model, params, prompts):
    mesh = sharding.make_mesh(fsdp=2, tensor=2)
    alone = completions(model, params, prompts, stops=stopping(*STOPS))
    placed = jax.device_put(params, sharding.shardings(params, mesh))
    table = jax.device_put(stopping(*STOPS), sharding.replicated(mesh))
    groups = sharding.put_groups(prompts, mesh)
    meshed = completions(model, placed, groups, stops=table, mesh=mesh)
    for name in ('tokens', 'mask', 'ended'):
        np.testing.assert_array_equal(getattr(meshed, name), getattr(alone, name))


# Blocks


@pytest.mark.parametrize('apart', tiny.some_slow([True, False], False))
def test_blocks_change_no_completion(model, params, prompts, monkeypatch, apart):
    """Ended completions are removed from the batch, live ones are not."""
    sizes = []

    def choosing(choose):
        """Without slots apart from their groups: they always cache more keys."""
        return lambda *args: choose(*args[:-1], args[-1] if apart else -(10**6))

    def choose(prompts, before, shape, mesh):
        sizes.append(shape)
        *_, after = chosen = compaction.choose_slots(prompts, before, shape, mesh)
        places = np.asarray(after.place)
        assert places.shape == (shape.groups, shape.rows)
        assert len(set(places.flat)) == places.size
        assert set(np.asarray(before.place)[~np.asarray(before.done)]) <= set(places.flat)
        return chosen

    for module, name in (
        (sample_module, 'smallest_shape'), (sampler_calls, 'compaction_thresholds'),
    ):  # fmt: skip
        monkeypatch.setattr(module, name, choosing(getattr(compaction, name)))
    monkeypatch.setattr(sampler_calls, 'choose_slots', choose)
    most = np.flatnonzero(np.arange(tiny.VOCAB) % 3)  # two of three tokens end a completion
    for seed in range(3):
        settings = {'seed': seed, 'eos_ids': most, 'group_size': 8, 'max_tokens': 9}
        settings['stops'] = stopping('ab')
        whole = completions(model, params, prompts, **settings)
        for block in (2, 5):
            blocks = completions(model, params, prompts, block=block, **settings)
            for name in ('tokens', 'mask', 'ended'):
                np.testing.assert_array_equal(getattr(blocks, name), getattr(whole, name), name)
            np.testing.assert_allclose(blocks.logprobs, whole.logprobs, atol=1e-5)
    assert {shape.apart for shape in sizes} >= {apart}
    assert len(sizes) > 4


@pytest.mark.parametrize('devices', tiny.some_slow([1, 2], 2))
def test_a_block_ends_when_few_completions_are_live(model, params, prompts, monkeypatch, devices):
    """After the first column at which a threshold is reached, by the drawn tokens."""
    ends = []

    def recording(program, at):
        def run(*args, width, **options):
            *inputs, slots, state = program(*args, width=width, **options)
            ends.append((args[at], width, int(state.t)))
            return (*inputs, slots, state)

        return run

    for name, at in (('first_block', 4), ('next_block', 5)):
        monkeypatch.setattr(decode, name, recording(getattr(decode, name), at))
    mesh = sharding.make_mesh(fsdp=devices, tensor=1)
    params = jax.device_put(params, sharding.shardings(params, mesh))
    fifth = np.flatnonzero(np.arange(tiny.VOCAB) % 5 == 0)
    settings = {'eos_ids': fifth, 'group_size': 8, 'max_tokens': 24, 'block': 8, 'mesh': mesh}
    out = completions(model, params, sharding.put_groups(prompts, mesh), **settings)
    live = (out.mask.sum(-1) - out.ended)[..., None] >= np.arange(1, 25)  # after each column
    in_groups, in_devices = live.sum(1), live.reshape(devices, -1, 24).sum(1)
    t = 1
    for (of_group, of_device), width, end in ends:
        few = (in_groups.max(0) <= of_group) | (in_devices.max(0) <= of_device)
        assert t < end == next((n for n in range(t, width) if few[n - 1]), width)
        t = end
    assert len(ends) > 24 / 8 + 1
    assert sum(end < width for *_, width, end in ends) > 1


def test_compaction_on_a_mesh(model, params, prompts):
    """Each device keeps its own completions."""
    mesh = sharding.make_mesh(fsdp=2, tensor=2)
    most = np.flatnonzero(np.arange(tiny.VOCAB) % 3)
    settings = {'eos_ids': most, 'group_size': 8, 'max_tokens': 9}
    alone = completions(model, params, prompts, **settings)
    placed = jax.device_put(params, sharding.shardings(params, mesh))
    groups = sharding.put_groups(prompts, mesh)
    with caches.watched() as moments:
        meshed = completions(model, placed, groups, block=2, mesh=mesh, **settings)
    for name in ('tokens', 'mask', 'ended'):
        np.testing.assert_array_equal(getattr(meshed, name), getattr(alone, name), name)
    assert caches.assert_one_copy(moments) > 4


def test_no_block_begins_when_all_completions_have_ended(model, params, prompts, monkeypatch):
    monkeypatch.setattr(decode, 'next_block', None)
    every = np.arange(tiny.VOCAB)
    out = completions(model, params, prompts, eos_ids=every, block=2)
    assert out.ended.all()


@pytest.mark.parametrize(('tokens', 'expected'), [(24, 64), (512, 64), (1024, 128), (1030, 129)])
def test_there_are_at_most_eight_blocks(tokens, expected):
    assert block_size(tokens, in_place=False) == expected


def test_there_are_two_blocks_where_attention_ignores_empty_columns():
    assert block_size(1024, in_place=True) == 512


# Randomness


def test_a_rollout_does_not_depend_on_the_batch_layout(model, params, prompts, drawn):
    """A prompt's completions are the same alone and elsewhere in the batch."""
    order = np.array([2, 0, 3, 1])
    shuffled = completions(model, params, jax.tree.map(lambda x: x[order], prompts))
    np.testing.assert_array_equal(shuffled.tokens, drawn.tokens[order])
    alone = completions(model, params, jax.tree.map(lambda x: x[2:3], prompts))
    np.testing.assert_array_equal(alone.tokens[0], drawn.tokens[2])
    np.testing.assert_allclose(alone.logprobs[0], drawn.logprobs[2], atol=1e-5)


def test_a_larger_group_and_a_longer_limit_only_add(model, params, prompts, drawn):
    larger = completions(model, params, prompts, group_size=6, max_tokens=9)
    np.testing.assert_array_equal(larger.tokens[:, :4, :7], drawn.tokens)
    np.testing.assert_array_equal(larger.mask[:, :4, :7], drawn.mask)


def test_what_the_randomness_depends_on(model, params, prompts, drawn):
    again = completions(model, params, prompts)
    assert tiny.same(again, drawn)
    shifted = prompts._replace(index=prompts.index + 1)
    for other in (
        completions(model, params, prompts, step=1),
        completions(model, params, prompts, seed=1),
        completions(model, params, shifted),
    ):
        assert (other.tokens != drawn.tokens).any(axis=(1, 2)).all()


def test_equal_prompts_of_different_rows_differ(model, params, prompts):
    """Also the completions within a group: no two share random numbers."""
    equal = Prompts(
        np.repeat(prompts.tokens[:1], 4, axis=0), np.repeat(prompts.length[:1], 4), prompts.index
    )
    out = completions(model, params, equal, eos_ids=np.zeros(0, np.int32))
    assert len({row.tobytes() for row in out.tokens.reshape(16, -1)}) == 16


def test_completion_keys_are_all_different():
    keys = [
        jax.random.key_data(completion_keys(seed, step, jnp.arange(5), 3)).reshape(-1, 2)
        for seed in range(3)
        for step in range(4)
    ]
    assert len(np.unique(np.concatenate(keys), axis=0)) == 3 * 4 * 5 * 3


def test_sampling_compiles_once_per_shape(model, params, prompts, drawn):
    del drawn  # compiled by now
    before = compiled()
    for i, sampling in enumerate(tiny.FILTERS.values()):
        completions(model, params, prompts, seed=i, step=2 * i, sampling=sampling, eos_ids=EOS + i)
    assert compiled() == before
    completions(model, params, prompts, max_tokens=2)
    assert compiled() == before + 1


@pytest.mark.parametrize('unroll', [False, True])
def test_no_column_casts_a_matrix(unroll, prompts):
    """Matrices are converted before the loop over columns, once for a rollout."""
    model = tiny.make_model(dtype='bfloat16', layers=3)

    def converted(jaxpr, in_loop=False):
        for equation in jaxpr.eqns:
            looped = in_loop or equation.primitive.name == 'while'
            if in_loop and equation.primitive.name == 'convert_element_type':
                yield equation.invars[0].aval.shape, equation.outvars[0].aval
            for inner in jaxprs_in_params(equation.params):
                yield from converted(inner, looped)

    def rollout(params):
        return sample(
            model, params, prompts, seed=0, step=0, sampling=Sampling(), eos_ids=EOS, group_size=4,
            max_tokens=3, unroll=unroll,
        )  # fmt: skip

    params = tiny.make_params(model)
    casts = [shape for shape, to in converted(jax.make_jaxpr(rollout)(params).jaxpr)
             if to.dtype == jnp.bfloat16]  # fmt: skip
    assert casts  # the hidden states
    of_layer = {x.shape[1:] for x in jax.tree.leaves(params['blocks']) if x.ndim > 2}
    whole = {x.shape for x in jax.tree.leaves(params) if x.ndim > 1}
    assert not (of_layer | whole) & set(casts)


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        ({'group_size': 0}, 'group_size=0 is out of range: make it at least 1'),
        ({'max_tokens': 0}, 'max_tokens=0 is out of range: make it at least 1'),
        ({'block': -1}, 'block=-1 is out of range: make it at least 0'),
        ({'weights': 'int4'}, "weights='int4' is unknown: use one of model, int8"),
        ({'record': ('logits',)}, "record names 'logits': use any of support, routing"),
        ({'record': ('support',)}, "record='support' has no effect without a filter: set top_k"),
        ({'record': ('routing',)}, "record='routing' has no effect on a model without experts"),
        ({'sampling': Sampling(top_p=0.0)}, 'sampling top_p=0.0: make it above 0'),
        ({'sampling': Sampling(temperature=-1.0)}, 'temperature=-1.0: make it at least 0'),
    ],
)
def test_bad_arguments(options, message, model, params, rollout):
    settings = {'group_size': 2, 'max_tokens': 2, 'sampling': Sampling()} | options
    with pytest.raises(ValueError, match=message):
        sample(model, params, rollout.prompts, seed=0, step=0, eos_ids=np.array([1]), **settings)
