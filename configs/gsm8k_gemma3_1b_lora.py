"""GRPO of Gemma 3 1B (instruction-tuned) on GSM8K, adapters only.

    export GRPO_JAX_DATA_DIR=data
    python -m grpo_jax.train --config=configs/gsm8k_gemma3_1b_lora.py --workdir=runs/gsm8k_gemma
    python -m grpo_jax.export --workdir=runs/gsm8k_gemma --output=runs/gemma_adapter --adapter

Fits one accelerator of 16 GB, since policy and reference share one copy of the base in bfloat16.
The model card reports 62.8 % on GSM8K before training. Not run here, because the weights were not
available; expect a gain of a few points, as other LoRA recipes for this model report.
"""

from ml_collections import ConfigDict

from grpo_jax.run import config as grpo_config


def get_config() -> ConfigDict:
    config = grpo_config.defaults()
    config.pretrained = 'google/gemma-3-1b-it'
    config.model.update(dtype='bfloat16', param_dtype='bfloat16')
    config.model.lora.update(rank=32, alpha=64.0, targets=('*_proj',))
    config.mesh.fsdp = -1
    config.data.update(
        name='gsm8k', prompt='deepseekmath', chat=True, prompt_length=384, completion_length=512
    )
    config.grpo.update(steps=460, batch_size=16, group_size=8)
    config.grpo.algorithm.beta = 0.04
    config.grpo.rewards = {'gsm8k_answer': 1.0}
    config.grpo.optimizer.update(learning_rate=2e-5, warmup_steps=10)
    config.eval.update(
        every=115, batch_size=128, correct='gsm8k_answer', extract='extract_answer', samples=0
    )
    return config
