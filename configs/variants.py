"""Any preset of `grpo_jax.algorithm.presets` on the arithmetic task.

    python -m grpo_jax.train --config=configs/variants.py:dapo --workdir=runs/dapo

Names are those of `presets.PRESETS`.
"""

import pathlib

from ml_collections import ConfigDict

from grpo_jax.run import config as grpo_config
from grpo_jax.run import methods


def get_config(name: str) -> ConfigDict:
    config = grpo_config.load(pathlib.Path(__file__).with_name('arithmetic.py'))
    methods.apply(config, name)
    if config.grpo.algorithm.kl != 'none':
        config.grpo.algorithm.beta = 0.005  # as in `arithmetic.py`
    return config
