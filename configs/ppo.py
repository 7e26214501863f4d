"""PPO: a critic, which is a second decoder with a scalar head, GAE, and the KL in the reward.

    python -m grpo_jax.train --config=configs/ppo.py --workdir=runs/ppo

The last token has the only reward, so the critic learns the probability of a right answer. With
seed 0 the accuracy rises from 49 to 97 %.
"""

import pathlib

from ml_collections import ConfigDict

from grpo_jax.run import config as grpo_config
from grpo_jax.run import methods


def get_config() -> ConfigDict:
    config = grpo_config.load(pathlib.Path(__file__).with_name('arithmetic.py'))
    methods.apply(config, 'ppo')
    config.grpo.algorithm.beta = 0.005
    config.critic.optimizer.update(learning_rate=1e-3, warmup_steps=20)
    return config
