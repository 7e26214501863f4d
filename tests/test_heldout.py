"""The evaluation that a config describes."""

import runs

from grpo_jax.run import heldout, problems, setup


def test_problems_without_anything_that_grades_them(tmp_path, caplog):
    config = runs.get_config()
    config.grpo.steps, config.grpo.rewards, config.eval.correct = 0, {}, ''
    prepared = setup.prepare(config, tmp_path)
    held_out = problems.heldout_problems(prepared)
    caplog.clear()
    assert heldout.make_evaluator(prepared, None) is None
    assert not caplog.records
    assert heldout.make_evaluator(prepared, held_out) is None
    assert [record.message for record in caplog.records] == [
        'eval.correct and grpo.rewards are empty: the policy is not evaluated, although there are '
        "held-out problems (data.heldout_split='test'), and heldout.jsonl stays empty. Name a "
        'reward function in eval.correct'
    ]
