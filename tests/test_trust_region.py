"""The trust region step against explicit Fisher matrices and solves in float64.

Most tests use `tiny.Bigram`, a softmax table of two factors whose Jacobian is written out below.
"""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
import tiny
from hypothesis import given, settings
from hypothesis import strategies as st

from grpo_jax import sharding
from grpo_jax.algorithm.logprobs import completion_logprobs
from grpo_jax.algorithm.trpo import completion_kl
from grpo_jax.engine.trust_region import conjugate_gradient, fisher_vector_product, natural_step
from grpo_jax.types import Sampling

VOCAB, WIDTH = 8, 3
BIGRAM = tiny.Bigram()
PARAMS = jax.tree.map(jnp.asarray, BIGRAM.make_params(0, VOCAB, WIDTH))
ROLLOUT = tiny.make_rollout(vocab=VOCAB)
WEIGHTS = np.float32(ROLLOUT.mask / ROLLOUT.mask.sum())
ADVANTAGES = np.random.default_rng(3).standard_normal(ROLLOUT.mask.shape).astype(np.float32)
PLAIN = Sampling(temperature=0.8)
SAMPLINGS = {'plain': PLAIN, 'top-k': PLAIN._replace(top_k=3), 'top-p': PLAIN._replace(top_p=0.6)}
DAMPING = 0.01


# The functions of a step, and the same functions in NumPy


def mean_kl(old, params, sampling=PLAIN, *, model=BIGRAM, rollout=ROLLOUT, weights=WEIGHTS):
    kl = completion_kl(model, old, params, rollout, sampling, chunk=2)
    return (weights * jnp.where(rollout.mask, kl, 0.0)).sum()


def surrogate(old, params, advantages, *, rollout=ROLLOUT, weights=WEIGHTS):
    new, was = (
        completion_logprobs(BIGRAM, p, rollout, PLAIN, chunk=2)[0]
        for p in (params, jax.lax.stop_gradient(old))
    )
    return -(weights * advantages * jnp.where(rollout.mask, jnp.exp(new - was), 0.0)).sum()


@functools.cache
def stepper(cg_steps=48, backtracks=10):
    """`natural_step` on the bigram policy; its gradient is an argument."""

    def step(params, gradient, advantages, max_kl):
        def kl_of(p):
            return mean_kl(params, p)

        return natural_step(
            params,
            gradient,
            surrogate_of=lambda p: surrogate(params, p, advantages),
            kl_of=kl_of,
            fisher=lambda v: fisher_vector_product(kl_of, params, v, DAMPING),
            max_kl=max_kl,
            cg_steps=cg_steps,
            backtracks=backtracks,
        )

    return jax.jit(step)


surrogate_gradient = jax.jit(jax.grad(lambda p, advantages: surrogate(PARAMS, p, advantages)))


def flat(tree):
    return np.concatenate([np.asarray(x, np.float64).ravel() for x in jax.tree.leaves(tree)])


def unflat(vector, like=PARAMS):
    leaves, structure = jax.tree.flatten(like)
    ends = np.cumsum([x.size for x in leaves])[:-1]
    parts = np.split(np.asarray(vector), ends)
    return jax.tree.unflatten(
        structure, [p.reshape(x.shape).astype(x.dtype) for p, x in zip(parts, leaves, strict=True)]
    )


def table(params, sampling=PLAIN):
    """Token before each completion token, and the probabilities [B, G, T, V] that follow."""
    rows, places = oracle.sequences(ROLLOUT)
    seen = np.take_along_axis(rows, places, 1).reshape(ROLLOUT.tokens.shape)
    logits = oracle.bigram_logits(oracle.float64(params), ROLLOUT)
    return seen, np.array(
        [
            oracle.distribution(logits[i], *sampling, keep=ROLLOUT.tokens[i])
            for i in np.ndindex(seen.shape)
        ]
    ).reshape(logits.shape)


def fisher_matrix(sampling=PLAIN):
    """Sum of weight * J^T (diag p - p p^T) J, with J = d logits / d (embedding, head)."""
    embedding, head = (oracle.float64(PARAMS)[name] for name in ('embedding', 'head'))
    seen, probability = table(PARAMS, sampling)
    fisher = np.zeros((flat(PARAMS).size,) * 2)
    for i in map(tuple, np.argwhere(ROLLOUT.mask)):
        by_embedding = np.zeros((VOCAB, *embedding.shape))
        by_embedding[:, seen[i]] = head.T
        by_head = np.zeros((VOCAB, *head.shape))
        for v in range(VOCAB):
            by_head[v, :, v] = embedding[seen[i]]
        jacobian = np.concatenate([x.reshape(VOCAB, -1) for x in (by_embedding, by_head)], 1)
        jacobian /= sampling.temperature
        p = probability[i]
        fisher += WEIGHTS[i] * jacobian.T @ (np.diag(p) - np.outer(p, p)) @ jacobian
    return fisher


def expected_kl(params):
    old, new = (table(p)[1] for p in (PARAMS, params))
    with np.errstate(divide='ignore', invalid='ignore'):  # inf far away, where no step may end
        return (WEIGHTS * (old * np.log(old / new)).sum(-1)).sum()


def expected_surrogate(params, advantages):
    old, new = (
        np.take_along_axis(table(p)[1], ROLLOUT.tokens[..., None], -1)[..., 0]
        for p in (PARAMS, params)
    )
    return -(WEIGHTS * advantages * new / old).sum()


# Fisher-vector products


@pytest.mark.parametrize('name', SAMPLINGS)
def test_fisher_vector_product_is_the_matrix_times_the_vector(name):
    sampling = SAMPLINGS[name]
    product = tiny.jit(
        lambda v: fisher_vector_product(lambda p: mean_kl(PARAMS, p, sampling), PARAMS, v, DAMPING)
    )
    matrix = fisher_matrix(sampling) + DAMPING * np.eye(flat(PARAMS).size)
    for vector in np.random.default_rng(0).standard_normal((3, len(matrix))).astype(np.float32):
        expected = matrix @ vector
        worst = np.abs(flat(product(unflat(vector))) - expected).max() / np.abs(expected).max()
        print(f'{name}: {worst:.1e}')
        assert worst <= 1e-5


def test_the_fisher_is_the_second_order_of_the_kl_of_a_transformer(model, params, rollout):
    """0.5 v^T F v and the mean KL at params + v, which is 1e-3 nats or so, to 3 %."""
    rng = np.random.default_rng(0)
    weights = np.float32(rollout.mask / rollout.mask.sum())
    vector = jax.tree.map(
        lambda x: jnp.asarray(3e-3 * rng.standard_normal(x.shape), x.dtype), params
    )

    def kl_of(p):
        return mean_kl(params, p, model=model, rollout=rollout, weights=weights)

    def both(vector):
        product = fisher_vector_product(kl_of, params, vector)
        return product, kl_of(jax.tree.map(jnp.add, params, vector))

    product, kl = tiny.jit(both)(vector)
    quadratic = 0.5 * flat(vector) @ flat(product)
    print(f'KL {kl:.3e}, quadratic {quadratic:.3e}')
    assert 3e-4 < kl < 3e-3
    assert quadratic == pytest.approx(float(kl), rel=0.03)


def test_no_product_holds_all_logits():
    """Neither [B, G, T, V] nor one microbatch's [G, T, V] in the program of a product."""
    vocab, length, size = 512, 64, 4
    params = jax.tree.map(jnp.asarray, BIGRAM.make_params(0, vocab, 4))
    rollout = tiny.make_rollout(vocab=vocab, groups=size, max_tokens=length)

    def largest(chunk):
        def kl_of(p):
            @jax.checkpoint
            def add(total, group):
                group = jax.tree.map(lambda x: x[None], group)
                return total + completion_kl(BIGRAM, params, p, group, PLAIN, chunk=chunk).sum(), 0

            return jax.lax.scan(add, 0.0, rollout)[0]

        product = jax.jit(lambda v: fisher_vector_product(kl_of, params, v, DAMPING))
        shapes = re.findall(r'\bf32\[([\d,]+)\]', product.lower(params).compile().as_text())
        return max(np.prod([int(n) for n in dims.split(',')]) for dims in shapes)

    one_group = 3 * length * vocab
    assert largest(4) <= one_group / 8
    assert one_group <= largest(length) < size * one_group


# Conjugate gradient


def spd(size=12, seed=0):
    """A matrix with eigenvalues from 1 to about 40, and a right-hand side."""
    rng = np.random.default_rng(seed)
    root = rng.standard_normal((size, size))
    return root @ root.T + np.eye(size), rng.standard_normal(size)


def solve(matrix, b, steps, dtype=np.float64):
    """`conjugate_gradient` on a tree of two leaves: x and residual as vectors."""
    with jax.enable_x64(dtype == np.float64):
        like = {'a': np.zeros((2, 3), dtype), 'b': np.zeros(len(b) - 6, dtype)}
        matrix = jnp.asarray(matrix, dtype)

        def matvec(tree):
            vector = jnp.concatenate([x.ravel() for x in jax.tree.leaves(tree)])
            product = matrix @ vector
            return {'a': product[:6].reshape(2, 3), 'b': product[6:]}

        b = jax.tree.map(jnp.asarray, unflat(b, like))
        return tuple(map(flat, conjugate_gradient(matvec, b, steps)))


def test_conjugate_gradient_solves():
    matrix, b = spd()
    x, residual = solve(matrix, b, 12)
    np.testing.assert_allclose(x, np.linalg.solve(matrix, b), atol=1e-8)
    assert np.abs(residual).max() < 1e-8


@pytest.mark.parametrize('steps', [1, 2, 5])
def test_few_steps_are_the_best_of_their_krylov_space(steps):
    """The minimizer of (x - A^-1 b)^T A (x - A^-1 b) in that space, found by a solve too."""
    matrix, b = spd()
    space = np.stack([np.linalg.matrix_power(matrix, k) @ b for k in range(steps)], 1)
    space, _ = np.linalg.qr(space)
    best = space @ np.linalg.solve(space.T @ matrix @ space, space.T @ b)
    x, residual = solve(matrix, b, steps)
    np.testing.assert_allclose(x, best, atol=1e-8)
    np.testing.assert_allclose(residual, b - matrix @ x, atol=1e-8)


def test_steps_after_the_solution_change_nothing():
    """Residual exactly zero after one step, and at the level of rounding after twelve."""
    _, b = spd()
    x, residual = solve(2 * np.eye(12), np.float32(b), 40, np.float32)
    assert (x == np.float32(b) / 2).all()
    assert (residual == 0).all()
    matrix, b = spd()
    x, _ = solve(matrix, b, 300, np.float32)
    np.testing.assert_allclose(x, np.linalg.solve(matrix, b), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize('value', [0.0, np.nan, np.inf, 1e30])
def test_conjugate_gradient_of_nothing_usable_is_zero(value):
    """1e30 has a square that is not finite in float32."""
    matrix, b = spd()
    b = np.where(np.arange(12) == 3, value, 0 * b)
    x, _ = solve(matrix, b, 5, np.float32)
    assert (x == 0).all()


@pytest.mark.parametrize('matrix', [np.zeros((12, 12)), np.full((12, 12), np.nan), -np.eye(12)])
def test_without_positive_curvature_x_stays_where_it_is(matrix):
    _, b = spd()
    x, residual = solve(matrix, b, 5)
    assert (x == 0).all()
    np.testing.assert_array_equal(residual, b)


# The step


def by_hand(kl_scale=1.0, gradient=2.0, sign=1.0, max_kl=0.5, backtracks=10, dtype=jnp.float32):
    """One parameter at 1 with F = 4, where F^-1 g = 0.5 and x^T F x = 1: the full step is -0.5.

    Returns the new parameter, the terms, and how often the surrogate and the KL were computed.
    """
    calls = {'surrogate': 0, 'kl': 0}

    def count(name):
        jax.debug.callback(lambda: calls.update({name: calls[name] + 1}))

    def surrogate_of(p):
        count('surrogate')
        return sign * gradient * p['w'].astype(jnp.float32)[0]

    def kl_of(p):
        count('kl')
        return kl_scale * 2 * jnp.square(p['w'].astype(jnp.float32)[0] - 1)

    def fisher(v):
        assert v['w'].dtype == jnp.float32
        return {'w': 4 * v['w']}

    params, terms = natural_step(
        {'w': jnp.ones(1, dtype)},
        {'w': jnp.full(1, gradient, dtype)},
        surrogate_of=surrogate_of,
        kl_of=kl_of,
        fisher=fisher,
        max_kl=max_kl,
        cg_steps=3,
        backtracks=backtracks,
    )
    jax.effects_barrier()
    return params['w'], {name: float(x) for name, x in terms.items()}, calls


def test_full_step_by_hand():
    w, terms, calls = by_hand(kl_scale=0.999)
    assert w == pytest.approx([0.5])
    assert terms == pytest.approx(
        {'kl_step': 0.4995, 'backtracks': 0, 'accepted': 1, 'fisher_residual': 0}
    )
    assert calls == {'surrogate': 2, 'kl': 1}


def test_backtracking_by_hand():
    """The KL is 10 times its model: 0.25^j * 10 <= 1 from j = 2, so a quarter of -0.5."""
    w, terms, calls = by_hand(kl_scale=10.0)
    assert w == pytest.approx([0.875])
    assert terms == pytest.approx(
        {'kl_step': 10 * 0.5 / 16, 'backtracks': 2, 'accepted': 1, 'fisher_residual': 0}
    )
    assert calls == {'surrogate': 2, 'kl': 3}


@pytest.mark.parametrize(
    'options',
    [
        {'kl_scale': 10.0, 'backtracks': 2},
        {'sign': -1.0, 'backtracks': 2},
        {'sign': 0.0, 'backtracks': 2},  # as good is not better
        {'sign': np.nan, 'backtracks': 2},
        {'kl_scale': np.nan, 'backtracks': 2},
    ],
)
def test_no_step_where_none_is_allowed(options):
    w, terms, calls = by_hand(**options)
    assert w == 1
    assert terms == {'kl_step': 0, 'backtracks': 2, 'accepted': 0, 'fisher_residual': 0}
    assert calls['kl'] == 2


@pytest.mark.parametrize('gradient', [0.0, np.nan, np.inf, -np.inf, 1e30])
def test_no_search_without_a_usable_gradient(gradient):
    w, terms, calls = by_hand(gradient=gradient)
    assert w == 1
    assert terms == {'kl_step': 0, 'backtracks': 0, 'accepted': 0, 'fisher_residual': 0}
    assert calls['kl'] == 0


def test_parameters_keep_their_dtype_and_the_solve_its_precision():
    """Products are requested and returned in float32, although the derivative is in bfloat16."""
    w, _, _ = by_hand(kl_scale=0.9, dtype=jnp.bfloat16)
    assert w.dtype == jnp.bfloat16
    assert w == pytest.approx([0.5])
    params = {'w': jnp.ones(1, jnp.bfloat16)}
    product = fisher_vector_product(
        lambda p: 2.0 * jnp.square(p['w'].astype(jnp.float32) - 1).sum(),
        params,
        {'w': jnp.ones(1, jnp.float32)},
        1e-3,
    )
    assert product['w'].dtype == jnp.float32
    assert product['w'] == pytest.approx([4.001], abs=1e-6)


@pytest.mark.parametrize(('max_kl', 'halvings'), [(1e-3, 0), (4.0, 1), (16.0, 2)])
def test_step_equals_numpy(max_kl, halvings):
    """A dense solve, the formula for the full step, and a search in float64."""
    gradient = surrogate_gradient(PARAMS, ADVANTAGES)
    params, terms = stepper()(PARAMS, gradient, ADVANTAGES, max_kl)
    matrix = fisher_matrix() + DAMPING * np.eye(flat(PARAMS).size)
    x = np.linalg.solve(matrix, flat(gradient))
    full = np.sqrt(2 * max_kl / (x @ matrix @ x)) * x
    before = expected_surrogate(PARAMS, ADVANTAGES)
    for j in range(10):
        expected = unflat(flat(PARAMS) - 0.5**j * full)
        kl = expected_kl(expected)
        if kl <= max_kl and expected_surrogate(expected, ADVANTAGES) < before:
            break
    print(f'j = {j}, KL {kl:.4g}, gap {tiny.gap(params, expected):.1e}')
    assert j == halvings == terms['backtracks']
    assert terms['accepted'] == 1
    assert terms['kl_step'] == pytest.approx(kl, rel=1e-3)
    assert terms['fisher_residual'] < 1e-4
    np.testing.assert_allclose(flat(params), flat(expected), atol=1e-4 * np.abs(full).max())


def test_the_reported_residual_of_few_products():
    gradient = surrogate_gradient(PARAMS, ADVANTAGES)
    params, terms = stepper(cg_steps=2)(PARAMS, gradient, ADVANTAGES, 1e-3)
    step = flat(PARAMS) - flat(params)  # x up to its scale, which x^T F x = x^T g determines
    matrix, g = fisher_matrix() + DAMPING * np.eye(flat(PARAMS).size), flat(gradient)
    x = step * (step @ g) / (step @ matrix @ step)
    expected = np.linalg.norm(matrix @ x - g) / np.linalg.norm(g)
    assert expected > 0.05
    assert terms['fisher_residual'] == pytest.approx(expected, rel=1e-2)
    assert terms['accepted'] == 1


@given(
    seed=st.integers(0, 2**16),
    magnitude=st.sampled_from([0.0, 1e-6, 1.0, 1e6]),
    own=st.booleans(),
    max_kl=st.sampled_from([1e-3, 0.05, 1.0]),
)
@settings(max_examples=40)
def test_the_constraint_holds_and_the_surrogate_falls(seed, magnitude, own, max_kl):
    """For the surrogate's own gradient, which always finds a step, and for any other direction."""
    rng = np.random.default_rng(seed)
    advantages = np.float32(magnitude * rng.standard_normal(ROLLOUT.mask.shape))
    if own:
        gradient = surrogate_gradient(PARAMS, advantages)
    else:
        gradient = unflat(rng.standard_normal(flat(PARAMS).size))
    params, terms = stepper()(PARAMS, gradient, advantages, max_kl)
    assert np.isfinite(flat(params)).all()
    assert expected_kl(params) <= max_kl * (1 + 1e-3) + 1e-6
    assert expected_kl(params) == pytest.approx(float(terms['kl_step']), rel=1e-3, abs=1e-6)
    before, after = (expected_surrogate(p, advantages) for p in (PARAMS, params))
    assert after <= before + 1e-6 * magnitude
    assert bool(terms['accepted']) != tiny.same(params, PARAMS)
    if own and magnitude >= 1:
        assert terms['accepted'] == 1
        assert after < before


def test_microbatches_on_a_mesh_change_nothing():
    """Closures that scan over groups, on 2 x 2 devices, against the whole batch on one."""
    mesh = sharding.make_mesh(fsdp=2, tensor=2)
    gradient = surrogate_gradient(PARAMS, ADVANTAGES)

    def cut(x):
        return x.reshape(2, 2, *x.shape[1:]).swapaxes(0, 1)

    def over_microbatches(function):
        @jax.checkpoint
        def add(total, microbatch):
            return total + function(*microbatch), None

        data = jax.tree.map(cut, (ROLLOUT, WEIGHTS, ADVANTAGES))
        return jax.lax.scan(add, 0.0, data)[0]

    def step(params, gradient):
        def kl_of(p):
            return over_microbatches(
                lambda part, weights, _: mean_kl(params, p, rollout=part, weights=weights)
            )

        def surrogate_of(p):
            return over_microbatches(
                lambda part, weights, advantages: surrogate(
                    params, p, advantages, rollout=part, weights=weights
                )
            )

        return natural_step(
            params,
            gradient,
            surrogate_of=surrogate_of,
            kl_of=kl_of,
            fisher=lambda v: fisher_vector_product(kl_of, params, v, DAMPING),
            max_kl=0.3,
            cg_steps=10,
            backtracks=10,
        )

    layout = sharding.shardings(PARAMS, mesh)
    args = jax.device_put((PARAMS, gradient), (layout, layout))
    with sharding.use(mesh):
        ours, terms = jax.jit(step, out_shardings=(layout, sharding.replicated(mesh)))(*args)
    expected, expected_terms = stepper(cg_steps=10)(PARAMS, gradient, ADVANTAGES, 0.3)
    assert not ours['head'].sharding.is_fully_replicated
    assert tiny.gap(ours, expected) < 1e-4 * tiny.gap(PARAMS, expected)
    for name, value in expected_terms.items():
        assert terms[name] == pytest.approx(float(value), rel=1e-3), name
