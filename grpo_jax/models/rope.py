"""Rotary positions (Su et al., arXiv 2104.09864) and how to extend them to longer contexts.

The scaling rules and the names of their settings are those of Hugging Face `rope_scaling`.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from grpo_jax.types import Array

Settings = Mapping[str, Any]

# Kind -> its required and its optional settings.
_KINDS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    'linear': (('factor',), ()),
    'dynamic': (('factor', 'max_position_embeddings'), ()),
    'llama3': (
        ('factor', 'low_freq_factor', 'high_freq_factor', 'original_max_position_embeddings'),
        (),
    ),
    'yarn': (
        ('factor', 'original_max_position_embeddings'),
        ('beta_fast', 'beta_slow', 'attention_factor', 'mscale', 'mscale_all_dim', 'truncate'),
    ),
    'longrope': (
        ('short_factor', 'long_factor', 'factor', 'original_max_position_embeddings'),
        ('attention_factor',),
    ),
}


def settings_of(kind: str) -> tuple[str, ...]:
    """The settings that a kind of scaling reads, or none if it is unknown."""
    needed, optional = _KINDS.get(kind, ((), ()))
    return needed + optional


def check_scaling(scaling: Settings) -> None:
    """Checks the settings of a `rope_scaling`.

    Raises:
      ValueError: an unknown kind of scaling, or missing or unknown settings.
    """
    if not scaling:
        return
    kind = scaling.get('rope_type')
    if kind not in _KINDS:
        raise ValueError(f'rope_type={kind!r} is unknown: use one of {", ".join(_KINDS)}')
    needed, optional = _KINDS[kind]
    for name in needed:
        if scaling.get(name) is None:
            raise ValueError(f'rope_scaling of type {kind!r} lacks {name!r}: add it')
    for name in scaling:
        if name not in ('rope_type', *needed, *optional):
            known = ', '.join(needed + optional)
            raise ValueError(
                f'rope_scaling of type {kind!r} has no setting {name!r}: use some of {known}'
            )


def tables(
    positions: Int[Array, '*axes S'],
    seen: Int[Array, '*axes S'],
    *,
    width: int,
    theta: float,
    scaling: Settings,
) -> tuple[Float[Array, '*axes S pairs'], Float[Array, '*axes S pairs']]:
    """Cosines and sines to rotate tokens by.

    Args:
      positions: counted from the first prompt token.
      seen: the length of the sequence when the token is processed: that of the whole prompt for a
        prompt token, position + 1 for a completion token. 'dynamic' and 'longrope' depend on it;
        sampler and update agree because it does not depend on how tokens are batched.
      width: components of a head that are rotated, an even number.
      theta: base of the wavelengths.
      scaling: empty, or `rope_type` and its settings (see `check_scaling`).

    Returns:
      One value for each of width / 2 pairs of components.
    """
    exponent = np.arange(0, width, 2, dtype=np.float32) / np.float32(width)
    kind = scaling.get('rope_type', 'default')
    frequency, factor = _RULES[kind](theta, exponent, scaling, seen[..., None])
    angle = positions[..., None].astype(jnp.float32) * frequency
    return jnp.cos(angle) * factor, jnp.sin(angle) * factor


def rotate(
    x: Float[Array, '*rows S heads h'],
    cos: Float[Array, '*tables S pairs'],
    sin: Float[Array, '*tables S pairs'],
) -> Float[Array, '*rows S heads h']:
    """Rotates the pairs of components (i, i + n), for n pairs (eq. 34, half-split layout).

    Args:
      x: queries or keys.
      cos: [..., S, n] with 2 n <= h; components from 2 n on are unchanged.
      sin: like cos.
    """
    half = cos.shape[-1]
    cos, sin = cos[..., None, :], sin[..., None, :]
    a, b, rest = jnp.split(x.astype(jnp.float32), (half, 2 * half), axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin, rest], axis=-1).astype(x.dtype)


# Rules: (theta, exponent, settings, seen) -> frequencies that broadcast to [..., S, n], and the
# factor of cosine and sine.
_Exponent = Float[np.ndarray, ' n']
_Seen = Int[Array, '*axes 1']
_Frequency = Float[Array, '...'] | Float[np.ndarray, '...']


def _default(
    theta: float, exponent: _Exponent, _: Settings, seen: _Seen
) -> tuple[_Frequency, float]:
    del seen
    return (1 / np.float32(theta) ** exponent).astype(np.float32), 1.0


def _linear(
    theta: float, exponent: _Exponent, s: Settings, seen: _Seen
) -> tuple[_Frequency, float]:
    """Position interpolation (Chen et al., arXiv 2306.15595)."""
    return _default(theta, exponent, s, seen)[0] / np.float32(s['factor']), 1.0


def _dynamic(
    theta: float, exponent: _Exponent, s: Settings, seen: _Seen
) -> tuple[_Frequency, float]:
    """A base that grows with the sequence once it is longer than in training (NTK-aware)."""
    width, limit = 2 * len(exponent), s['max_position_embeddings']
    longer = jnp.maximum(seen, limit).astype(jnp.float32) / limit
    base = theta * (s['factor'] * longer - (s['factor'] - 1)) ** (width / (width - 2))
    return 1 / base**exponent, 1.0


def _llama3(
    theta: float, exponent: _Exponent, s: Settings, seen: _Seen
) -> tuple[_Frequency, float]:
    """Long waves are stretched, short ones kept, those between interpolated (as in Llama 3.1)."""
    frequency, _ = _default(theta, exponent, s, seen)
    waves = s['original_max_position_embeddings'] * frequency / (2 * np.float32(math.pi))
    low, high = s['low_freq_factor'], s['high_freq_factor']
    kept = np.clip((waves - low) / (high - low), 0, 1).astype(np.float32)
    return (1 - kept) * frequency / np.float32(s['factor']) + kept * frequency, 1.0


def _yarn(theta: float, exponent: _Exponent, s: Settings, seen: _Seen) -> tuple[_Frequency, float]:
    """A ramp between interpolation and none over the dimensions (Peng et al., arXiv 2309.00071)."""
    frequency, _ = _default(theta, exponent, s, seen)
    width, factor = 2 * len(exponent), s['factor']

    def dimension(turns: float) -> float:
        """The dimension that rotates `turns` times over the original length."""
        length = s['original_max_position_embeddings']
        return width * math.log(length / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low, high = dimension(s.get('beta_fast') or 32), dimension(s.get('beta_slow') or 1)
    if s.get('truncate', True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, width - 1)
    ramp = (np.arange(len(exponent), dtype=np.float32) - low) / (high - low or 0.001)
    stretched = np.clip(ramp, 0, 1)
    mixed = frequency / np.float32(factor) * stretched + frequency * (1 - stretched)
    return mixed.astype(np.float32), _yarn_factor(factor, s)


def _yarn_factor(factor: float, s: Settings) -> float:
    """The factor of cosine and sine: sqrt(1 / t) of section 3.4."""
    if s.get('attention_factor') is not None:
        return float(s['attention_factor'])

    def scale(weight: float) -> float:
        return 0.1 * weight * math.log(factor) + 1 if factor > 1 else 1.0

    if s.get('mscale') and s.get('mscale_all_dim'):
        return scale(s['mscale']) / scale(s['mscale_all_dim'])
    return scale(1)


def _longrope(
    theta: float, exponent: _Exponent, s: Settings, seen: _Seen
) -> tuple[_Frequency, float]:
    """A factor per dimension, another set of them past the original length (arXiv 2402.13753)."""
    frequency, _ = _default(theta, exponent, s, seen)
    length, factor = s['original_max_position_embeddings'], s['factor']
    short, long = (
        np.float32(1) / np.asarray(s[k], np.float32) for k in ('short_factor', 'long_factor')
    )
    scale = s.get('attention_factor')
    if scale is None:
        scale = math.sqrt(1 + math.log(factor) / math.log(length)) if factor > 1 else 1.0
    return frequency * jnp.where(seen > length, long, short), float(scale)


_RULES: dict[str, Callable[..., tuple[_Frequency, float]]] = {
    'default': _default,
    'linear': _linear,
    'dynamic': _dynamic,
    'llama3': _llama3,
    'yarn': _yarn,
    'longrope': _longrope,
}
