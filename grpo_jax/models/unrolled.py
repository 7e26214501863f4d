"""Parameters whose layers are apart, for a `Transformer` that does not scan over them.

On CPUs and GPUs a scan copies each layer's matrices out of their stack, and activations into one,
in every pass. Without it programs are faster there and take longer to compile; what is computed is
the same.
"""

import jax
import jax.numpy as jnp

from grpo_jax.types import Params

_LAYER = 'layers_'  # as flax names the entries of `Transformer.layers`


def unstacked(params: Params) -> Params:
    """Parameters with an entry for each layer in the place of 'blocks' [L, ...]; None stays."""
    if params is None:
        return None
    apart = {name: value for name, value in params.items() if name != 'blocks'}
    for i in range(len(jax.tree.leaves(params['blocks'])[0])):
        apart[f'{_LAYER}{i}'] = jax.tree.map(lambda x, i=i: x[i], params['blocks'])
    return apart


def stacked(params: Params) -> Params:
    """What `unstacked` was given; None stays."""
    if params is None:
        return None
    together = {name: value for name, value in params.items() if not name.startswith(_LAYER)}
    layers = [params[f'{_LAYER}{i}'] for i in range(len(params) - len(together))]
    return together | {'blocks': jax.tree.map(lambda *x: jnp.stack(x), *layers)}
