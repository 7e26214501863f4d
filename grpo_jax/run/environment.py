"""What computes a run's numbers beside its config and inputs: versions and devices.

Numbers are equal to the last bit only where these are, so they are kept with the run: in
`environment.json` as they are now, and their changes in `changes.jsonl`.
"""

import json
import pathlib
from collections.abc import Mapping
from importlib import metadata

import jax
from jax.sharding import Mesh

from grpo_jax.run import changes, hosts
from grpo_jax.run.errors import reading
from grpo_jax.run.output_file import replaced

FILE = 'environment.json'  # in the run's folder


def environment(mesh: Mesh) -> dict[str, str]:
    """What computes the numbers of this process, by name."""
    devices = mesh.devices
    return {
        'jax': jax.__version__,
        'jaxlib': metadata.version('jaxlib'),
        'devices': f'{devices.size} {devices.flat[0].device_kind}',
        'processes': str(hosts.count()),
    }


def keep_environment(mesh: Mesh, workdir: pathlib.Path, steps: Mapping[str, list[int]]) -> None:
    """Writes what computes the run from now on, and records what has changed.

    Args:
      mesh: the devices.
      workdir: the run's folder.
      steps: the steps of its checkpoints, by stage; without any, nothing has changed.
    """
    before, now = read_environment(workdir), environment(mesh)
    changed = {
        name: {'from': before[name], 'to': value}
        for name, value in now.items()
        if before.get(name, value) != value
    }
    if changed and any(steps.values()):
        changes.append_record(changed, workdir, steps)
    with replaced(workdir / FILE) as file:
        file.write(json.dumps(now, indent=1) + '\n')


def read_environment(workdir: pathlib.Path) -> dict[str, str]:
    """What computes the run now; empty if an earlier version has kept nothing."""
    path = workdir / FILE
    if not path.is_file():
        return {}
    with reading(path, 'restore it, or remove it to go on without knowing what computed the run'):
        found: dict[str, str] = json.loads(path.read_bytes())
        if not all(isinstance(value, str) for value in found.values()):
            raise TypeError('it holds values that are no texts')
    return found
