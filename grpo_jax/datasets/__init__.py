"""TFDS builders that need no TensorFlow: ArrayRecord files, read through `as_data_source`.

`grpo_jax.data.load` prepares and opens them. `tfds.load` by name finds no builder without
TensorFlow: use the classes. TFDS looks up a builder by the folder of its package, so they need one.
"""

from grpo_jax.datasets.arithmetic import Arithmetic, ArithmeticConfig
from grpo_jax.datasets.choose import choose
from grpo_jax.datasets.countdown import Countdown, CountdownConfig
from grpo_jax.datasets.files import Files, FilesConfig
from grpo_jax.datasets.prepare import TextRows, prepare

__all__ = [
    'Arithmetic',
    'ArithmeticConfig',
    'Countdown',
    'CountdownConfig',
    'Files',
    'FilesConfig',
    'TextRows',
    'choose',
    'prepare',
]
