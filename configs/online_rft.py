"""Online rejection-sampling fine-tuning: like RFT, but sampled from the current policy.

    python -m grpo_jax.train --config=configs/online_rft.py --workdir=runs/online_rft

The held-out accuracy is 48.8 % after SFT, 97 % after 40 steps and 99.6 % at the end (seed 0).
"""

import pathlib

from ml_collections import ConfigDict

from grpo_jax.run import config as grpo_config
from grpo_jax.run import methods


def get_config() -> ConfigDict:
    config = grpo_config.load(pathlib.Path(__file__).with_name('arithmetic.py'))
    methods.apply(config, 'online_rft')
    return config
