"""TFDS builders that work without TensorFlow: ArrayRecord files, read by `as_data_source`.

`grpo_jax.data.load` prepares and opens them. Use the classes, because without TensorFlow
`tfds.load` does not find a builder by its name.
"""

from grpo_jax.data.datasets.arithmetic import Arithmetic, ArithmeticConfig
from grpo_jax.data.datasets.countdown import Countdown, CountdownConfig
from grpo_jax.data.datasets.files import Files, FilesConfig
from grpo_jax.data.datasets.prepared import PreparedRows, prepare
from grpo_jax.data.datasets.registry import resolve

__all__ = [
    'Arithmetic',
    'ArithmeticConfig',
    'Countdown',
    'CountdownConfig',
    'Files',
    'FilesConfig',
    'PreparedRows',
    'prepare',
    'resolve',
]
