"""Direct preference optimization from pairs that the SFT model samples, right against wrong.

    python -m grpo_jax.train --config=configs/dpo.py --workdir=runs/dpo

Groups that are all right or all wrong are replaced from up to one extra batch per step. With seed 0
the accuracy rises from 49 to 98 % in 40 steps. Longer training is worse: both log-probs of a pair
fall while their margin grows, and after 120 steps the accuracy was 29 %.
"""

import pathlib

from ml_collections import ConfigDict

from grpo_jax.run import config as grpo_config
from grpo_jax.run import methods


def get_config() -> ConfigDict:
    config = grpo_config.load(pathlib.Path(__file__).with_name('arithmetic.py'))
    methods.apply(config, 'dpo')
    config.grpo.refill = 1
    config.grpo.steps = 40
    config.grpo.optimizer.learning_rate = 3e-5
    return config
