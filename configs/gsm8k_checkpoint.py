"""From a Hugging Face folder to a trained Hugging Face folder, on GSM8K, on two cores.

    export GRPO_JAX_DATA_DIR=data
    python benchmarks/make_checkpoint.py --output=runs/tiny
    python -m grpo_jax.train --config=configs/gsm8k_checkpoint.py --workdir=runs/gsm8k
    python -m grpo_jax.evaluate --workdir=runs/gsm8k
    python -m grpo_jax.export --workdir=runs/gsm8k --output=runs/gsm8k-trained

The checkpoint is random and small, so it learns little more than the format of an answer:
expect about 2 % after SFT and 3 % after GRPO. Pass a real one with `--config.pretrained=FOLDER`.
"""

from ml_collections import ConfigDict

from grpo_jax.run import config as grpo_config


def get_config() -> ConfigDict:
    config = grpo_config.defaults()
    config.pretrained = '../runs/tiny'  # relative to the folder of this file
    config.data.update(
        name='gsm8k',
        prompt='Question: {question}\nAnswer:',
        demonstration=' {solution}',
        prompt_length=160,
        completion_length=128,
    )
    config.sft.update(steps=200, batch_size=16)
    config.sft.optimizer.update(learning_rate=1e-3, warmup_steps=20, decay='cosine')
    config.grpo.update(steps=20, batch_size=8, group_size=8)
    config.grpo.algorithm.beta = 0.01
    config.grpo.rewards = {'gsm8k_answer': 1.0, 'hash_format': 0.2}
    config.grpo.optimizer.update(learning_rate=1e-4, warmup_steps=2)
    config.eval.update(
        every=20, batch_size=128, correct='gsm8k_answer', extract='extract_answer', samples=0
    )
    config.checkpoint.every = 100
    return config
