"""A tiny run of both stages that uses many features, for continuous integration.

    python -m grpo_jax.train --config=configs/smoke.py --workdir=runs/smoke

Takes under 30 seconds once compiled. Single-digit sums; it learns little.
"""

from ml_collections import ConfigDict

from grpo_jax.run import config as grpo_config


def get_config() -> ConfigDict:
    config = grpo_config.defaults()
    config.model.update(
        width=32, layers=2, heads=4, kv_heads=2, head_dim=8, mlp_width=64, qk_norm='head'
    )
    config.data.options = {
        'train_size': 90,
        'test_size': 10,
        'min_numbers': 2,
        'max_numbers': 2,
        'max_digits': 1,
        'mistakes': 0.5,
    }
    config.data.update(prompt_length=4, completion_length=7)
    config.sft.update(steps=60, batch_size=16, microbatch=8)
    config.sft.optimizer.update(learning_rate=1e-2, warmup_steps=5, decay='cosine')
    config.grpo.update(steps=6, batch_size=4, group_size=4)
    config.grpo.algorithm.update(inner_updates=2, entropy=True)
    config.grpo.compute.update(microbatch=2, logprob_chunk=4)
    config.grpo.rewards = {'exact_answer': 1.0, 'chain_format': 0.1}
    config.grpo.optimizer.update(learning_rate=1e-3)
    config.eval.update(
        every=3, batch_size=8, correct='exact_answer', extract='final_result', samples=4, k=(1, 4)
    )
    config.checkpoint.update(every=2)
    return config
