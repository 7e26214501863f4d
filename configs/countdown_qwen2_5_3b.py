"""Countdown: a base model learns to reach a target with three or four numbers, from rules alone.

    python -m grpo_jax.train --config=configs/countdown_qwen2_5_3b.py --workdir=runs/countdown

The task of TinyZero, with generated problems. For 4 accelerators of 80 GB. TinyZero reports that a
base model of 3 billion parameters learns to search and to check its work; the success rate rises
from near 0 to about 80 %. Not run here, because the weights were not available.
"""

from ml_collections import ConfigDict

from grpo_jax.run import config as grpo_config


def get_config() -> ConfigDict:
    config = grpo_config.defaults()
    config.pretrained = 'Qwen/Qwen2.5-3B'
    config.model.dtype = 'bfloat16'
    config.mesh.fsdp = -1
    config.data.update(
        name='countdown',
        prompt='r1',
        prompt_length=256,
        completion_length=1024,
        stops=('</answer>',),
    )
    config.data.options = {'train_size': 50_000, 'test_size': 512}
    config.grpo.update(steps=300, batch_size=64, group_size=8)
    config.grpo.algorithm.beta = 0.001
    config.grpo.rewards = {'countdown_answer': 1.0, 'think_format': 0.1}
    config.grpo.optimizer.update(learning_rate=1e-6, warmup_steps=10)
    config.eval.update(
        every=50, batch_size=128, correct='countdown_answer', extract='extract_math', samples=0
    )
    return config
