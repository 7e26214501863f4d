"""The order in which steps are sampled, graded, dispatched and fetched, with stubs only."""

import logging
import signal
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import runs
import typechecking
from tqdm import tqdm

from grpo_jax.algorithm.config import Algorithm
from grpo_jax.run import checkpoint, compiled, progress, report
from grpo_jax.run.rollouts import CollectedBatch, Position
from grpo_jax.run.stage_loop import Snapshot, StageLoop
from grpo_jax.run.stages import Stage
from grpo_jax.types import TrainState

STEPS = 5


class Value:
    """A number on a device that reports when it is fetched."""

    def __init__(self, value, fetched=lambda: None):
        self.value, self.fetched = value, fetched

    def __array__(self, *args, **options):
        self.fetched()
        return np.float32(self.value)


class Manager:
    """Keeps nothing but the number of the last save."""

    def __init__(self):
        self.last = None

    def latest_step(self):
        return self.last

    def wait_until_finished(self):
        pass


@pytest.fixture(autouse=True)
def _no_type_checks():
    """The stubs have none of the types."""
    with typechecking.off():
        yield


@pytest.fixture
def events(monkeypatch):
    """What happens, in order."""
    found = []

    def save(manager, step, state, sampled=None, position=None):
        assert position == Position(step, 10 * step).to_json()
        found.append(('save', step, int(state.step), sampled))
        manager.last = step

    monkeypatch.setattr(checkpoint, 'save', save)
    return found


def run(events, workdir, *, every=STEPS, start=0, sampled=None, skipped=(0,) * STEPS, **options):
    """Steps of a stage whose state and policy are the number of updates."""
    fail, during = options.pop('fail', {}), options.pop('during', {})
    params, best = options.pop('params', None), options.pop('best', '')
    health = {'skipped_updates': 0, 'grad_norm': 0.0, 'history': 3} | options.pop('health', {})

    def happens(*event):
        events.append(event)
        if event in fail:
            raise fail.pop(event)

    def sample(position, policy, initial):
        happens('sample', position.step, f'policy {policy}')
        return [f'samples {position.step}']

    def collect(position, sampled, policy, initial):
        step = position.step
        assert sampled == [f'samples {step}']
        happens('grade', step)
        times = {'timing/sample': 1e-9, 'timing/reward': 1e-9}
        following = Position(step + 1, position.next_batch + 10)
        return CollectedBatch(sampled, None, times, [{'of': step}], following)

    def step(state, initial, batch):
        k = int(state.step)
        assert batch.rollout == [f'samples {k}']
        during.get(('update', k), lambda state: None)(state)
        happens('update', k)
        metrics = {
            'step_tokens': Value(7, lambda: happens('fetch', k)),
            'skipped_updates': Value(skipped[k]),
        }
        return state._replace(step=k + 1), metrics

    def heldout(policy, initial):
        happens('evaluate', policy)
        return SimpleNamespace(_asdict=dict, metrics={})

    stage = Stage(
        name='grpo', steps=STEPS, updates=2, schedule=lambda count: 10.0 * count, start=None,
        step=step, sample=sample, collect=collect, policy=lambda state, initial: int(state.step),
        finish=None, heldout=heldout if 'eval_every' in options else None, **options,
    )  # fmt: skip
    config = SimpleNamespace(checkpoint=SimpleNamespace(every=every, folder=''), health=health)
    setup = SimpleNamespace(config=config, workdir=workdir, environment=None)
    state = TrainState(start, params, None, skipped=0)
    snapshot = Snapshot(state, Position(start, 10 * start), sampled)
    return StageLoop(setup, stage, Manager(), None, snapshot, best=best).run()


def short(events):
    return ' '.join(f'{event[0]}{event[1]}' for event in events)


def steps_of(path):
    return [row['step'] for row in runs.lines(path)]


def test_metrics_are_fetched_while_the_next_step_is_sampled(events, tmp_path):
    run(events, tmp_path)
    assert short(events) == (
        'sample0 grade0 update0 sample1 fetch0 grade1 update1 sample2 fetch1 grade2 update2 '
        'sample3 fetch2 grade3 update3 sample4 fetch3 grade4 update4 fetch4 save5'
    )
    policies = [event[2] for event in events if event[0] == 'sample']
    assert policies == [f'policy {k}' for k in range(STEPS)]


def test_ahead_the_next_step_is_sampled_before_the_update(events, tmp_path):
    run(events, tmp_path, ahead=True)
    assert short(events) == (
        'sample0 grade0 sample1 update0 grade1 sample2 update1 fetch0 grade2 sample3 update2 '
        'fetch1 grade3 sample4 update3 fetch2 grade4 update4 fetch3 fetch4 save5'
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
        assert row['step_tokens'] == 7
        assert row['perf/tokens_per_second'] == 7 / row['step_time']
        assert row['timing/update'] == row['step_time'] - 2e-9
    assert [row['of'] for row in runs.lines(tmp_path / 'completions.jsonl')] == list(range(STEPS))
    assert [event[1] for event in events if event[0] == 'save'] == [2, 4, 5]
    for place, event in enumerate(events):
        if event[0] in ('save', 'evaluate'):  # all rows of before are there
            updates = [e[1] for e in events[:place] if e[0] == 'update']
            assert updates == [e[1] for e in events[:place] if e[0] == 'fetch']


def test_checkpoints_hold_samples_of_an_older_policy(events, tmp_path):
    run(events, tmp_path, ahead=True, stale=True, every=2)
    saved = [event for event in events if event[0] == 'save']
    assert saved == [
        ('save', 2, 2, 'samples 2'),
        ('save', 4, 4, 'samples 4'),
        ('save', 5, 5, None),
    ]
    events.clear()
    run(events, tmp_path, ahead=True, every=2)  # batches depend on no policy
    assert [event[3] for event in events if event[0] == 'save'] == [None] * 3


def test_a_stage_goes_on_with_what_was_sampled(events, tmp_path):
    run(events, tmp_path, ahead=True, stale=True, start=2, sampled=['samples 2'])
    assert short(events[:3]) == 'grade2 sample3 update2'


# An error or an interrupt saves the newest state


@pytest.mark.parametrize(
    ('ahead', 'event', 'saved'),
    [
        (False, ('grade', 3), ('save', 3, 3, None)),
        (False, ('sample', 2, 'policy 2'), ('save', 2, 2, None)),
        (False, ('update', 3), ('save', 3, 3, None)),
        (False, ('fetch', 2), ('save', 3, 3, None)),  # while waiting for an update
        (False, ('evaluate', 3), ('save', 3, 3, None)),
        (True, ('grade', 3), ('save', 3, 3, 'samples 3')),
        (True, ('sample', 3, 'policy 2'), ('save', 2, 2, 'samples 2')),
        (True, ('update', 3), ('save', 3, 3, 'samples 3')),
        (True, ('fetch', 2), ('save', 4, 4, 'samples 4')),  # after the dispatch of the next one
        (True, ('evaluate', 3), ('save', 3, 3, 'samples 3')),
    ],
)
@pytest.mark.parametrize('kind', [KeyboardInterrupt, OSError])
def test_the_newest_state_is_saved(events, tmp_path, ahead, event, saved, kind):
    options = {'eval_every': 3} if event[0] == 'evaluate' else {}
    with pytest.raises(kind):
        run(events, tmp_path, ahead=ahead, stale=ahead, fail={event: kind}, **options)
    assert [e for e in events if e[0] == 'save'] == [saved]
    finished = list(range(saved[1]))
    assert steps_of(tmp_path / 'metrics.jsonl') == finished
    assert steps_of(tmp_path / 'completions.jsonl') == finished


@pytest.mark.parametrize('name', ['metrics', 'completions', 'heldout'])
def test_an_interrupt_in_the_middle_of_writing(events, tmp_path, monkeypatch, name):
    """Rows that were written in part are replaced, and held-out answers are kept."""
    write, failures = getattr(report.Records, name), [KeyboardInterrupt]

    def interrupted(records, step, value):
        if step == 3 and failures:
            if name == 'heldout':
                records.files[name].write('{"stage": "grpo", "st')
            else:
                write(records, step, value)
            raise failures.pop()
        write(records, step, value)

    monkeypatch.setattr(report.Records, name, interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(events, tmp_path, eval_every=3)
    step = 3 if name == 'heldout' else 4
    assert [e[:3] for e in events if e[0] == 'save'] == [('save', step, step)]
    assert steps_of(tmp_path / 'metrics.jsonl') == list(range(step))
    assert steps_of(tmp_path / 'completions.jsonl') == list(range(step))
    report.Records(tmp_path, 'grpo', step).close()  # a resumed run
    assert steps_of(tmp_path / 'heldout.jsonl') == ([0, 3] if step == 4 else [0])


def test_an_interrupt_while_saving(events, tmp_path, monkeypatch):
    save, failures = checkpoint.save, [KeyboardInterrupt]

    def interrupted(manager, step, *rest):
        if step == 4 and failures:
            raise failures.pop()
        save(manager, step, *rest)

    monkeypatch.setattr(checkpoint, 'save', interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(events, tmp_path, every=2)
    assert [e[:3] for e in events if e[0] == 'save'] == [('save', 2, 2), ('save', 4, 4)]


def test_the_best_by_an_evaluation_is_evaluated_before_it_is_saved(events, tmp_path, monkeypatch):
    """Once; other runs are evaluated after it, while the checkpoint is written."""
    found, save = [], checkpoint.save

    def with_metrics(*arguments):
        found.append(arguments[5])
        save(*arguments[:5])

    monkeypatch.setattr(checkpoint, 'save', with_metrics)
    run(events, tmp_path, eval_every=2, every=2, best='eval/a')
    order = [e[:2] for e in events if e[0] in ('evaluate', 'save')]
    assert order == [
        ('evaluate', 0), ('evaluate', 2), ('save', 2), ('evaluate', 4), ('save', 4),
        ('evaluate', 5), ('save', 5),
    ]  # fmt: skip
    assert all('step_tokens' in metrics for metrics in found)


@pytest.mark.usefixtures('interruptible')
@pytest.mark.parametrize('step', [0, 2])
def test_ctrl_c_during_an_update_comes_after_it(events, tmp_path, step):
    """The old state is gone then; before the first update there is nothing to lose."""
    finished = []

    def interrupt(state):
        signal.raise_signal(signal.SIGINT)
        finished.append(True)

    with pytest.raises(KeyboardInterrupt):
        run(events, tmp_path, during={('update', step): interrupt})
    assert finished == ([True] if step else [])
    assert [e[:3] for e in events if e[0] == 'save'] == ([('save', 3, 3)] if step else [])
    assert steps_of(tmp_path / 'metrics.jsonl') == ([0, 1, 2] if step else [])
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_state_whose_memory_is_gone_is_not_saved(events, tmp_path, caplog):
    def donate(state):
        state.params.delete()

    with pytest.raises(OSError, match='gone'), caplog.at_level(logging.WARNING):
        run(
            events, tmp_path, params=jnp.ones(2), during={('update', 2): donate},
            fail={('update', 2): OSError('gone')},
        )  # fmt: skip
    assert not [e for e in events if e[0] == 'save']
    assert [record.message for record in caplog.records] == [
        'grpo: the state after step 2 is lost, because the update that failed had donated its '
        'buffers'
    ]


def test_the_first_error_is_what_the_user_sees(events, tmp_path, caplog):
    """A row is missing, so a checkpoint after it would leave a gap."""
    fail = {('grade', 3): ValueError('reward'), ('fetch', 2): OSError('no device')}
    with pytest.raises(ValueError, match='reward'), caplog.at_level(logging.WARNING):
        run(events, tmp_path, ahead=True, fail=fail)
    assert steps_of(tmp_path / 'metrics.jsonl') == [0, 1]
    assert not [e for e in events if e[0] == 'save']
    assert [record.message for record in caplog.records] == [
        'grpo: the state after step 3 was not saved: OSError: no device'
    ]


def test_rows_that_cannot_be_written_are_not_saved_over(events, tmp_path, monkeypatch):
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


def test_skipped_updates_are_reported_and_do_not_count(events, tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        run(events, tmp_path, skipped=(0, 1, 1, 3, 3))
    assert [record.message.partition(':')[0] for record in caplog.records] == [
        'grpo step 1', 'grpo step 3',
    ]  # fmt: skip
    assert caplog.records[1].message.endswith('(3 so far)')
    rates = [row['learning_rate'] for row in runs.lines(tmp_path / 'metrics.jsonl')]
    assert rates == [10, 20, 40, 40, 60]


# Steps from which nothing is learned


def equal_groups(rows):
    watch = progress.EqualGroups('grpo')
    for step, row in enumerate(rows):
        watch.add(step, row)
    return watch


def flat(reward=0.0, **others):
    return {'frac_reward_zero_std': 1.0, 'reward': reward, 'reward_std': 0.0} | others


def test_equal_groups_for_ten_steps_are_one_warning(caplog):
    watch = equal_groups([flat() for _ in range(30)])
    assert len(watch.rows) == watch.STEPS  # a long run holds no more
    (record,) = caplog.records
    assert record.message.startswith(
        'grpo step 9: in 10 steps in a row all completions of each prompt had the same reward, so '
        'nothing is learned. Every reward was 0. Look at completions.jsonl: '
    )


def test_what_the_warning_says_of_the_rewards(caplog):
    cut = {'completions/clipped_ratio': 0.9}
    equal_groups([flat(step / 10, reward_std=0.5, **cut) for step in range(10)])
    (record,) = caplog.records
    assert (
        'learned. Rewards differ between prompts only. 90% of the completions were cut off at '
        in (record.message)
    )


def test_a_group_that_differs_starts_the_count_again(caplog):
    equal_groups([*[flat()] * 9, flat(frac_reward_zero_std=0.75), *[flat()] * 9, {'loss': 1.0}])
    assert not caplog.records


@pytest.mark.parametrize(
    ('baseline', 'watched'),
    [('mean', True), ('leave_one_out', True), ('none', False), ('greedy', False)],
)
def test_no_warning_where_equal_rewards_have_a_gradient(baseline, watched):
    algorithm = Algorithm(baseline=baseline, scale='none')
    stage = SimpleNamespace(name='grpo', schedule=None, algorithm=algorithm)
    assert (progress.Progress(stage, None, None, 0).equal_groups is not None) == watched


# Compilations


def test_compilations_are_said_and_not_estimated(capsys):
    now = [1000.0]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compiled.time, 'time', lambda: now[0])
        bar = tqdm(total=10, desc='grpo')
        bar.start_t = bar.last_print_t = now[0]
        with compiled.left_out(bar) as compilations:
            with compilations.announced('grpo: compiling the sampler'):
                now[0] += 5  # two functions are traced, the second as a part of a third one
                compilations.add('/jax/core/compile/jaxpr_trace_duration', 1.0)
                now[0] += 3
                compilations.add('/jax/core/compile/jaxpr_trace_duration', 2.0)
                now[0] += 1
                compilations.add('/jax/core/compile/jaxpr_trace_duration', 3.5)
                now[0] += 8
                compilations.add('/jax/core/compile/backend_compile_duration', 7.5)
                compilations.add('/jax/core/something_else', 50.0)
            assert (bar.start_t, bar.last_print_t) == (1012.0, 1012.0)  # 1 + 3.5 + 7.5
            compilations.add('/jax/core/compile/backend_compile_duration', 100.0)
            assert bar.start_t <= now[0]  # never in the future
    bar.close()
    said = [line for line in capsys.readouterr().err.replace('\r', '\n').splitlines()]
    assert 'grpo: compiling the sampler ...' in said
    assert 'grpo: compiling the sampler ... 12 s' in said


def test_jax_tells_how_long_compilations_take():
    bar = tqdm(total=1, disable=True)
    with compiled.left_out(bar) as compilations:
        jax.jit(lambda x: x * 2 + 17)(jnp.ones(3))
    assert compilations.seconds > 0
