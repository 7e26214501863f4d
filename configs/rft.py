"""Rejection-sampling fine-tuning on the arithmetic task: what the SFT model got right.

    python -m grpo_jax.train --config=configs/rft.py --workdir=runs/rft

TODO
"""

import pathlib

from ml_collections import ConfigDict

from grpo_jax import config as grpo_config
from grpo_jax import presets


def get_config() -> ConfigDict:
    config = grpo_config.load(pathlib.Path(__file__).with_name('arithmetic.py'))
    presets.apply(config, 'rft')
    return config
