"""GRPO of Qwen2.5-1.5B-Instruct on GSM8K with its chat template.

    export GRPO_JAX_DATA_DIR=data
    python -m grpo_jax.train --config=configs/gsm8k_qwen2_5_1_5b.py --workdir=runs/gsm8k_qwen

For 4 or 8 accelerators of 16 GB or more; pass a local copy with `--config.pretrained=FOLDER`. The
model card reports 73.2 % on GSM8K (4-shot) before training; public GRPO recipes of this size end
between 75 and 80 %. Not run here, because the weights were not available: these are rough figures.
"""

from ml_collections import ConfigDict

from grpo_jax.run import config as grpo_config


def get_config() -> ConfigDict:
    config = grpo_config.defaults()
    config.pretrained = 'Qwen/Qwen2.5-1.5B-Instruct'
    config.model.dtype = 'bfloat16'
    config.mesh.fsdp = -1
    config.data.update(
        name='gsm8k', prompt='deepseekmath', chat=True, prompt_length=384, completion_length=512
    )
    config.grpo.update(steps=460, batch_size=64, group_size=8)
    config.grpo.algorithm.beta = 0.04
    config.grpo.rewards = {'gsm8k_answer': 1.0}
    config.grpo.optimizer.update(learning_rate=1e-6, warmup_steps=10)
    config.eval.update(
        every=115, batch_size=256, correct='gsm8k_answer', extract='extract_answer',
        samples=8, k=(1, 8), temperature=0.7,
    )  # fmt: skip
    return config
