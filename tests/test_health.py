"""Runs whose numbers go wrong: when they stop, what is saved, and what is written."""

import json

import numpy as np
import pytest
import test_progress
from test_progress import _no_type_checks, events, short  # noqa: F401

from grpo_jax.run import health, report
from grpo_jax.run.config_checks import check_values
from grpo_jax.run.defaults import defaults
from grpo_jax.run.health import Health, UnhealthyError, Watch

NAN = float('nan')
OFF = {'skipped_updates': 0, 'grad_norm': 0.0, 'history': 4}


def found(norms, skipped=None, updates=1, name='grad_norm', **options):
    """The step at which a watch finds something, and its text; None: at none."""
    watch = Watch(updates, **OFF | options)
    for k, norm in enumerate(norms):
        count = skipped[k] if skipped else 0
        if finding := watch.add({name: norm, 'skipped_updates': count, 'loss': NAN}):
            assert finding.poisoned == ('median' in finding.text)
            return k, finding.text
    return None


@pytest.mark.parametrize(
    ('norms', 'step'),
    [
        ([2, 1, 3, 2, 20.1], 4),  # the median of four is 2
        ([2, 1, 3, 2, 20], None),
        ([2, 1, 2, 1000], None),  # three steps are no history yet
        ([2, 1, 3, 2, 0, 3, 2, 1, 100], 8),
        ([0, 0, 0, 2, 100, 2, 1000], 6),  # not 100: half of the four steps need a gradient
        ([0, 0, 0, 0, 0, 1e9], None),  # the first groups with different rewards
        ([2, 2, 2, 2, 19, 19, 19, 190, 200], 8),  # a history moves along
        ([2, 2, 2, 2, NAN, 2, 30], 6),  # a skipped update has no part in it
    ],
)
def test_a_gradient_norm_far_outside_of_its_history(norms, step):
    result = found(norms, grad_norm=10.0)
    assert (result and result[0]) == step
    assert found(norms) is None  # switched off


def test_the_message_of_a_norm():
    _, text = found([2, 1, 3, 2, 50.0], grad_norm=10.0, name='critic/grad_norm')
    assert text == (
        'critic/grad_norm=50 is 25 times 2, the median of the 4 steps before it '
        '(health.grad_norm=10)'
    )


@pytest.mark.parametrize(
    ('skipped', 'updates', 'step'),
    [
        ([0, 1, 2, 3], 1, 3),
        ([1, 2, 2, 3, 4, 4], 1, None),  # two in a row at most
        ([2, 4], 2, 1),
        ([1, 2, 3, 4], 2, None),  # one of two updates in each step
        ([0, 2, 3, 5, 7], 2, 4),
    ],
)
def test_skipped_updates_in_a_row(skipped, updates, step):
    result = found([NAN] * len(skipped), skipped, updates, skipped_updates=3)
    assert (result and result[0]) == step


def test_a_history_from_records_is_that_of_an_unbroken_run():
    norms = [*np.random.default_rng(0).lognormal(size=40), 1e3]
    rows = [{'grad_norm': x, 'skipped_updates': 0} for x in norms]
    whole = Watch(1, **OFF | {'grad_norm': 30.0})
    answers = [whole.add(row) for row in rows]
    for start in (1, 17, 38):
        resumed = Watch(1, **OFF | {'grad_norm': 30.0}, earlier=rows[max(start - 5, 0) : start])
        assert [resumed.add(row) for row in rows[start:]] == answers[start:]
    assert answers[-1] is not None


@pytest.fixture
def batches(monkeypatch):
    """The stubs' rollouts are lists, of which nothing was recorded."""
    monkeypatch.setattr(health, 'without_records', lambda rollout: rollout)


@pytest.mark.parametrize('ahead', [False, True])
@pytest.mark.usefixtures('batches')
def test_skipped_updates_stop_a_run_that_is_saved(events, tmp_path, ahead):  # noqa: F811
    with pytest.raises(UnhealthyError, match=r'^grpo step 2: the last 4 updates were skipped') as e:
        test_progress.run(
            events, tmp_path, skipped=(0, 2, 4, 6, 8), health={'skipped_updates': 4}, ahead=ahead,
            stale=ahead,
        )  # fmt: skip
    step = int(short(events).rpartition('save')[2])
    assert step == (4 if ahead else 3)  # sampled ahead, metrics arrive a step late
    assert len(report.read(tmp_path / 'metrics.jsonl', 'grpo')) == step  # none is missing
    with np.load(tmp_path / 'stopped' / 'grpo-2.npz') as arrays:
        assert arrays['rollout/0'] == 'samples 2'
        assert json.loads(str(arrays['metrics']))['skipped_updates'] == 4
    text = str(e.value)
    assert '\n' not in text
    assert f'--workdir={tmp_path} --stage=grpo --step=2 ' in text
    assert 'The state is saved, and the same command goes on with the next step' in text


@pytest.mark.parametrize('every', [2, 5])
@pytest.mark.usefixtures('batches')
def test_nothing_is_saved_of_a_sudden_gradient(events, tmp_path, every, monkeypatch):  # noqa: F811
    """The newest checkpoint is one before it, although later steps were dispatched."""
    norms = iter([1.0, 2.0, 2.0, 300.0, 2.0])
    add = Health.keep

    def keep(self, step, batch):
        add(self, step, batch)
        batch.metrics['grad_norm'] = next(norms)

    monkeypatch.setattr(Health, 'keep', keep)
    text = 'grad_norm=300 is 150 times 2, the median of the 3 steps'
    with pytest.raises(UnhealthyError, match=text) as error:
        test_progress.run(events, tmp_path, every=every, health={'grad_norm': 100.0, 'history': 3})
    saved = [event[1] for event in events if event[0] == 'save']
    assert saved == ([2] if every == 2 else [])
    assert (tmp_path / 'stopped' / 'grpo-3.npz').is_file()
    assert '--override --config.health.grad_norm=0' in str(error.value)


@pytest.mark.usefixtures('batches')
def test_a_resumed_run_goes_on_with_the_history_of_its_records(events, tmp_path):  # noqa: F811
    (tmp_path / 'metrics.jsonl').write_text(
        ''.join(
            json.dumps({'stage': 'grpo', 'step': k, 'skipped_updates': 2 * k, 'grad_norm': None})
            + '\n'
            for k in range(4)
        )
    )
    with pytest.raises(UnhealthyError, match=r'^grpo step 3: the last 6 updates were skipped'):
        test_progress.run(
            events, tmp_path, start=3, skipped=(0, 0, 0, 6, 8), health={'skipped_updates': 5}
        )


def test_limits_are_checked_before_training():
    config = defaults()
    check_values(config)
    config.health.update(grad_norm=NAN, skipped_updates=-1, history=0)
    with pytest.raises(ValueError, match=r'health\.skipped_updates=-1 is out of range') as error:
        check_values(config)
    assert all(f'health.{name}=' in str(error.value) for name in config.health)
