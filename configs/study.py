"""The task of `benchmarks/study.py`: sums of six one-digit numbers, with a method by its name.

    python benchmarks/study.py --output=runs/study
    python -m grpo_jax.train --config=configs/study.py:ppo --workdir=runs/ppo

`start` is the SFT model that every method starts from.
"""

import pathlib

from ml_collections import ConfigDict

from grpo_jax.run import config as grpo_config
from grpo_jax.run import methods


def get_config(name: str) -> ConfigDict:
    config = grpo_config.load(pathlib.Path(__file__).with_name('arithmetic.py'))
    config.data.options.update(min_numbers=6, max_numbers=6, train_size=12_000)
    config.data.prompt_length = 12
    config.data.completion_length = 40
    config.sft.steps = 500
    config.grpo.update(steps=60, batch_size=16)
    config.grpo.optimizer.update(learning_rate=3e-5, warmup_steps=5)
    config.eval.update(every=10, samples=0)
    if name in ('start', 'sft'):
        config.grpo.steps = 0
        config.eval.every = 500
    elif name == 'grpo_iterative':
        config.grpo.update(iterations=3, steps=20)
        config.grpo.rewards = {}
        config.reward_model.update(weight=1.0, steps=40, batch_size=16)
        config.reward_model.optimizer.update(learning_rate=1e-3, warmup_steps=5)
        config.eval.every = 5
    else:
        methods.apply(config, name)
        if config.grpo.algorithm.kl != 'none':
            config.grpo.algorithm.beta = 0.005
    if name == 'ppo':
        config.critic.optimizer.update(learning_rate=3e-4, warmup_steps=5)
    if name == 'sft':
        config.sft.steps = 620
    if name == 'grpo_process':
        config.grpo.step_rewards = {'right_steps': 1.0}
        config.grpo.rewards = {}
    return config
