"""The planned memory of three updates against what the process then takes: a longer proof."""

import json
import pathlib
import subprocess
import sys

import pytest

pytestmark = pytest.mark.slow

# Runs one update in a fresh process. Its peak is that of the program: the compiler's memory is
# given back, and the highest mark of the process is set back, before.
SCRIPT = """
import ctypes, json, pathlib, sys

import jax
import jax.numpy as jnp
import runs

from grpo_jax.run import mesh
from grpo_jax.run.plan.measuring import memory_needed
from grpo_jax.run.preparation import prepare_run

def kib(name):
    line = next(x for x in open('/proc/self/status') if x.startswith(name))
    return int(line.split()[1])

config = runs.get_config()
config.sft.steps = 0
config.data.update(heldout_split='', completion_length=256)
config.model.update(width=256, layers=4, heads=4, kv_heads=4, head_dim=64, mlp_width=1024)
config.grpo.update(batch_size=8, group_size=8)
config.grpo.compute.microbatch = int(sys.argv[1])
config.grpo.compute.logprob_chunk = int(sys.argv[2])
config.grpo.compute.widths = 1
config.model.remat = sys.argv[3] == 'remat'
with mesh.described(jax.devices()):
    call = prepare_run(config, sys.argv[4]).stages[0].update()
planned = memory_needed(call)
compiled = call.program.lower(*call.arguments).compile()

def fill(x):
    if not isinstance(x, jax.ShapeDtypeStruct):
        return x
    return jax.device_put(jnp.ones(x.shape, x.dtype), x.sharding)

arguments = jax.block_until_ready(jax.tree.map(fill, call.arguments))
size = sum(x.nbytes for x in jax.tree.leaves(arguments) if isinstance(x, jax.Array))
ctypes.CDLL(None).malloc_trim(0)
pathlib.Path('/proc/self/clear_refs').write_text('5')
before = kib('VmRSS')
jax.block_until_ready(compiled(*arguments))
print(json.dumps({'planned': planned, 'taken': size + 1024 * (kib('VmHWM') - before)}))
"""


@pytest.mark.parametrize(
    'options', [('8', '64', 'plain'), ('4', '256', 'plain'), ('8', '64', 'remat')]
)
def test_an_update_takes_what_was_planned(options, tmp_path):
    folder = pathlib.Path(__file__).parent
    found = subprocess.run(
        [sys.executable, '-c', SCRIPT, *options, str(tmp_path)],
        capture_output=True, text=True, check=True, cwd=folder, timeout=900,
    )  # fmt: skip
    numbers = json.loads(found.stdout.splitlines()[-1])
    assert numbers['planned'] > 2**28  # enough to be measured
    assert numbers['taken'] == pytest.approx(numbers['planned'], rel=0.05)
