"""In which order steps are sampled, judged, dispatched and fetched, with nothing but stubs."""

import logging
from types import SimpleNamespace

import numpy as np
import pytest
import runs

from grpo_jax import checkpoint, report, train
from grpo_jax.collect import Collected
from grpo_jax.stages import Stage
from grpo_jax.types import TrainState

STEPS = 5


class Value:
    """A device's number that tells when it is fetched."""

    def __init__(self, value, fetched=lambda: None):
        self.value, self.fetched = value, fetched

    def __array__(self, *args, **options):
        self.fetched()
        return np.float32(self.value)


class Manager:
    """Keeps nothing."""

    latest_step = staticmethod(lambda: None)
    wait_until_finished = staticmethod(lambda: None)


@pytest.fixture
def events(monkeypatch):
    """What happens, in order."""
    found = []

    def save(manager, step, state, sampled=None):
        found.append(('save', step, int(state.step), sampled))

    monkeypatch.setattr(checkpoint, 'save', save)
    return found


def run(events, workdir, *, every=STEPS, start=0, sampled=None, skipped=(0,) * STEPS, **options):
    """Steps of a stage whose state and policy are the number of updates."""
    fail = options.pop('fail', {})

    def happens(*event):
        events.append(event)
        if event in fail:
            raise fail[event]

    def sample(step, policy, began):
        happens('sample', step, f'policy {policy}')
        return [f'samples {step}']

    def collect(step, sampled, policy, began):
        assert sampled == [f'samples {step}']
        happens('judge', step)
        times = {'timing/sample': 1e-9, 'timing/reward': 1e-9}
        return Collected(sampled, None, times, [{'of': step}])

    def step(state, began, collected):
        k = int(state.step)
        assert collected.rollout == [f'samples {k}']
        happens('update', k)
        metrics = {
            'num_tokens': Value(7, lambda: happens('fetch', k)),
            'skipped_updates': Value(skipped[k]),
        }
        return state._replace(step=k + 1), metrics

    def heldout(policy):
        happens('ask', policy)
        return SimpleNamespace(_asdict=dict, metrics={})

    stage = Stage(
        name='grpo', steps=STEPS, updates=2, schedule=lambda count: 10.0 * count, start=None,
        step=step, sample=sample, collect=collect, policy=lambda state, began: int(state.step),
        finish=None, heldout=heldout if 'eval_every' in options else None, **options,
    )  # fmt: skip
    config = SimpleNamespace(checkpoint=SimpleNamespace(every=every))
    made = SimpleNamespace(config=config, workdir=workdir)
    state = TrainState(start, None, None, skipped=0)
    train._steps(made, stage, Manager(), start, state, sampled, None)


def short(events):
    return ' '.join(f'{event[0]}{event[1]}' for event in events)


def steps_of(path):
    return [row['step'] for row in runs.lines(path)]


def test_metrics_are_fetched_while_the_next_step_is_sampled(events, tmp_path):
    run(events, tmp_path)
    assert short(events) == (
        'sample0 judge0 update0 sample1 fetch0 judge1 update1 sample2 fetch1 judge2 update2 '
        'sample3 fetch2 judge3 update3 sample4 fetch3 judge4 update4 fetch4 save5'
    )
    policies = [event[2] for event in events if event[0] == 'sample']
    assert policies == [f'policy {k}' for k in range(STEPS)]


def test_ahead_the_next_step_is_sampled_before_the_update(events, tmp_path):
    run(events, tmp_path, ahead=True)
    assert short(events) == (
        'sample0 judge0 sample1 update0 judge1 sample2 update1 fetch0 judge2 sample3 update2 '
        'fetch1 judge3 sample4 update3 fetch2 judge4 update4 fetch3 fetch4 save5'
    )
    policies = [event[2] for event in events if event[0] == 'sample']
    assert policies == ['policy 0', *(f'policy {k}' for k in range(STEPS - 1))]


@pytest.mark.parametrize('ahead', [False, True])
def test_rows_are_those_of_every_step_in_order(events, tmp_path, ahead):
    run(events, tmp_path, ahead=ahead, every=2, eval_every=3)
    rows = runs.lines(tmp_path / 'metrics.jsonl')
    assert [row['step'] for row in rows] == list(range(STEPS))
    assert [row['learning_rate'] for row in rows] == [10, 30, 50, 70, 90]  # of the last of two
    for row in rows:
        assert row['num_tokens'] == 7
        assert row['perf/tokens_per_second'] == 7 / row['step_time']
        assert row['timing/update'] == row['step_time'] - 2e-9
    assert [row['of'] for row in runs.lines(tmp_path / 'completions.jsonl')] == list(range(STEPS))
    assert [event[1] for event in events if event[0] == 'save'] == [2, 4, 5]
    for place, event in enumerate(events):
        if event[0] in ('save', 'ask'):  # all rows of before are there
            updates = [e[1] for e in events[:place] if e[0] == 'update']
            assert updates == [e[1] for e in events[:place] if e[0] == 'fetch']


def test_checkpoints_hold_samples_of_an_older_policy(events, tmp_path):
    run(events, tmp_path, ahead=True, stale=True, every=2)
    saved = [event for event in events if event[0] == 'save']
    assert saved == [
        ('save', 2, 2, ['samples 2']),
        ('save', 4, 4, ['samples 4']),
        ('save', 5, 5, None),
    ]
    events.clear()
    run(events, tmp_path, ahead=True, every=2)  # batches depend on no policy
    assert [event[3] for event in events if event[0] == 'save'] == [None] * 3


def test_a_stage_goes_on_with_what_was_sampled(events, tmp_path):
    run(events, tmp_path, ahead=True, stale=True, start=2, sampled=['samples 2'])
    assert short(events[:3]) == 'judge2 sample3 update2'


@pytest.mark.parametrize(
    ('ahead', 'event', 'saved'),
    [
        (False, ('judge', 3), [('save', 3, 3, None)]),
        (False, ('sample', 2, 'policy 2'), [('save', 2, 2, None)]),
        (False, ('update', 3), []),
        (True, ('judge', 3), [('save', 3, 3, ['samples 3'])]),
        (True, ('sample', 3, 'policy 2'), [('save', 2, 2, ['samples 2'])]),
        (True, ('update', 3), []),
    ],
)
def test_rows_of_finished_steps_outlive_a_failure(events, tmp_path, ahead, event, saved):
    with pytest.raises(KeyboardInterrupt):
        run(events, tmp_path, ahead=ahead, stale=ahead, fail={event: KeyboardInterrupt})
    finished = [e[1] for e in events if e[0] == 'update' and e != event]
    assert steps_of(tmp_path / 'metrics.jsonl') == finished
    assert steps_of(tmp_path / 'completions.jsonl') == finished
    assert [e for e in events if e[0] == 'save'] == saved


def test_a_failure_of_a_fetch_is_not_saved_over(events, tmp_path):
    """A row is missing, so a checkpoint of after it would leave a gap."""
    with pytest.raises(OSError, match='gone'):
        run(events, tmp_path, fail={('fetch', 2): OSError('gone')})
    assert steps_of(tmp_path / 'metrics.jsonl') == [0, 1]
    assert not [e for e in events if e[0] == 'save']


def test_rows_that_are_torn_are_not_saved_over(events, tmp_path, monkeypatch):
    write = report.Records.completions

    def interrupt(records, step, rows):
        if step == 2:
            raise KeyboardInterrupt
        write(records, step, rows)

    monkeypatch.setattr(report.Records, 'completions', interrupt)
    with pytest.raises(KeyboardInterrupt):
        run(events, tmp_path)
    assert steps_of(tmp_path / 'completions.jsonl') == [0, 1]
    assert not [e for e in events if e[0] == 'save']


def test_updates_left_out_are_told_and_do_not_count(events, tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        run(events, tmp_path, skipped=(0, 1, 1, 3, 3))
    assert [record.message.partition(':')[0] for record in caplog.records] == [
        'grpo step 1', 'grpo step 3',
    ]  # fmt: skip
    assert caplog.records[1].message.endswith('(3 so far)')
    rates = [row['learning_rate'] for row in runs.lines(tmp_path / 'metrics.jsonl')]
    assert rates == [10, 20, 40, 40, 60]
