"""Addition of four numbers, learned from exact answers on two cores in under five minutes.

    python -m grpo_jax.train --config=configs/arithmetic.py --workdir=runs/arithmetic

Stage 1 imitates demonstrations that drop the carry in half of the steps that need one
(`7+8+5+9=` -> `7+8=5;5+5=10;10+9=19`); stage 2 is GRPO with reward 1 for a right final answer.
Expect a held-out accuracy of 40 to 60 % after stage 1 and above 95 % at the end.
"""

from ml_collections import ConfigDict

from grpo_jax.run import config as grpo_config


def get_config() -> ConfigDict:
    config = grpo_config.defaults()
    config.model.update(width=96, layers=3, heads=6, kv_heads=6, head_dim=16, mlp_width=256)
    config.model.remat = False
    config.data.name = 'arithmetic'
    config.data.options = {
        'train_size': 9_000,
        'test_size': 500,
        'min_numbers': 4,
        'max_numbers': 4,
        'min_digits': 1,
        'max_digits': 1,
        'operations': '+',
        'mistakes': 0.5,
        'seed': 0,
    }
    config.data.prompt_length = 8
    config.data.completion_length = 24
    config.sft.update(steps=450, batch_size=64)
    config.sft.optimizer.update(learning_rate=3e-3, warmup_steps=30, hold_steps=300, decay='linear')
    config.grpo.update(steps=120, batch_size=32, group_size=8)
    config.grpo.algorithm.beta = 0.005
    config.grpo.rewards = {'exact_answer': 1.0}
    config.grpo.optimizer.update(learning_rate=3e-4, warmup_steps=20)
    config.eval.update(every=40, batch_size=256, correct='exact_answer', extract='final_result')
    config.checkpoint.update(every=100)
    return config
