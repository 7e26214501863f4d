"""Rejection-sampling fine-tuning on the arithmetic task, on right answers of the SFT model.

    python -m grpo_jax.train --config=configs/rft.py --workdir=runs/rft

Expect the accuracy to rise from 40 to 60 % after SFT as fast as with GRPO: a right answer sampled
from the SFT model is a flawless demonstration here.
"""

import pathlib

from ml_collections import ConfigDict

from grpo_jax.run import config as grpo_config
from grpo_jax.run import methods


def get_config() -> ConfigDict:
    config = grpo_config.load(pathlib.Path(__file__).with_name('arithmetic.py'))
    methods.apply(config, 'rft')
    return config
