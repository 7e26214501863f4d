"""Which experts each token uses: recorded in one pass, and used again in another.

A router that computes with other kernels, weights or batches than the sampler's may choose other
experts for the same token, which changes its log-prob by far more than rounding does. With the
sampler's own choice, the update differentiates the model that sampled: DeepSeek-V3.2 (arXiv
2512.02556), section 3.1, "keep routing". Routers still compute the weights of the chosen experts,
and their gradient.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Float, Int, UInt

from grpo_jax.models.layers import CHOSEN, PROBABILITIES, RECORDED
from grpo_jax.models.transformer import Transformer
from grpo_jax.models.unrolled import stack_layers, unstack_layers
from grpo_jax.types import Array, Params


def apply_recording(
    model: Transformer, params: Params, *args: Any, method: str
) -> tuple[Any, UInt[jax.Array, 'N L k']]:
    """`transformer.apply`, and the k experts that each of N tokens uses in each of L layers.

    The tokens are numbered as they are flattened, [B, S] or [B, G, S].
    """
    output, variables = model.apply({'params': params}, *args, method=method, mutable=[RECORDED])
    layers = variables[RECORDED]
    chosen = (stack_layers(layers) if model.unrolled else layers)['blocks']['experts']
    smallest = jnp.uint8 if model.config.experts <= 1 << 8 else jnp.uint16
    return output, chosen.swapaxes(0, 1).astype(smallest)


def router_outputs(
    model: Transformer, params: Params, tokens: Int[Array, 'N S'], length: Int[Array, ' N']
) -> tuple[Float[Array, 'L N S E'], Int[Array, 'L N S k']]:
    """The router's probability of every expert, and its choice, in each layer for each token.

    Args:
      model: the decoder, not unrolled.
      params: its parameters.
      tokens: whole sequences, padded on the right.
      length: real tokens of each; what is returned for padding has no meaning.
    """
    kinds = [RECORDED, PROBABILITIES]
    _, variables = model.apply({'params': params}, tokens, length, method='prefill', mutable=kinds)
    chosen = variables[RECORDED]['blocks']['experts']
    probabilities = variables[PROBABILITIES]['blocks']['all']
    shape = (len(chosen), *tokens.shape, -1)
    return probabilities.reshape(shape), chosen.reshape(shape)


def apply_routed(
    model: Transformer,
    params: Params,
    routing: UInt[Array, '*tokens L k'] | None,
    *args: Any,
    method: str,
) -> Any:
    """`transformer.apply` with these experts; None: the routers choose.

    Args:
      model: the decoder.
      params: its parameters.
      routing: for each token, in the shape of the tokens that the method processes.
      *args: of the method.
      method: its name.
    """
    if routing is None:
        return model.apply({'params': params}, *args, method=method)
    layers, k = routing.shape[-2:]
    chosen = jnp.moveaxis(jnp.asarray(routing).reshape(-1, layers, k), 1, 0).astype(jnp.int32)
    tree = {'blocks': {'experts': chosen}}
    variables = {'params': params, CHOSEN: unstack_layers(tree) if model.unrolled else tree}
    return model.apply(variables, *args, method=method)


def at_last_token(
    routing: UInt[Array, 'B P L k'], length: Int[Array, ' B']
) -> UInt[jax.Array, 'B L k']:
    """The routing of each prompt's last real token."""
    return jnp.take_along_axis(routing, (length - 1)[:, None, None, None], axis=1)[:, 0]
