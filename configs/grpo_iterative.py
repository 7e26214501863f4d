"""Iterative GRPO: three iterations, rewards from a reward model that is retrained before each.

    python -m grpo_jax.train --config=configs/grpo_iterative.py --workdir=runs/grpo_iterative

The reward model is trained on the policy's samples before each iteration; a tenth of each batch
replays earlier iterations. With seed 0 the accuracy goes from 49 to 89, 94 and 93 %.
At the learning rate of `arithmetic.py`, 3e-4, the policy exploited the errors of the reward model
and ended at 5 % (with an earlier version).
"""

import pathlib

from ml_collections import ConfigDict

from grpo_jax.run import config as grpo_config


def get_config() -> ConfigDict:
    config = grpo_config.load(pathlib.Path(__file__).with_name('arithmetic.py'))
    config.grpo.update(iterations=3, steps=60)
    config.grpo.rewards = {}
    config.grpo.optimizer.learning_rate = 3e-5
    config.reward_model.update(weight=1.0, steps=60)
    config.reward_model.optimizer.update(learning_rate=1e-3, warmup_steps=10, decay='linear')
    return config
