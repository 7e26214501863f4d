"""Small models and rollouts of NumPy random numbers: making them compiles nothing."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers

from grpo_jax.data import byte_tokenizer
from grpo_jax.models import KeyValues, ModelConfig, Transformer, init_params
from grpo_jax.types import Prompts, Rollout, Sampling

VOCAB = 67  # more than one block of the sampler, and no multiple of it
LENGTHS = (6, 1, 4, 5)  # of the prompts; padded to 6

FILTERS = {
    'plain': Sampling(),
    'temperature': Sampling(temperature=0.6),
    'top-k': Sampling(top_k=3),
    'top-k of more than all': Sampling(top_k=1000),
    'top-p': Sampling(top_p=0.7),
    'tiny top-p': Sampling(top_p=1e-6),
    'min-p': Sampling(min_p=0.2),
    'top-k, top-p': Sampling(top_k=6, top_p=0.6),
    'all': Sampling(temperature=1.5, top_k=40, top_p=0.9, min_p=0.05),
}

# For programs that run once: they compile in half the time and run as slowly as they like.
jit = functools.partial(jax.jit, compiler_options={'xla_backend_optimization_level': 0})


def make_model(**options):
    sizes = {
        'vocab_size': VOCAB,
        'width': 16,
        'layers': 2,
        'heads': 4,
        'kv_heads': 2,
        'head_dim': 6,
        'mlp_width': 24,
    }
    return Transformer(ModelConfig(**(sizes | options)))


@functools.cache
def shapes(model):
    """The model's parameters as ShapeDtypeStructs."""
    return jax.eval_shape(lambda key: init_params(model, key), jax.random.key(0))


def make_params(model, seed=0, spread=1.0):
    """Random parameters with nothing at its neutral value: no bias is 0, no scale is 1."""
    rng = np.random.default_rng(seed)

    def fill(path, leaf):
        name = path[-1].key
        noise = rng.standard_normal(leaf.shape)
        if name == 'scale':
            value = 1 + 0.2 * noise
        elif name in ('embedding', 'head') or name.endswith('bias'):
            value = 0.5 * noise
        else:
            value = spread * noise / np.sqrt(model.config.width)
        return jnp.asarray(value, jnp.float32)

    return jax.tree_util.tree_map_with_path(fill, shapes(model))


def make_rollout(
    seed=0, vocab=VOCAB, groups=4, group_size=3, length=6, max_tokens=5, lengths=LENGTHS
):
    """A rollout that no policy has sampled: random tokens, lengths, ends and log-probs."""
    rng = np.random.default_rng(seed)
    shape = (groups, group_size, max_tokens)
    prompts = Prompts(
        tokens=rng.integers(0, vocab, (groups, length), np.int32),
        length=np.resize(np.asarray(lengths, np.int32), groups),
        index=np.arange(10, 10 + groups, dtype=np.int32),
    )
    used = rng.integers(1, max_tokens + 1, shape[:2])
    used[0, 0], used[-1, -1] = max_tokens, 1
    return Rollout(
        prompts=prompts,
        tokens=rng.integers(0, vocab, shape, np.int32),
        mask=np.arange(max_tokens) < used[..., None],
        logprobs=rng.uniform(-6, -2, shape).astype(np.float32),
        ended=rng.random(shape[:2]) < 0.6,
    )


def make_rewards(seed=0, groups=4, group_size=3):
    return np.random.default_rng(seed).uniform(-1, 2, (groups, group_size)).astype(np.float32)


class Bigram(Transformer):
    """A policy that looks at one token: all that the update asks of a model, compiled fast."""

    config: ModelConfig = ModelConfig(
        vocab_size=VOCAB, width=6, layers=1, heads=1, kv_heads=1, head_dim=6, mlp_width=6,
        tied_head=False, remat=False, attention='einsum',
    )  # fmt: skip

    def apply(self, variables, *args, method):
        params = variables['params']
        if method == 'prefill':
            tokens, length = args
            last = jnp.take_along_axis(tokens, length[:, None] - 1, axis=1)[:, 0]
            return KeyValues(None, None), params['embedding'][last]
        if method == 'extend':
            return params['embedding'][args[0]]
        if method == 'logits':
            return args[0] @ params['head']
        if method == 'output_matrix':
            return params['head']
        raise ValueError(f'the update asks a model for nothing like {method!r}')

    @staticmethod
    def make_params(seed=0, vocab=VOCAB, width=6):
        rng = np.random.default_rng(seed)
        return {
            'embedding': rng.standard_normal((vocab, width)).astype(np.float32),
            'head': 0.4 * rng.standard_normal((width, vocab)).astype(np.float32),
        }


def some_slow(names, *slow):
    """Parameters of a test, of which `slow` are left to the longer proofs."""
    return [pytest.param(name, marks=pytest.mark.slow) if name in slow else name for name in names]


def gap(a, b):
    """Largest absolute difference between the leaves of two trees."""
    leaves = jax.tree.leaves(
        jax.tree.map(lambda x, y: np.abs(np.asarray(x) - np.asarray(y)).max(), a, b)
    )
    return max(leaves)


def largest(tree):
    """Largest absolute value in a tree."""
    return max(np.abs(np.asarray(x)).max() for x in jax.tree.leaves(tree))


def same(a, b):
    """Whether two trees are equal bit for bit."""
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return all(np.asarray(x).tobytes() == np.asarray(y).tobytes() for x, y in pairs)


def adding(template, **special):
    """A byte tokenizer that adds to every text what `template` does."""
    tokenizer = byte_tokenizer()
    tokenizer.backend_tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single=template, special_tokens=[('<pad>', 256), ('<eos>', 257)]
    )
    tokenizer.add_special_tokens(special)
    return tokenizer
