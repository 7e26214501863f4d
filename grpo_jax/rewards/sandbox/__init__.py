"""Run programs that models write: a sandbox, and a pool of processes in it.

    pool = sandbox.shared()
    tests = sandbox.Tests('def double(x): return 2 * x', 'assert double(2) == 4')
    pool.run([tests], sandbox.Limits(seconds=5.0, memory=2**29))

`bubblewrap` starts the sandbox, `inside` is what runs in it, and a `worker` leads one program after
the other through it.
"""

from grpo_jax.rewards.sandbox.bubblewrap import SandboxError
from grpo_jax.rewards.sandbox.jobs import Inputs, Job, Limits, Result, Tests
from grpo_jax.rewards.sandbox.pool import Pool, shared

__all__ = ['Inputs', 'Job', 'Limits', 'Pool', 'Result', 'SandboxError', 'Tests', 'shared']
