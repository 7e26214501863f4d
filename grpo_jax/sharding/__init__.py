"""The device mesh, and how parameters and batches are split over it.

The mesh has three axes. `groups` splits the groups of a batch and `completions` the completions of
each group; parameters are split over both (as in ZeRO-3, gathered where they are used), which the
table of parameters calls `fsdp`. `tensor` splits heads, the MLP and the vocabulary. One device is a
mesh of size 1 x 1 x 1.
"""

from grpo_jax.sharding.batches import (
    anchor,
    anchor_rows,
    check_batch,
    groups,
    join_groups,
    on_each_data_device,
    put,
    put_groups,
    put_rollout,
    replicated,
    rollout_shardings,
    slices_of,
    split_groups,
    whole_groups,
)
from grpo_jax.sharding.devices import CHIPS, Chip, chip_of, memory_of
from grpo_jax.sharding.mesh import (
    AXES,
    DATA,
    check_heads,
    choose_completions,
    data_devices,
    make_mesh,
    mesh_sizes,
    tensor_sizes,
    use,
    with_tensor,
)
from grpo_jax.sharding.parameters import (
    HOST,
    TABLE,
    back_on_host,
    by_axes,
    check_host_memory,
    not_split,
    on_device,
    placed,
    shardings,
    whole_over_data,
)

__all__ = [
    'AXES', 'CHIPS', 'DATA', 'HOST', 'TABLE', 'Chip', 'anchor', 'anchor_rows', 'back_on_host',
    'by_axes', 'check_batch', 'check_heads', 'check_host_memory', 'chip_of', 'choose_completions',
    'data_devices', 'groups', 'join_groups', 'make_mesh', 'memory_of', 'mesh_sizes', 'not_split',
    'on_device', 'on_each_data_device', 'placed', 'put', 'put_groups', 'put_rollout', 'replicated',
    'rollout_shardings', 'shardings', 'slices_of', 'split_groups', 'tensor_sizes', 'use',
    'whole_groups', 'whole_over_data', 'with_tensor',
]  # fmt: skip
