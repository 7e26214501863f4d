"""Several processes that run one program: how they start, agree, share numbers and end together.

Every process runs the same host program in the same order, and each device program is dispatched by
all of them. What one process alone knows (rewards of the completions that it grades, an error, a
signal) is therefore shared before anything depends on it. With one process nothing here does
anything. Numbers are gathered by the devices, short texts by JAX's coordination service.
"""

from grpo_jax.run.hosts.agreement import (
    Stopped,
    check_shared,
    exchange,
    from_first,
    in_all_processes,
    is_in_all_processes,
    is_seen,
    raise_in_all,
    request_stop,
    same,
    stop_requested,
    together,
)
from grpo_jax.run.hosts.arrays import fetch, gather, replicate, select, share, shares
from grpo_jax.run.hosts.starting import (
    OPTIONS,
    Start,
    detected,
    ending_together,
    start,
    start_from,
    stopped_by_signal,
)
from grpo_jax.run.hosts.state import ProcessesError, count, index, is_first, say

__all__ = [
    'OPTIONS', 'ProcessesError', 'Start', 'Stopped', 'check_shared', 'count', 'detected',
    'ending_together', 'exchange', 'fetch', 'from_first', 'gather', 'in_all_processes', 'index',
    'is_first', 'is_in_all_processes', 'is_seen', 'raise_in_all', 'replicate', 'request_stop',
    'same', 'say', 'select', 'share', 'shares', 'start', 'start_from', 'stop_requested',
    'stopped_by_signal', 'together',
]  # fmt: skip
