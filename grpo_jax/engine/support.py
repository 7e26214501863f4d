"""The tokens that a sampler's filters keep, one bit for each token of the vocabulary.

A filter such as top-p depends on the logits, so a policy that has moved since would keep other
tokens than the sampler did. Recorded while sampling, the sampler's own sets serve for all scores of
a rollout: DeepSeek-V3.2 (arXiv 2512.02556), section 3.1, "keep sampling mask".
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, UInt32

_BITS = 32


def pack(kept: Bool[Array, '*n V']) -> UInt32[Array, '*n words']:
    """Packs flags into words of 32 bits, V / 32 of them (rounded up)."""
    padding = [(0, 0)] * (kept.ndim - 1) + [(0, -kept.shape[-1] % _BITS)]
    bits = jnp.pad(kept, padding).reshape(*kept.shape[:-1], -1, _BITS)
    return (bits.astype(jnp.uint32) << _positions()).sum(-1, dtype=jnp.uint32)


def unpack(words: UInt32[Array, '*n words'], size: int) -> Bool[Array, '*n V']:
    """The first `size` flags of packed words."""
    bits = (words[..., None] >> _positions()) & 1
    return bits.reshape(*words.shape[:-1], -1)[..., :size].astype(bool)


def _positions() -> jax.Array:
    return jnp.arange(_BITS, dtype=jnp.uint32)
