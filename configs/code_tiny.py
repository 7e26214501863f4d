"""Tiny programs, learned from unit tests that run in a sandbox, on two cores in five minutes.

    python -m grpo_jax.train --config=configs/code_tiny.py --workdir=runs/code_tiny

Needs bubblewrap (`apt-get install bubblewrap`). A question such as `add 3, times 4:` asks for the
expression after `def f(x): return `. Stage 1 imitates demonstrations, 60 % of which forget the
parentheses (`x+3*4`); stage 2 is GRPO with reward 1 for programs that pass their tests. Expect a
held-out accuracy of about 5 % after stage 1, which decodes the more frequent mistake, a reward of
0.4 to 0.6 in the first steps of stage 2, and an accuracy above 95 % after 20 of them.
"""

import random
from typing import Any

from ml_collections import ConfigDict

from grpo_jax.run import config as grpo_config

_STEPS = {'add': '+', 'subtract': '-', 'times': '*'}


def problems(split: str, size: int = 4000, heldout: int = 100) -> list[dict[str, Any]] | None:
    """Two or three steps of arithmetic on x, with demonstrations and tests."""
    if split not in ('train', 'test'):
        return None
    rng = random.Random(0)
    rows: dict[str, dict[str, Any]] = {}
    while len(rows) < size + heldout:
        steps = [(rng.choice(list(_STEPS)), rng.randint(1, 9)) for _ in range(rng.randint(1, 2))]
        steps.append(('times', rng.randint(2, 9)))
        row = _problem(steps, rng.random() < 0.6)
        rows.setdefault(row['question'], row)
    return list(rows.values())[heldout:] if split == 'train' else list(rows.values())[:heldout]


def _problem(steps: list[tuple[str, int]], careless: bool) -> dict[str, Any]:
    question = ', '.join(f'{name} {number}' for name, number in steps) + ':'
    right = wrong = 'x'
    for name, number in steps:
        product = name == 'times' and not right.isalnum()
        right = f'({right})*{number}' if product else f'{right}{_STEPS[name]}{number}'
        wrong = f'{wrong}{_STEPS[name]}{number}'
    values = [(x, eval(right, {'x': x})) for x in (-3, 0, 2, 11)]
    return {
        'question': question,
        'demonstration': wrong if careless else right,
        'prefix': 'def f(x): return ',
        'entry_point': 'f',
        'test': ''.join(f'assert f({x}) == {value}\n' for x, value in values),
    }


def get_config() -> ConfigDict:
    config = grpo_config.defaults()
    config.model.update(width=64, layers=2, heads=4, kv_heads=4, head_dim=16, mlp_width=192)
    config.model.remat = False
    config.data.name = './code_tiny.py:problems'
    config.data.update(prompt_length=40, completion_length=20)
    config.sft.update(steps=300, batch_size=32)
    config.sft.optimizer.update(learning_rate=3e-3, warmup_steps=30, hold_steps=180, decay='linear')
    config.grpo.update(steps=40, batch_size=16, group_size=8)
    config.grpo.algorithm.beta = 0.005
    config.grpo.rewards = {'code_tests': {'weight': 1.0, 'seconds': 5.0}}
    config.grpo.optimizer.update(learning_rate=3e-4, warmup_steps=10)
    config.eval.update(every=20, batch_size=100, correct='code_tests', samples=0)
    config.checkpoint.update(every=100)
    return config
