"""Rewards: functions from texts to numbers, their lookup by name, and their weighted sum.

A reward function is `reward(prompts, completions, **columns) -> list[float | None]`: one number for
each completion, or None where it does not apply. `columns` are the columns of the data set and
`completion_ids`, the tokens of the completions. Parameters after a `*` are options for the config.

`builtin` has the functions that come with the package, `verify` extracts and compares answers,
`registry` finds functions by name, and `scoring` calls them.
"""

from grpo_jax.rewards.builtin.arithmetic import (
    Step,
    arithmetic_steps,
    check_steps,
    exact_answer,
    final_result,
)
from grpo_jax.rewards.builtin.code import code_io, code_tests, extract_code, same_output
from grpo_jax.rewards.builtin.countdown import countdown_answer
from grpo_jax.rewards.builtin.format import chain_format, hash_format, tag_count, think_format
from grpo_jax.rewards.builtin.language import language_mix
from grpo_jax.rewards.builtin.length import repetition, soft_overlong
from grpo_jax.rewards.builtin.math import cmath_answer, gsm8k_answer, math_answer
from grpo_jax.rewards.builtin.remote import llm_judge, remote
from grpo_jax.rewards.builtin.steps import right_steps, separated_steps
from grpo_jax.rewards.call_options import (
    CallOptions,
    Failures,
    call_options,
    check_failures,
    join_failures,
)
from grpo_jax.rewards.calls import RewardError, RewardFunction, check_arguments, extract_answers
from grpo_jax.rewards.checks import StepReward
from grpo_jax.rewards.logs import Logs, TrainerState, join_logs
from grpo_jax.rewards.references import check_references
from grpo_jax.rewards.registry import build, build_steps, extractor, name_in, resolve
from grpo_jax.rewards.scoring import Scores, score, score_steps, statistics
from grpo_jax.rewards.verify.answers import DATASETS, Grades, grade_answers
from grpo_jax.rewards.verify.equivalence import equivalence_classes, equivalent
from grpo_jax.rewards.verify.extraction import extract_answer, extract_chinese, extract_math
from grpo_jax.rewards.verify.numbers import normalize_number

__all__ = [
    'DATASETS',
    'CallOptions',
    'Failures',
    'Grades',
    'Logs',
    'RewardError',
    'RewardFunction',
    'Scores',
    'Step',
    'StepReward',
    'TrainerState',
    'arithmetic_steps',
    'build',
    'build_steps',
    'call_options',
    'chain_format',
    'check_arguments',
    'check_failures',
    'check_references',
    'check_steps',
    'cmath_answer',
    'code_io',
    'code_tests',
    'countdown_answer',
    'equivalence_classes',
    'equivalent',
    'exact_answer',
    'extract_answer',
    'extract_answers',
    'extract_chinese',
    'extract_code',
    'extract_math',
    'extractor',
    'final_result',
    'grade_answers',
    'gsm8k_answer',
    'hash_format',
    'join_failures',
    'join_logs',
    'language_mix',
    'llm_judge',
    'math_answer',
    'name_in',
    'normalize_number',
    'remote',
    'repetition',
    'resolve',
    'right_steps',
    'same_output',
    'score',
    'score_steps',
    'separated_steps',
    'soft_overlong',
    'statistics',
    'tag_count',
    'think_format',
]
