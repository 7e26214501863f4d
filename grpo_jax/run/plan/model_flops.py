"""The FLOPs that a decoder needs, by its shape."""

from grpo_jax import models
from grpo_jax.run.abstract import Shape


def forward_flops(config: models.ModelConfig, shape: Shape) -> float:
    """The FLOPs of reading B prompts once each, and their completions, with the output logits.

    A product of [m, k] and [k, n] is 2 m k n. Attention is causal; a group's prompt is read once.
    """
    c, (groups, group_size, prompt, length) = config, shape
    tokens = groups * (prompt + group_size * length)
    attention = c.width * c.head_dim * (2 * c.heads + 2 * c.kv_heads)
    mlp = 3 * c.width * c.mlp_width * (c.experts_per_token if c.experts else 1)
    router = c.width * c.experts
    products = c.layers * (attention + mlp + router) * tokens
    products += c.width * c.vocab_size * groups * group_size * length
    pairs = groups * (prompt**2 / 2 + group_size * (length * prompt + length**2 / 2))
    return 2.0 * products + 4.0 * c.layers * c.heads * c.head_dim * pairs
