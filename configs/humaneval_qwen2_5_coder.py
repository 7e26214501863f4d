"""Programs with execution feedback: Qwen2.5-Coder learns from unit tests in a sandbox.

    export GRPO_JAX_DATA_DIR=data
    python -m grpo_jax.train --config=configs/humaneval_qwen2_5_coder.py --workdir=runs/humaneval

Trains on `data/mbpp/train.jsonl`, the problems 601 to 974 of MBPP, and reports pass@1 and pass@8 on
`data/mbpp/test.jsonl`; `docs/rewards-code.md` says how to evaluate on HumanEval. Needs bubblewrap
on every host. For 4 or 8 accelerators of 80 GB. The model card reports 88.4 % on HumanEval and
83.5 % on MBPP (EvalPlus) for the 7B model. Not run here, because the weights were not available.
"""

from ml_collections import ConfigDict

from grpo_jax.run import config as grpo_config


def get_config() -> ConfigDict:
    config = grpo_config.defaults()
    config.pretrained = 'Qwen/Qwen2.5-Coder-7B-Instruct'
    config.model.dtype = 'bfloat16'
    config.mesh.fsdp = -1
    config.data.update(
        name='mbpp',
        prompt='{question}\n\nWrite Python in one block. It has to pass these tests:\n\n{test}',
        chat=True,
        heldout_split='test[:256]',
        prompt_length=768,
        completion_length=1024,
    )
    config.grpo.update(steps=200, batch_size=32, group_size=16)
    config.grpo.algorithm.beta = 0.0
    config.grpo.rewards = {'code_tests': {'weight': 1.0, 'seconds': 5.0}}
    config.grpo.optimizer.update(learning_rate=1e-6, warmup_steps=10)
    config.eval.update(
        every=50, batch_size=64, correct='code_tests', samples=8, k=(1, 8), temperature=0.6
    )
    return config
