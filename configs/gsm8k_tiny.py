"""Three GRPO steps on real GSM8K questions with a small random model and the byte tokenizer.

    export GRPO_JAX_DATA_DIR=data
    python -m grpo_jax.train --config=configs/gsm8k_tiny.py --workdir=runs/gsm8k_tiny

Needs the public files as `data/gsm8k/train.jsonl` and `test.jsonl`. A random model writes noise, so
rewards stay near 0: this tests the pipeline from question to extracted answer, not learning.
"""

from ml_collections import ConfigDict

from grpo_jax.run import config as grpo_config


def get_config() -> ConfigDict:
    config = grpo_config.defaults()
    config.model.update(width=64, layers=2, heads=4, kv_heads=2, head_dim=16, mlp_width=128)
    config.data.update(
        name='gsm8k',
        prompt='Question: {question}\nAnswer: ',
        heldout_split='test[:32]',
        prompt_length=320,
        completion_length=64,
    )
    config.grpo.update(steps=3, batch_size=8, group_size=4)
    config.grpo.rewards = {'gsm8k_answer': 1.0, 'hash_format': 0.1}
    config.eval.update(
        every=3, batch_size=32, correct='gsm8k_answer', extract='extract_answer', samples=0
    )
    return config
