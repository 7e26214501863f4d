"""Refuses parameters that are not finite."""

import jax
import jax.numpy as jnp

from grpo_jax.types import Params

_NAMED = 3  # parameters in the error


def check_finite(params: Params, checkpoint: str) -> None:
    """Checks that all numbers of a checkpoint are finite.

    Args:
      params: on the mesh.
      checkpoint: its name, for the error.

    Raises:
      ValueError: some are NaN or infinite; names the first parameters that have them.
    """
    counts = {
        jax.tree_util.keystr(path, simple=True, separator='/'): int(count)
        for path, count in jax.tree_util.tree_leaves_with_path(_count(params))
    }
    wrong = {name: count for name, count in counts.items() if count}
    if wrong:
        named = ', '.join(f'{count} in {name}' for name, count in list(wrong.items())[:_NAMED])
        more = f' and {len(wrong) - _NAMED} other parameters' if len(wrong) > _NAMED else ''
        raise ValueError(
            f'checkpoint {checkpoint}: {sum(wrong.values())} numbers are NaN or infinite ({named}'
            f'{more}): name an earlier checkpoint'
        )


@jax.jit
def _count(params: Params) -> Params:
    """Count what is not finite in each parameter; integers are finite."""
    return jax.tree.map(lambda x: jnp.sum(~jnp.isfinite(x), dtype=jnp.int32), params)
