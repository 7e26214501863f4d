"""The paper's run: GRPO of DeepSeekMath-Instruct 7B with its hyperparameters (arXiv 2402.03300).

    export GRPO_JAX_DATA_DIR=data
    python -m grpo_jax.train --config=configs/math_deepseekmath_7b.py --workdir=runs/deepseekmath

G = 64, a batch of 1,024 completions, learning rate 1e-6, beta 0.04, 1,024 tokens, one update per
rollout (section 4.2). For 8 or 16 accelerators of 80 GB. `pretrained` is a local folder, because
the weights on the hub are pickled: convert them once with `transformers`, as the error message
says.

The paper reports 46.8 -> 51.7 % on MATH and 82.9 -> 88.2 % on GSM8K with a neural reward model and
144 thousand questions of both; this config uses rule-based rewards and the questions of
`math/train.jsonl`. Not run here, because the weights were not available.
"""

from ml_collections import ConfigDict

from grpo_jax.run import config as grpo_config


def get_config() -> ConfigDict:
    config = grpo_config.defaults()
    config.pretrained = '../deepseek-math-7b-instruct'  # relative to the folder of this file
    config.model.dtype = 'bfloat16'
    config.mesh.fsdp = -1
    config.data.update(
        name='math',
        prompt='deepseekmath',
        heldout_split='test500',
        prompt_length=512,
        completion_length=1024,
    )
    config.grpo.update(steps=500, batch_size=16, group_size=64)
    config.grpo.algorithm.update(beta=0.04, clip_low=0.2, clip_high=0.2)
    config.grpo.rewards = {'math_answer': 1.0}
    config.grpo.optimizer.update(learning_rate=1e-6)
    config.eval.update(
        every=100, batch_size=64, correct='math_answer', extract='extract_math',
        samples=64, k=(1, 8, 64), temperature=0.7,
    )  # fmt: skip
    return config
