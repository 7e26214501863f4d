"""Any preset of `grpo_jax.presets` on the arithmetic task.

    python -m grpo_jax.train --config=configs/variants.py:dapo --workdir=runs/dapo

Names are those of `presets.PRESETS`.
"""

import pathlib

from ml_collections import ConfigDict

from grpo_jax import config as grpo_config
from grpo_jax import presets


def get_config(name: str) -> ConfigDict:
    config = grpo_config.load(pathlib.Path(__file__).with_name('arithmetic.py'))
    return presets.apply(config, name)
