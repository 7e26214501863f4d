"""TRPO: natural gradient inside a bound on the KL, no learning rate.

    python -m grpo_jax.train --config=configs/trpo.py --workdir=runs/trpo

Conjugate gradient on Fisher-vector products and a line search cost several times an update, so
there are only 40 steps. With seed 0 they take the accuracy from 49 to 88 %.
"""

import pathlib

from ml_collections import ConfigDict

from grpo_jax.run import config as grpo_config
from grpo_jax.run import methods


def get_config() -> ConfigDict:
    config = grpo_config.load(pathlib.Path(__file__).with_name('arithmetic.py'))
    methods.apply(config, 'trpo')
    config.grpo.steps = 40
    config.eval.every = 10
    return config
