"""The training command: the files of a run, and every way to interrupt it."""

import json
import logging
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys

import jax
import numpy as np
import pytest
import runs

from configs import arithmetic, gsm8k_tiny
from grpo_jax import data, evaluate, rewards
from grpo_jax.run import hosts, report, saved_config

ROOT = pathlib.Path(__file__).parents[1]

SFT_METRICS = {
    'loss', 'grad_norm', 'num_tokens', 'step_tokens', 'skipped_updates', 'learning_rate',
}  # fmt: skip
GRPO_METRICS = SFT_METRICS | {
    'accuracy',
    'reward',
    'reward_std',
    'reward_std_in_group',
    'rewards/runs:lucky/mean',
    'rewards/runs:lucky/std',
    'rewards/runs:bonus/mean',
    'rewards/runs:bonus/std',
    'rewards/chain_format/mean',
    'rewards/chain_format/std',
    'frac_reward_zero_std',
    'completions/mean_length',
    'completions/min_length',
    'completions/max_length',
    'completions/mean_terminated_length',
    'completions/min_terminated_length',
    'completions/max_terminated_length',
    'completions/clipped_ratio',
    'kl',
    'entropy',
    'clip_ratio/low_mean',
    'clip_ratio/low_min',
    'clip_ratio/high_mean',
    'clip_ratio/high_max',
    'clip_ratio/region_mean',
    'sampling/sampling_logp_difference/mean',
    'sampling/sampling_logp_difference/max',
    'sampling/importance_sampling_ratio/min',
    'sampling/importance_sampling_ratio/mean',
    'sampling/importance_sampling_ratio/max',
}
SFT_TIMES = {'step_time', 'timing/update', 'perf/tokens_per_second'}
GRPO_TIMES = SFT_TIMES | {'timing/sample', 'timing/reward'}


LETHAL = """
import itertools, os, pathlib, signal, time

import runs
from runs import get_config

calls, bonus = itertools.count(), runs.bonus


def lethal(**columns):
    if next(calls) == 5:
        while not pathlib.Path({saved!r}).exists():
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGKILL)
    return bonus(**columns)


runs.bonus = lethal
"""


# The files of a run


def test_metrics_have_their_standard_names(finished):
    rows = runs.lines(finished / 'metrics.jsonl')
    assert [(row['stage'], row['step']) for row in rows] == [
        *(('sft', k) for k in range(5)),
        *(('grpo', k) for k in range(8)),
    ]
    for stage in ('sft', 'grpo'):
        tokens = [row['num_tokens'] for row in rows if row['stage'] == stage]
        assert 0 < 2 * tokens[0] < 3 * tokens[1] < 3 * tokens[-1]  # adds up, from 0 in each stage
    names = {'sft': SFT_METRICS | SFT_TIMES, 'grpo': GRPO_METRICS | GRPO_TIMES}
    for row in rows:
        assert row.keys() == {'stage', 'step'} | names[row['stage']]
        assert all(row[name] is not None for name in row)
    tests = runs.lines(finished / 'heldout.jsonl')
    assert [row['step'] for row in tests] == [0, 4, 8]
    expected = {'accuracy', 'mean_length', 'clipped_ratio', 'avg@4'}
    expected |= {'pass@1', 'pass@4', 'maj@1', 'maj@4'}
    assert all(row['metrics'].keys() == {f'eval/{name}' for name in expected} for row in tests)


def test_metrics_agree_with_the_completions(finished):
    completions = runs.lines(finished / 'completions.jsonl')
    for metrics in report.read(finished / 'metrics.jsonl', 'grpo'):
        rows = [row for row in completions if row['step'] == metrics['step']]
        assert len(rows) == 16
        parts = {name: [row['rewards'][name] for row in rows] for name in rows[0]['rewards']}
        texts = {
            'prompts': [row['prompt'] for row in rows],
            'completions': [row['completion'] for row in rows],
        }
        assert parts == {
            'runs:lucky': runs.lucky(**texts),
            'runs:bonus': runs.bonus(**texts),
            'chain_format': rewards.chain_format(**texts),
        }
        total = [row['reward'] for row in rows]
        by_hand = np.array(parts['runs:lucky']) + parts['runs:bonus']
        by_hand += 0.5 * np.array(parts['chain_format'])
        np.testing.assert_allclose(total, by_hand, rtol=1e-6)
        groups = np.reshape(total, (4, 4))
        assert metrics['reward'] == pytest.approx(np.mean(groups), rel=1e-5)
        assert metrics['reward_std'] == pytest.approx(np.std(groups, ddof=1), rel=1e-5)
        in_group = np.std(groups, axis=1).mean()
        assert metrics['reward_std_in_group'] == pytest.approx(in_group, rel=1e-5)
        assert metrics['accuracy'] == np.mean(parts['runs:lucky'])
        bonus_std = np.std(parts['runs:bonus'], ddof=1)
        assert metrics['rewards/runs:bonus/std'] == pytest.approx(bonus_std)
    prompts = [[row['prompt'] for row in completions[start : start + 4]] for start in (0, 4, 8, 12)]
    assert all(len(set(group)) == 1 for group in prompts)
    assert len({tuple(group) for group in prompts}) == 4


def test_the_policy_learns_and_is_on_policy_at_first(finished):
    rows = report.read(finished / 'metrics.jsonl', 'sft')
    assert rows[-1]['loss'] < rows[0]['loss']
    rates = [row['learning_rate'] for row in rows]
    assert rates[:3] == pytest.approx([1e-2 / 3, 2e-2 / 3, 1e-2])  # two steps of warm-up
    rows = report.read(finished / 'metrics.jsonl', 'grpo')
    assert 0 < rows[0]['kl'] < rows[-1]['kl'] / 2  # the second inner update has moved a little
    assert all(row['sampling/sampling_logp_difference/max'] < 1e-4 for row in rows)
    assert all(row['skipped_updates'] == 0 for row in rows)


def test_the_last_lines_printed(finished, tmp_path_factory):
    workdir, printed = runs.finished(tmp_path_factory.getbasetemp())
    tests = runs.lines(workdir / 'heldout.jsonl')
    before, after = (row['metrics']['eval/accuracy'] for row in (tests[0], tests[-1]))
    sft, grpo, compiled, *table, curves, last = printed.splitlines()
    assert sft.startswith('sft: microbatch=8, ')
    assert grpo.startswith('grpo: microbatch=2, ')
    assert re.fullmatch(r'compiled programs: [1-9]\d* \(\d+ from the cache\)', compiled)
    assert before != after
    assert last == f'held-out accuracy: {before:.1%} → {after:.1%}'
    assert curves == f'curves: {workdir}/reward.png'
    assert '\n'.join(table) == report.before_and_after(workdir, 8)
    assert len(table) == 2 + 8
    assert table[2].startswith(tests[0]['prompts'][0])


def test_a_finished_run_that_is_started_again_changes_nothing(tmp_path_factory):
    workdir, printed = runs.finished(tmp_path_factory.getbasetemp())
    before = {name: (workdir / name).read_bytes() for name in (*runs.FILES, 'config.json')}
    states = sorted(workdir.glob('checkpoints/*/*'))
    dates = [path.stat().st_mtime_ns for path in states]
    assert [path.name for path in states] == ['6', '8', '3', '5']
    again = runs.train(runs.get_config(), workdir)
    resumed = ['sft: resumed at step 5 of 5', 'grpo: resumed at step 8 of 8']
    *lines, compiled = again.splitlines()[:3]
    assert lines == resumed
    assert compiled.startswith('compiled programs: ')
    assert again.splitlines()[3:] == printed.splitlines()[3:]
    assert {name: (workdir / name).read_bytes() for name in before} == before
    assert sorted(workdir.glob('checkpoints/*/*')) == states
    assert [path.stat().st_mtime_ns for path in states] == dates


# Stops


def kill(folder):
    """A process that trains with the programs of the finished run, and kills itself between saves.

    Returns what has become of it.
    """
    script = folder / 'lethal.py'
    script.write_text(LETHAL.format(saved=str(folder / 'run' / 'checkpoints' / 'grpo' / '3')))
    environment = {
        'PYTHONPATH': f'{ROOT}:{ROOT}/tests',
        'JAX_NUM_CPU_DEVICES': str(jax.device_count()),
        'JAX_DISABLE_MOST_OPTIMIZATIONS': '1',
        'JAX_COMPILATION_CACHE_DIR': os.environ['GRPO_JAX_TEST_PROGRAMS'],
        'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0',
        'JAX_PERSISTENT_CACHE_ENABLE_XLA_CACHES': 'none',
    }
    return subprocess.run(
        [sys.executable, '-m', 'grpo_jax.train', f'--config={script}', f'--workdir={folder}/run'],
        env=os.environ | environment, capture_output=True, text=True, timeout=300,
    )  # fmt: skip


@pytest.mark.slow  # test_kills has a default one
def test_a_killed_run_goes_on_as_if_nothing_had_happened(finished, tmp_path):
    ended = kill(tmp_path)
    assert ended.returncode == -signal.SIGKILL, ended.stdout + ended.stderr
    rows = runs.lines(tmp_path / 'run' / 'metrics.jsonl')
    assert (rows[-1]['stage'], rows[-1]['step']) == ('grpo', 4)
    with (tmp_path / 'run' / 'metrics.jsonl').open('a') as file:
        file.write('{"stage": "grpo", "ste')  # as if the machine had gone in the middle of a line
    printed = runs.train(runs.get_config(), tmp_path / 'run')
    assert printed.startswith('sft: resumed at step 5 of 5\ngrpo: resumed at step 3 of 8\n')
    runs.assert_same_run(tmp_path / 'run', finished)


def test_a_signal_drops_the_step_and_saves_the_one_before(tmp_path, monkeypatch, finished):
    shutil.copytree(finished, tmp_path / 'run')
    shutil.rmtree(tmp_path / 'run' / 'checkpoints' / 'grpo' / '8')
    bonus, calls = runs.bonus, iter(range(9))

    def signaled(**columns):
        if next(calls) == 1:
            signal.raise_signal(signal.SIGTERM)
        return bonus(**columns)

    with monkeypatch.context() as patch:
        patch.setattr(runs, 'bonus', signaled)
        with pytest.raises(hosts.Stopped) as stopped:
            runs.train(runs.get_config(), tmp_path / 'run')
    assert str(stopped.value) == (
        f'grpo: stopped after step 7 by SIGTERM; its state is saved in {tmp_path / "run"}, and the '
        'same command goes on from there'
    )
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    assert not (tmp_path / 'run' / 'train.lock').exists()
    printed = runs.train(runs.get_config(), tmp_path / 'run')
    assert 'grpo: resumed at step 7 of 8\n' in printed
    runs.assert_same_run(tmp_path / 'run', finished)


@pytest.mark.slow
def test_a_run_that_is_stopped_again_and_again(tmp_path, monkeypatch, finished):
    """Each stop keeps what was computed, names its cause, and the next start goes on from there."""

    def start(message, kind=rewards.RewardError):
        with pytest.raises(kind) as error:
            runs.train(runs.get_config(), tmp_path)
        assert message in str(error.value)
        rows = runs.lines(tmp_path / 'metrics.jsonl')
        return rows[-1]['stage'], rows[-1]['step']

    with monkeypatch.context() as patch:
        write = report.Records.metrics

        def interrupt(records, step, values):
            if step == 4:
                raise KeyboardInterrupt('in SFT')
            write(records, step, values)

        patch.setattr(report.Records, 'metrics', interrupt)
        assert start('in SFT', KeyboardInterrupt) == ('sft', 3)
    bonus = runs.bonus

    def failing(call, failure):
        """From the given call on, counted over one start."""
        left = iter(range(call))

        def reward(**columns):
            return failure(bonus(**columns)) if next(left, None) is None else bonus(**columns)

        monkeypatch.setattr(runs, 'bonus', reward)

    failing(2, lambda values: 1 / 0)
    assert start("reward 'runs:bonus', called with prompts, completions, ") == ('grpo', 1)
    failing(0, lambda values: ['1/0'] * 16)
    assert start("reward 'runs:bonus' returned '1/0' for row 0 (prompt ") == ('grpo', 1)
    failing(2, lambda values: [0.5])
    assert start("reward 'runs:bonus' returned 1 values for 16 completions") == ('grpo', 3)
    failing(1, lambda values: [*values[:-1], float('nan')])
    assert start("reward 'runs:bonus' returned nan for row 15 (prompt ") == ('grpo', 4)
    monkeypatch.setattr(runs, 'bonus', bonus)
    printed = runs.train(runs.get_config(), tmp_path)
    assert printed.startswith('sft: resumed at step 5 of 5\ngrpo: resumed at step 5 of 8\n')
    runs.assert_same_run(tmp_path, finished)


def test_a_gradient_that_is_not_finite_is_left_out_and_reported(tmp_path, monkeypatch, caplog):
    calls = iter(range(8))
    bonus = runs.bonus

    def large(**columns):
        values = bonus(**columns)
        return [1000.0, *values[1:]] if next(calls) == 2 else values

    monkeypatch.setattr(runs, 'bonus', large)
    config = runs.get_config()
    config.grpo.algorithm.update(
        advantage_estimator='runs:infinite_above_100', baseline='mean', scale='std'
    )
    with caplog.at_level(logging.WARNING):
        runs.train(config, tmp_path)
    told = [record.message for record in caplog.records if record.name == 'grpo_jax']
    assert told == [
        'grpo step 2: the gradient was not finite, so its update was skipped (2 so far)'
    ]
    rows = report.read(tmp_path / 'metrics.jsonl', 'grpo')
    assert [row['skipped_updates'] for row in rows] == [0, 0, 2, 2, 2, 2, 2, 2]
    assert [row['step'] for row in rows if row['grad_norm'] is None] == [2]
    assert 'NaN' not in (tmp_path / 'metrics.jsonl').read_text()


def as_an_earlier_version_left_it(workdir):
    """The config in its first layout; checkpoints without checksums and positions in the data."""
    values = json.loads((workdir / 'config.json').read_text())
    del values['schema']
    grpo = values['grpo']
    objective = {'beta', 'clip_low', 'clip_high', 'top_entropy', 'gamma', 'lam', 'value_clip'}
    grpo['objective'] = {name: grpo['algorithm'].pop(name) for name in objective}
    defaults = {'rows': 0, 'packed': False, 'widths': 4, 'unroll': False, 'entropy_mask': False}
    numbers = {name: value for name, value in grpo.pop('compute').items() if value is not None}
    grpo['algorithm'] |= defaults | numbers
    del grpo['algorithm']['advantage_estimator'], grpo['optimizer']['options']
    (workdir / 'config.json').write_text(json.dumps(values))
    for path in workdir.glob('checkpoints/*/*/checksums.json'):
        path.unlink()
    positions = list(workdir.glob('checkpoints/*/*/position'))
    for path in positions:
        shutil.rmtree(path)
    return len(positions)


def test_a_run_of_an_earlier_version_is_resumed(tmp_path, finished, caplog):
    run = tmp_path / 'run'
    shutil.copytree(finished, run)
    shutil.rmtree(run / 'checkpoints' / 'grpo' / '8')
    assert as_an_earlier_version_left_it(run) == 3
    with caplog.at_level(logging.WARNING):
        printed = runs.train(runs.get_config(), run)
    assert printed.startswith(
        'sft: resumed at step 5 of 5\ngrpo: resumed at step 6 of 8\n'
        'grpo: microbatch=2, rows=0, packed=False, widths=4, unroll=False, logprob_chunk=4, '
        'remat=True\n'
    )
    told = [record.message for record in caplog.records if record.name == 'grpo_jax']
    assert told == [
        'this config was saved by an earlier version; keys added with their defaults: '
        'grpo.algorithm.advantage_estimator, grpo.optimizer.options; '
        'dropped: grpo.algorithm.entropy_mask'
    ]
    runs.assert_same_run(run, finished, except_for=['num_tokens'])  # its checkpoints lack the sum
    saved = saved_config.read(run / 'config.json')  # it has gone on with the numbers it had
    assert saved.grpo.compute.widths == 4


# Optimizers


MY_OPTIMIZERS = """
import optax


def signs(learning_rate, decay=0.0):
    return optax.chain(optax.sign_sgd(learning_rate), optax.add_decayed_weights(decay))


def nothing(learning_rate):
    return 0
"""


@pytest.mark.slow
def test_optimizers_by_their_path(tmp_path, monkeypatch, finished):
    """One of optax and one of a file; a stopped run goes on with them."""
    (tmp_path / 'my_optimizers.py').write_text(MY_OPTIMIZERS)
    monkeypatch.syspath_prepend(tmp_path)
    config = runs.get_config()
    config.grpo.optimizer.update(name='optax.contrib:muon', options={'ns_steps': 3, 'beta': 0.9})
    config.grpo.optimizer.b1 = 0.5
    with pytest.raises(ValueError, match=r'^grpo.optimizer: b1=0.5 has no effect with .*muon'):
        runs.train(config, tmp_path / 'run')
    config.grpo.optimizer.b1 = 0.9
    config.sft.optimizer.update(name='my_optimizers:nothing', options={'decay': -1e-5})
    with pytest.raises(ValueError, match=r"do not fit my_optimizers:nothing: .* 'decay'; it takes"):
        runs.train(config, tmp_path / 'run')
    config.sft.optimizer.options = {}
    message = 'my_optimizers:nothing returned int: return an optax.GradientTransformation'
    with pytest.raises(ValueError, match=message):
        runs.train(config, tmp_path / 'run')
    config.sft.optimizer.update(name='my_optimizers:signs', options={'decay': -1e-5})
    config.eval.samples = 0
    config.grpo.algorithm.update(inner_updates=1, entropy=False)
    runs.train(config, tmp_path / 'run')
    losses = [row['loss'] for row in report.read(tmp_path / 'run' / 'metrics.jsonl', 'sft')]
    others = [row['loss'] for row in report.read(finished / 'metrics.jsonl', 'sft')]
    assert losses[0] == others[0]
    assert losses[-1] < losses[0]
    assert losses[1:] != others[1:]
    rows = report.read(tmp_path / 'run' / 'metrics.jsonl', 'grpo')
    assert [row['learning_rate'] for row in rows] == pytest.approx([1e-3] * 8)
    assert [row['skipped_updates'] for row in rows] == [0] * 8
    shutil.copytree(tmp_path / 'run', tmp_path / 'again')
    shutil.rmtree(tmp_path / 'again' / 'checkpoints' / 'grpo' / '8')  # stopped after step 6
    assert 'grpo: resumed at step 6 of 8\n' in runs.train(config, tmp_path / 'again')
    runs.assert_same_run(tmp_path / 'again', tmp_path / 'run')


# The configs


def test_heldout_problems_are_not_trained_on(tmp_path):
    source = arithmetic.get_config().data
    training, heldout = (
        {row['question'] for row in rows}
        for rows in (
            data.load(source.name, split, cache_dir=tmp_path, **source.options)
            for split in (source.train_split, source.heldout_split)
        )
    )
    sizes = (source.options.train_size, source.options.test_size)
    assert (len(training), len(heldout)) == sizes == (9000, 500)
    assert training.isdisjoint(heldout)


@pytest.mark.slow
def test_gsm8k_takes_three_steps(tmp_path):
    folder = os.environ.get('GRPO_JAX_DATA_DIR', '')
    if not pathlib.Path(folder, 'gsm8k', 'train.jsonl').is_file():
        pytest.skip('GRPO_JAX_DATA_DIR names no folder with gsm8k/train.jsonl')
    config = gsm8k_tiny.get_config()
    config.model.update(width=16, heads=2, kv_heads=1, head_dim=8, mlp_width=16)
    config.data.update(train_split='train[:64]', heldout_split='test[:4]', completion_length=24)
    config.grpo.update(batch_size=4, group_size=2)
    config.grpo.algorithm.beta = 0.0  # no reference model
    config.eval.update(batch_size=4)
    config.log.completions = 8
    printed = runs.train(config, tmp_path)
    assert printed.splitlines()[-1] == 'held-out accuracy: 0.0% → 0.0%'
    rows = runs.lines(tmp_path / 'metrics.jsonl')
    assert [(row['stage'], row['step']) for row in rows] == [('grpo', k) for k in range(3)]
    assert all('kl' not in row for row in rows)
    assert all(np.isfinite(row['loss']) for row in rows)
    source = runs.lines(pathlib.Path(folder, 'gsm8k', 'train.jsonl'))
    known = {f'Question: {row["question"]}\nAnswer: ' for row in source[:64]}
    completions = runs.lines(tmp_path / 'completions.jsonl')
    assert {row['prompt'] for row in completions} <= known
    assert len({row['prompt'] for row in completions}) >= 9  # 12 draws of 64, some too long
    for row in completions:
        assert row['rewards'].keys() == {'gsm8k_answer', 'hash_format'}


# Evaluations without a function that calls answers right


def without_correct(**data):
    config = runs.get_config()
    config.sft.steps = 0
    config.grpo.steps = 2
    config.eval.update(every=2, correct='', extract='', samples=8, k=(1, 8))
    for name, value in data.items():
        config.data[name] = value
    return config


def test_the_reward_alone_is_enough(tmp_path, capsys, monkeypatch, caplog):
    config = without_correct()
    config.eval.k = (1, 4)
    printed = runs.train(config, tmp_path)
    assert [record.message for record in caplog.records if record.name == 'grpo_jax'] == [
        'only greedy answers are evaluated, and eval.k=(1, 4) has no effect: pass@k and maj@k need '
        'eval.correct'
    ]
    tests = runs.lines(tmp_path / 'heldout.jsonl')
    assert [row['step'] for row in tests] == [0, 2]
    for row in tests:
        assert row.keys() == {'stage', 'step', 'metrics', 'prompts', 'completions', 'rewards'}
        total = row['rewards']
        texts = {'prompts': row['prompts'], 'completions': row['completions']}
        by_hand = np.array(runs.lucky(**texts)) + runs.bonus(**texts)
        by_hand += 0.5 * np.array(rewards.chain_format(**texts))
        np.testing.assert_allclose(total, by_hand, rtol=1e-6)
        assert row['metrics'].keys() == {
            f'eval/{name}' for name in ('reward', 'reward_std', 'mean_length', 'clipped_ratio')
        }
        assert row['metrics']['eval/reward'] == pytest.approx(np.mean(total))
        assert row['metrics']['eval/reward_std'] == pytest.approx(np.std(total, ddof=1))
    assert 'accuracy' not in report.read(tmp_path / 'metrics.jsonl', 'grpo')[0]
    before, after = (row['metrics']['eval/reward'] for row in tests)
    assert printed.splitlines()[-1] == f'held-out reward: {before:.4g} → {after:.4g}'
    monkeypatch.setattr('sys.argv', ['evaluate', f'--workdir={tmp_path}'])
    with runs.compiled_once():
        evaluate.run()
    found = json.loads(capsys.readouterr().out)
    assert found['eval/reward'] == pytest.approx(after)
    assert found['eval/reward/low'] <= after <= found['eval/reward/high']
    assert found['eval/reward_std'] == tests[-1]['metrics']['eval/reward_std']


@pytest.mark.parametrize('files', [{}, {'heldout_split': ''}], ids=['no file', 'no split'])
def test_no_held_out_split(tmp_path, caplog, files):
    rows = [{'question': f'{i}', 'answer': '1', 'demonstration': '1'} for i in range(8)]
    (tmp_path / 'train.jsonl').write_text(''.join(json.dumps(row) + '\n' for row in rows))
    config = without_correct(name='jsonl', options={'folder': str(tmp_path)}, **files)
    printed = runs.train(config, tmp_path / 'run')
    told = [record.message for record in caplog.records if record.name == 'grpo_jax']
    split = files.get('heldout_split', 'test')
    assert len(told) == 1
    assert told[0].startswith(f'no held-out problems (data.heldout_split={split!r}): the policy is')
    assert printed.splitlines()[-1].startswith('curves: ')
    assert not (tmp_path / 'run' / 'heldout.jsonl').read_text()
    assert len(report.read(tmp_path / 'run' / 'metrics.jsonl', 'grpo')) == 2
    assert len(runs.train(config, tmp_path / 'run').splitlines()) > 1  # it is finished
    config.data.heldout_split = 'dev'  # a split that was named has to exist
    with pytest.raises(ValueError, match=r'dev\.jsonl: no such file'):
        runs.train(config, tmp_path / 'other')
