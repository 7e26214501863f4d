"""Rotary positions and their stretching: by hand, and against transformers' own tables."""

import math

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from grpo_jax.models import ModelConfig, rope

THETA = 100.0
WIDTH = 8  # frequencies 1, 100^-1/4, 100^-1/2, 100^-3/4
PLAIN = THETA ** -np.array([0, 0.25, 0.5, 0.75])


def stretch(kind, **settings):
    return {'rope_type': kind, **settings}


LLAMA3 = stretch(
    'llama3',
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=20,
)
YARN = stretch('yarn', factor=4.0, original_max_position_embeddings=64)
LONGROPE = stretch(
    'longrope',
    factor=4.0,
    original_max_position_embeddings=16,
    short_factor=[1.0, 1.0, 2.0, 4.0],
    long_factor=[2.0, 4.0, 8.0, 16.0],
)
DYNAMIC = stretch('dynamic', factor=3.0, max_position_embeddings=10)
KINDS = [{}, stretch('linear', factor=4.0), DYNAMIC, LLAMA3, YARN, LONGROPE]


def frequencies(scaling, seen=1, width=WIDTH, theta=THETA):
    """Radians per position, and the factor of cosine and sine, from the table of position 1."""
    one = jnp.ones(1, jnp.int32)
    tables = rope.tables(one, seen * one, width=width, theta=theta, scaling=scaling)
    cos, sin = (np.asarray(table, np.float64)[0] for table in tables)
    return np.arctan2(sin, cos), np.hypot(cos, sin)


def check(scaling, expected, seen=1, factor=1.0):
    found, factors = frequencies(scaling, seen)
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    np.testing.assert_allclose(factors, factor, rtol=1e-6)


# By hand


def test_plain():
    check({}, PLAIN)
    at = jnp.array([[0, 5]])
    cos, sin = rope.tables(at, at + 1, width=WIDTH, theta=THETA, scaling={})
    assert cos.shape == sin.shape == (1, 2, 4)
    np.testing.assert_allclose(cos[0, 0], 1)
    np.testing.assert_allclose(sin[0, 1], np.sin(5 * PLAIN), rtol=1e-5)


def test_linear():
    check(stretch('linear', factor=4.0), PLAIN / 4)


@pytest.mark.parametrize('seen', [1, 9, 10])
def test_dynamic_within_the_length(seen):
    check(DYNAMIC, PLAIN, seen)


def test_dynamic_past_the_length():
    """30 tokens where 10 were trained: the base grows (3 * 30 / 10 - 2)^(8 / 6) = 7^(4/3) times."""
    base = THETA * 7 ** (4 / 3)
    check(DYNAMIC, base ** -np.array([0, 0.25, 0.5, 0.75]), seen=30)


def test_llama3():
    """Trained with 20 positions: more than 4 turns stay, fewer than 1 shrink by 8, else mixed.

    The turns are 20 / 2 pi times the frequency: 3.18, 1.007, 0.318, 0.101.
    """
    turns = 20 * PLAIN / (2 * math.pi)
    kept = (turns[:2] - 1) / 3
    mixed = PLAIN[:2] * (kept + (1 - kept) / 8)
    check(LLAMA3, [*mixed, PLAIN[2] / 8, PLAIN[3] / 8])
    check(LLAMA3 | {'original_max_position_embeddings': 100}, turns_kept(100))


def turns_kept(length):
    """With 100 positions the first dimension makes 15.9 turns and stays as it is, the next 5.03."""
    kept = np.clip((length * PLAIN / (2 * math.pi) - 1) / 3, 0, 1)
    assert kept[0] == kept[1] == 1 > kept[2] > kept[3] == 0
    return PLAIN * (kept + (1 - kept) / 8)


def test_yarn():
    """Of 64 positions, 32 turns fall before dimension 0 and 1 turn at 2.02, which is rounded up.

    So the ramp goes from 0 to 3 over the dimensions 0, 1, 2, 3, and scores get the root of
    (0.1 ln 4 + 1)^2 larger.
    """
    last = 8 * math.log(64 / (2 * math.pi)) / (2 * math.log(THETA))
    assert math.ceil(last) == 3
    share = np.array([0, 1, 2, 3]) / 3
    check(YARN, PLAIN * (1 - share) + PLAIN / 4 * share, factor=0.1 * math.log(4) + 1)


def test_yarn_without_rounding():
    first = 8 * math.log(64 / (5 * 2 * math.pi)) / (2 * math.log(THETA))
    last = 8 * math.log(64 / (0.5 * 2 * math.pi)) / (2 * math.log(THETA))
    share = np.clip((np.arange(4) - first) / (last - first), 0, 1)
    assert 0 == share[0] < share[1] < share[2] < 1
    check(
        YARN | {'beta_fast': 5.0, 'beta_slow': 0.5, 'truncate': False},
        PLAIN * (1 - share) + PLAIN / 4 * share,
        factor=0.1 * math.log(4) + 1,
    )


@pytest.mark.parametrize(
    ('settings', 'factor'),
    [
        ({'attention_factor': 1.7}, 1.7),
        ({'mscale': 1.0, 'mscale_all_dim': 1.0}, 1.0),
        (
            {'mscale': 2.0, 'mscale_all_dim': 0.5},
            (0.2 * math.log(4) + 1) / (0.05 * math.log(4) + 1),
        ),
        ({'mscale': 2.0}, 0.1 * math.log(4) + 1),
        ({'factor': 0.5}, 1.0),
    ],
)
def test_yarn_temperature(settings, factor):
    np.testing.assert_allclose(frequencies(YARN | settings)[1], factor, rtol=1e-6)


@pytest.mark.parametrize(('seen', 'name'), [(1, 'short'), (16, 'short'), (17, 'long')])
def test_longrope(seen, name):
    """Scores get the root of 1 + ln 4 / ln 16 = 1.5 larger, at any length."""
    divisor = np.array(LONGROPE[f'{name}_factor'])
    check(LONGROPE, PLAIN / divisor, seen, factor=math.sqrt(1.5))
    check(LONGROPE | {'attention_factor': 2.0}, PLAIN / divisor, seen, factor=2.0)
    check(LONGROPE | {'factor': 1.0}, PLAIN / divisor, seen)


def test_each_token_is_stretched_by_the_length_it_was_read_at():
    at, seen = jnp.array([[3, 3, 3]]), jnp.array([[10, 20, 30]])
    cos, _ = rope.tables(at, seen, width=WIDTH, theta=THETA, scaling=DYNAMIC)
    for column, length in enumerate((10, 20, 30)):
        alone = rope.tables(
            at[:, :1], jnp.array([[length]]), width=WIDTH, theta=THETA, scaling=DYNAMIC
        )
        np.testing.assert_allclose(cos[:, column], alone[0][:, 0], rtol=1e-6)
    assert len(np.unique(np.round(np.asarray(cos[0, :, 1]), 4))) == 3


# Properties


def turned(x, position, scaling, seen):
    at = jnp.array([position])
    tables = rope.tables(at, jnp.array([seen]), width=WIDTH, theta=THETA, scaling=scaling)
    return np.asarray(rope.rotate(jnp.asarray(x, jnp.float32)[None, None], *tables), np.float64)[
        0, 0
    ]


@given(
    scaling=st.sampled_from(KINDS),
    seed=st.integers(0, 100),
    first=st.integers(0, 40),
    distance=st.integers(-20, 40),
    shift=st.integers(0, 60),
)
def test_scores_depend_on_the_distance(scaling, seed, first, distance, shift):
    """Whatever the stretching, as long as both were read at the same length."""
    q, k = np.random.default_rng(seed).standard_normal((2, WIDTH))
    second = max(first + distance, 0)

    def score(i, j):
        return turned(q, i, scaling, 90) @ turned(k, j, scaling, 90)

    assert score(first + shift, second + shift) == pytest.approx(score(first, second), abs=1e-4)


@given(scaling=st.sampled_from(KINDS), seed=st.integers(0, 100), position=st.integers(0, 100))
def test_rotation_keeps_lengths_up_to_the_factor(scaling, seed, position):
    x = np.random.default_rng(seed).standard_normal(WIDTH)
    factor = frequencies(scaling, 50)[1][0]
    length = np.linalg.norm(turned(x, position, scaling, 50))
    assert length == pytest.approx(factor * np.linalg.norm(x), rel=1e-5)


def test_components_behind_the_rotated_ones_stay():
    x = jnp.asarray(np.random.default_rng(0).standard_normal((2, 3, 4, WIDTH + 5)), jnp.bfloat16)
    at = jnp.broadcast_to(jnp.arange(3), (2, 3))
    tables = rope.tables(at, at + 1, width=WIDTH, theta=THETA, scaling=YARN)
    y = rope.rotate(x, *tables)
    assert (y.shape, y.dtype) == (x.shape, x.dtype)
    np.testing.assert_array_equal(y[..., WIDTH:], x[..., WIDTH:])
    assert (y[:, 1:, :, :WIDTH] != x[:, 1:, :, :WIDTH]).mean() > 0.9


# transformers


@pytest.mark.parametrize('theta', [THETA, 1e4, 1e6])
@pytest.mark.parametrize('seen', [5, 33, 200])
@pytest.mark.parametrize('scaling', KINDS[1:], ids=lambda s: s['rope_type'])
def test_tables_of_transformers(scaling, seen, theta):
    pytest.importorskip('torch', reason='PyTorch is the reference for positions')
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    parameters = {'rope_theta': theta} | scaling
    longest = parameters.pop('max_position_embeddings', 256)
    config = LlamaConfig(
        hidden_size=2 * WIDTH,
        num_attention_heads=2,
        max_position_embeddings=longest,
        rope_parameters=parameters,
    )
    wanted, factor = ROPE_INIT_FUNCTIONS[scaling['rope_type']](config, 'cpu', seq_len=seen)
    found, factors = frequencies(scaling, seen, theta=theta)
    np.testing.assert_allclose(found, wanted.numpy(), rtol=2e-6)
    np.testing.assert_allclose(factors, factor, rtol=1e-6)


# Settings


@pytest.mark.parametrize(
    ('scaling', 'message'),
    [
        (stretch('ntk', factor=2.0), r"rope_type='ntk' is unknown: use one of linear, dynamic,"),
        ({'factor': 2.0}, r'rope_type=None is unknown'),
        (stretch('linear'), r"rope_scaling of type 'linear' lacks 'factor'"),
        (YARN | {'factor': None}, r"rope_scaling of type 'yarn' lacks 'factor'"),
        (
            stretch('linear', factor=2.0, beta_fast=1),
            r"type 'linear' has no setting 'beta_fast': use some of factor$",
        ),
    ],
)
def test_bad_settings(scaling, message):
    sizes = {'vocab_size': 5, 'width': 8, 'layers': 1, 'heads': 1, 'kv_heads': 1, 'head_dim': 8}
    with pytest.raises(ValueError, match=message):
        ModelConfig(**sizes, mlp_width=8, rope_scaling=scaling)


@pytest.mark.parametrize('scaling', KINDS)
def test_good_settings(scaling):
    sizes = {'vocab_size': 5, 'width': 8, 'layers': 1, 'heads': 1, 'kv_heads': 1, 'head_dim': 8}
    assert ModelConfig(**sizes, mlp_width=8, rope_scaling=scaling).rope_scaling == scaling


def turn(x, position, theta):
    at = jnp.array([position])
    tables = rope.tables(at, at + 1, width=x.shape[-1], theta=theta, scaling={})
    return rope.rotate(x, *tables)


def test_rotation_by_hand():
    """Pair (i, i + h/2) turns by position * theta^(-2i/h): here by 3 and by 3 / 10."""
    x = jnp.array([1.0, 0.0, 0.0, 2.0]).reshape(1, 1, 4)
    turned = turn(x, 3, theta=100.0)[0, 0]
    expected = [np.cos(3), -2 * np.sin(0.3), np.sin(3), 2 * np.cos(0.3)]
    np.testing.assert_allclose(turned, expected, atol=1e-6)


def test_rotation_depends_on_distance_only():
    rng = np.random.default_rng(0)
    q, k = jnp.asarray(rng.standard_normal((2, 1, 1, 8)), jnp.float32)

    def score(i, j):
        return float((turn(q, i, theta=50.0) * turn(k, j, theta=50.0)).sum())

    assert score(7, 3) == pytest.approx(score(104, 100), abs=1e-4)
    assert score(5, 5) == pytest.approx(float((q * k).sum()), abs=1e-5)
    assert score(7, 3) != pytest.approx(score(7, 4), abs=1e-3)
