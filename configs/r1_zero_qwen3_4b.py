"""R1-Zero: a base model, no demonstrations, rule-based rewards for the answer and its tags.

    export GRPO_JAX_DATA_DIR=data
    python -m grpo_jax.train --config=configs/r1_zero_qwen3_4b.py --workdir=runs/r1_zero

DeepSeek-R1 (arXiv 2501.12948): 16 outputs for each of 32 questions, beta 0.001, temperature 1. For
8 accelerators of 80 GB, since completions may have 4,096 tokens. Expect `rewards/think_format/mean`
to rise first, then `rewards/math_answer/mean` together with the length. Not run here, because the
weights were not available.
"""

from ml_collections import ConfigDict

from grpo_jax.run import config as grpo_config


def get_config() -> ConfigDict:
    config = grpo_config.defaults()
    config.pretrained = 'Qwen/Qwen3-4B-Base'
    config.model.dtype = 'bfloat16'
    config.mesh.fsdp = -1
    config.data.update(
        name='math',
        prompt='r1',
        heldout_split='test500',
        prompt_length=768,
        completion_length=4096,
        stops=('</answer>',),
    )
    config.grpo.update(steps=400, batch_size=32, group_size=16)
    config.grpo.algorithm.beta = 0.001
    config.grpo.rewards = {'math_answer': 1.0, 'think_format': 0.5}
    config.grpo.optimizer.update(learning_rate=3e-6, warmup_steps=10)
    config.eval.update(
        every=50, batch_size=64, correct='math_answer', extract='extract_math', samples=0
    )
    return config
