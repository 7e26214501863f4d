"""Learns when to call a calculator, on two cores in about ten minutes.

    python -m grpo_jax.train --config=configs/tools_arithmetic.py --workdir=runs/tools_arithmetic
    python -m grpo_jax.show --workdir=runs/tools_arithmetic

Half of the questions are sums (`73+8=`) that the model can do in its head, and half are products
(`347*86=`) that it cannot. Stage 1 imitates right answers of both kinds, half of which call
`calculator(347*86)` first: it learns how to call, to copy the reply, and the sums, and not when to
call. Stage 2 is GRPO with reward 1 for a right answer, less 0.3 for each call. Expect a held-out
accuracy of about 87 % after stage 1, where greedy decoding calls for three quarters of the products
and half of the sums, and 97 to 99 % at the end, where it calls for all products and for almost no
sum: see benchmarks/RESULTS.md. With --config.environment.name= there is no calculator, and the
accuracy is that of the sums, 50 %.
"""

import random
from collections.abc import Callable, Sequence
from typing import Any

from ml_collections import ConfigDict

from grpo_jax.run import config as grpo_config

_CALLS = 0.5  # share of the demonstrations that call the calculator


def problems(
    split: str, size: int = 40_000, heldout: int = 200, seed: int = 0
) -> list[dict[str, Any]] | None:
    """Sums and products, in turn; the held-out questions are in no training row."""
    if split not in ('train', 'test'):
        return None
    rng = random.Random(seed)
    sums = [f'{a}+{b}' for a in range(1, 100) for b in range(1, 10)]
    rng.shuffle(sums)
    products = [f'{rng.randint(100, 999)}*{rng.randint(11, 99)}' for _ in range(size)]
    half = heldout // 2
    if split == 'test':
        questions = sums[:half] + products[:half]
    else:
        tests = {*products[:half]}
        others = [product for product in products if product not in tests]
        repeated = sums[half:] * (len(others) // (len(sums) - half) + 1)
        questions = [q for pair in zip(repeated, others, strict=False) for q in pair]
    return [_problem(question, rng) for question in questions]


def _problem(question: str, rng: random.Random) -> dict[str, Any]:
    answer = str(eval(question))
    called = f'calculator({question})\n{answer}\n{answer}'
    return {
        'question': f'{question}=',
        'answer': answer,
        'product': '*' in question,
        'demonstration': called if rng.random() < _CALLS else answer,
    }


def right(
    prompts: Sequence[str], completions: Sequence[str], answer: Sequence[str], **columns: Any
) -> list[float]:
    """1 if the last line is the answer."""
    lines = [text.rpartition('\n')[2].strip() for text in completions]
    return [float(line == value) for line, value in zip(lines, answer, strict=True)]


def calls(
    prompts: Sequence[str],
    completions: Sequence[str],
    product: Sequence[bool],
    log_metric: Callable[[str, float], None] | None = None,
    **columns: Any,
) -> list[float]:
    """The number of calls."""
    counts = [text.count('calculator(') for text in completions]
    for name, kind in (('sums', False), ('products', True)):
        called = [count > 0 for count, p in zip(counts, product, strict=True) if p == kind]
        if called and log_metric:
            log_metric(f'tools/called_for_{name}', sum(called) / len(called))
    return [float(count) for count in counts]


def get_config() -> ConfigDict:
    config = grpo_config.defaults()
    config.model.update(width=96, layers=3, heads=6, kv_heads=6, head_dim=16, mlp_width=256)
    config.model.remat = False
    config.data.name = './tools_arithmetic.py:problems'
    config.data.stops = (')',)  # a call ends a turn
    config.data.update(prompt_length=8, completion_length=40)
    config.environment.name = 'calculator'
    config.sft.update(steps=1200, batch_size=64)
    config.sft.optimizer.update(learning_rate=3e-3, warmup_steps=30, hold_steps=900, decay='linear')
    config.grpo.update(steps=100, batch_size=32, group_size=8)
    # Without a scale: divided by the deviation of a group in which all are right, the small cost of
    # a call would weigh as much as a right answer.
    config.grpo.algorithm.update(beta=0.005, scale='none')
    config.grpo.rewards = {
        'right': {'function': './tools_arithmetic.py:right', 'weight': 1.0},
        'calls': {'function': './tools_arithmetic.py:calls', 'weight': -0.3},
    }
    config.grpo.optimizer.update(learning_rate=4e-4, warmup_steps=10)
    config.eval.update(every=25, batch_size=200, correct='./tools_arithmetic.py:right', samples=0)
    config.log.completions = 16
    config.checkpoint.update(every=100)
    return config
