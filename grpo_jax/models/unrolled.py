"""Parameters with separate layers, for a `Transformer` that does not scan over them.

On CPUs and GPUs, a scan copies each layer's matrices out of their stack, and its activations into
one, in every pass. Without the scan, programs are faster there but take longer to compile. The
results are the same.
"""

import jax
import jax.numpy as jnp

from grpo_jax.types import Params

_LAYER = 'layers_'  # as flax names the entries of `Transformer.layers`


def unstack_layers(params: Params) -> Params:
    """Parameters with an entry for each layer instead of 'blocks' [L, ...]; None stays None."""
    if params is None:
        return None
    separate = {name: value for name, value in params.items() if name != 'blocks'}
    for i in range(len(jax.tree.leaves(params['blocks'])[0])):
        separate[f'{_LAYER}{i}'] = jax.tree.map(lambda x, i=i: x[i], params['blocks'])
    return separate


def stack_layers(params: Params) -> Params:
    """The inverse of `unstack_layers`; None stays None."""
    if params is None:
        return None
    others = {name: value for name, value in params.items() if not name.startswith(_LAYER)}
    layers = [params[f'{_LAYER}{i}'] for i in range(len(params) - len(others))]
    return others | {'blocks': jax.tree.map(lambda *x: jnp.stack(x), *layers)}
