"""Memory and work of programs for devices whose compiler is not at hand: formulas in place of it.

Arrays that exist between programs (parameters, moments, batches, caches) are counted exactly. What
a program needs beside them is estimated per device. For an update, with n tokens of a microbatch
and r of its completions on a device, width D, H heads and K key/value heads of size h, an MLP of M,
V tokens, chunks of c positions, and activations of s bytes:

    kept per layer and token     4 D + (3 H + 3 K) h + 6 M    inputs of norms and products
    kept                         n s (layers x kept), or with remat n s (layers x D + kept)
    of one backward layer        n s (2 D + 3 M)
    gradients                    those of what is trained, twice if there are several microbatches
    logits                       3 c r V float32
    weights of two layers in s bytes, where they are gathered from several devices

M counts once for each expert of a token. For a sampler, with r completions on a device: the logits
of a column, in float32, six times (draws, filters and their copies).
"""

import math
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from grpo_jax import models, sharding
from grpo_jax.engine import compaction, decode
from grpo_jax.engine.calls import Call
from grpo_jax.engine.compute import ComputePlan
from grpo_jax.run.plan.costs import Costs, Speed
from grpo_jax.run.plan.model_flops import forward_flops
from grpo_jax.types import Rollout

_FLOAT = 4


class Estimate(NamedTuple):
    """What a compiler would say of a program.

    Attributes:
      results: bytes that take no argument's place.
      temporaries: bytes.
      costs: its work, without collectives.
      shardings: of its results.
    """

    results: float
    temporaries: float
    costs: Costs
    shardings: Any


def estimate(call: Call, trips: int, speed: Speed) -> Estimate:
    """The memory and work of a program on a device.

    Args:
      call: its call, with abstract arguments.
      trips: columns that it decodes.
      speed: of the device.
    """
    shapes = call.program.eval_shape(*call.arguments, **call.options)
    mesh = next(x.sharding.mesh for x in jax.tree.leaves(call.arguments) if hasattr(x, 'sharding'))
    rollout = next((x for x in call.arguments if isinstance(x, Rollout)), None)
    if rollout is not None:
        return _of_rollout(call, rollout, shapes, mesh, speed)
    where = _result_shardings(call, shapes, mesh)
    results, temporaries = _bytes(shapes, where), 0.0
    flops, moved = 0.0, _bytes(call.arguments) + results
    if call.program in (decode.first_block, decode.next_block):
        config, drawn = call.arguments[0].config, shapes[-1].drawn.tokens
        rows = drawn.shape[0] * drawn.shape[1] / sharding.data_devices(mesh)
        temporaries = sampling_temporaries(config, rows)
        flops, moved = trips * 2.0 * _parameters(call) * rows, trips * _bytes(call.arguments)
        if call.program is decode.next_block:  # which donates its slots
            results = _bytes(shapes[-1], where[-1])
    seconds = max(flops / speed.flops, moved / speed.bandwidth)
    return Estimate(results, temporaries, Costs(flops, moved, seconds), where)


def _of_rollout(call: Call, rollout: Rollout, shapes: Any, mesh: Mesh, speed: Speed) -> Estimate:
    """An update, or the scores of the reward model."""
    groups, group_size, length = rollout.tokens.shape
    shape = groups, group_size, rollout.prompts.tokens.shape[1], length
    devices = sharding.data_devices(mesh)
    sizes = Sizes(shape, sharding.slices_of(groups, group_size, mesh), devices)
    config, *plans = call.closed_over
    passes, results = 1, _bytes(shapes)
    plan = ComputePlan(groups, 0, packed=False, widths=1, unroll=False, logprob_chunk=0)
    gradients = 0.0
    if plans:
        plan, results = plans[0], 0.0
        gradients = _bytes(call.arguments[0].params)
        has_reference = call.arguments[1] is not None and not config.scalar_head
        passes = 3 - bool(config.lora.rank) + plan.remat + has_reference
    flops = passes * forward_flops(config, shape) / mesh.size
    costs = Costs(flops=flops, seconds=flops / speed.flops)
    needed = update_temporaries(config, sizes, plan, gradients)
    return Estimate(results, needed, costs, jax.tree.map(lambda _: None, shapes))


def _parameters(call: Call) -> float:
    """How many parameters of a sampler are on a device."""
    params = call.arguments[1]
    params = params.params if hasattr(params, 'params') else params
    return sum(math.prod(x.sharding.shard_shape(x.shape)) for x in jax.tree.leaves(params))


def _result_shardings(call: Call, shapes: Any, mesh: Mesh) -> Any:
    """Those of weights, and of completions, whose axis is split over the devices."""
    sampled_on = call.options.get('mesh')
    if 'weights' in call.options:  # a conversion
        if sampled_on is not None:
            return sharding.whole_over_data(shapes, sampled_on)
        return sharding.shardings(shapes, mesh)
    mesh = sampled_on or mesh
    if call.program in (decode.grow_cache, compaction.keep_slots, compaction.copy_prompts):
        return call.arguments[0].sharding

    def of_array(path: Any, x: Any) -> NamedSharding:
        axis = int(any(getattr(key, 'name', '') == 'cache' for key in path))
        is_split = x.ndim > axis and x.shape[axis] % sharding.data_devices(mesh) == 0
        axes = (None,) * axis + (sharding.DATA,) if is_split else ()
        return NamedSharding(mesh, PartitionSpec(*axes))

    return jax.tree_util.tree_map_with_path(of_array, shapes)


def _bytes(tree: Any, where: Any = None) -> float:
    """Bytes of abstract arrays on a device; `where`: their shardings, instead of their own."""
    leaves = jax.tree.leaves(tree)
    places = [getattr(x, 'sharding', None) for x in leaves]
    if where is not None:
        places = jax.tree.leaves(where, is_leaf=lambda x: isinstance(x, NamedSharding))
    return float(
        sum(
            math.prod(s.shard_shape(x.shape) if s is not None else x.shape) * x.dtype.itemsize
            for x, s in zip(leaves, places, strict=True)
            if hasattr(x, 'dtype')
        )
    )


class Sizes(NamedTuple):
    """How a batch lies on the devices.

    Attributes:
      shape: (B, G, P, T).
      slices: of a group, each of which reads its prompt; see `sharding.slices_of`.
      devices: that split the batch.
    """

    shape: tuple[int, int, int, int]
    slices: int
    devices: int


def update_temporaries(
    config: models.ModelConfig, sizes: Sizes, plan: ComputePlan, gradients: float
) -> float:
    """Bytes of a device that an update needs beside its arguments.

    Args:
      config: of the decoder.
      sizes: of the batch.
      plan: how the update is computed.
      gradients: bytes of the gradients on a device.
    """
    c, (groups, group_size, prompt, length) = config, sizes.shape
    itemsize = _itemsize(c)
    rows = plan.microbatch * group_size / sizes.devices
    held = min(rows, plan.rows / sizes.devices) if plan.rows else rows
    tokens = plan.microbatch * sizes.slices * prompt / sizes.devices + held * length
    wide = c.mlp_width * (c.experts_per_token if c.experts else 1)
    kept = 4 * c.width + 3 * (c.heads + c.kv_heads) * c.head_dim + 6 * wide
    of_layers = c.layers * c.width + kept if plan.remat else c.layers * kept
    backward = 2 * c.width + 3 * wide
    vocab = 0 if c.scalar_head else c.vocab_size
    logits = 3 * plan.logprob_chunk * held * vocab * _FLOAT
    copies = 1 + (plan.microbatch < groups)
    gathered = 2 * _layer_parameters(c) * itemsize if sizes.devices > 1 else 0
    return tokens * itemsize * (of_layers + backward) + logits + copies * gradients + gathered


def sampling_temporaries(config: models.ModelConfig, rows: float) -> float:
    """Bytes of a device that decoding needs beside arguments and results, for its completions."""
    return 6 * rows * config.vocab_size * _FLOAT


def _itemsize(config: models.ModelConfig) -> int:
    return 4 if config.dtype == 'float32' else 2


def _layer_parameters(config: models.ModelConfig) -> int:
    c = config
    attention = c.width * c.head_dim * (2 * c.heads + 2 * c.kv_heads)
    return attention + 3 * c.width * c.mlp_width * max(c.experts, 1)
