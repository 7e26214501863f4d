r"""Mathematics with a Python tool: Qwen3-4B learns to compute in a sandbox, over several turns.

    export GRPO_JAX_DATA_DIR=data
    python -m grpo_jax.train --config=configs/qwen3_4b_python_tool.py --workdir=runs/python_tool

The chat template shows the tool `python` to the model, which calls it by `<tool_call>`; what the
program prints comes back as the reply of the tool. Trains on `data/math/train.jsonl` with reward 1
for a right final answer in `\boxed{}`, as ReTool does (arXiv 2504.11536), whose 32B model reaches
67 % on AIME 2024 in 400 steps, and 40 % in 1,080 steps without the tool. Needs bubblewrap on every
host. For 8 accelerators of 80 GB, since an episode may have 8,192 tokens. Expect
`environment/calls` to rise first, and `rewards/math_answer/mean` with it. Run with a tiny Qwen3 in
place of the 4B (tests/test_chat_with_tools.py); the weights were not available.
"""

from ml_collections import ConfigDict

from grpo_jax.run import config as grpo_config


def get_config() -> ConfigDict:
    config = grpo_config.defaults()
    config.pretrained = 'Qwen/Qwen3-4B'
    config.model.dtype = 'bfloat16'
    config.mesh.fsdp = -1
    config.data.update(
        name='math',
        prompt='{question}\n\nCompute with the tool python where it helps. Put the final answer '
        'into \\boxed{{}}.',
        chat=True,
        chat_template_kwargs={'enable_thinking': False},
        heldout_split='test500',
        prompt_length=1024,
        completion_length=8192,
    )
    config.environment.update(
        name='python', options={'seconds': 5.0}, turns=8, reply_tokens=512, reply_seconds=60.0
    )
    config.grpo.update(steps=400, batch_size=32, group_size=16)
    config.grpo.algorithm.beta = 0.0
    config.grpo.algorithm.clip_high = 0.28
    config.grpo.rewards = {'math_answer': 1.0}
    config.grpo.optimizer.update(learning_rate=1e-6, warmup_steps=10)
    config.eval.update(
        every=50, batch_size=64, correct='math_answer', extract='extract_math', samples=0
    )
    return config
