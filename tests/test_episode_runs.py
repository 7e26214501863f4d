"""Runs with an environment: records, rewards of turns, failures, a restart and a replay."""

import itertools
import shutil

import pytest
import runs

from grpo_jax.run.replay.output import replay


def get_config(name='episode_tools:echo', **changes):
    config = runs.get_config()
    config.environment.update(name=name, turns=3, reply_tokens=6, template='{reply}')
    config.data.completion_length = 32
    config.grpo.rewards = {'runs:lucky': 1.0, 'episode_tools:seen': 0.1}
    config.environment.update(changes)
    return config


@pytest.fixture(scope='module')
def workdir(tmp_path_factory):
    """A run whose tool never replies the same again."""
    workdir = tmp_path_factory.mktemp('episodes') / 'run'
    runs.train(get_config('episode_tools:counter'), workdir)
    return workdir


def test_completions_have_their_turns(workdir):
    rows = runs.lines(workdir / 'completions.jsonl')
    assert len(rows) == 8 * 16
    for row in rows:
        assert row['completion'] == '\n'.join(turn['text'] for turn in row['turns'])
        for turn in row['turns'][:-1]:
            assert turn['reply'].endswith('=') or turn['cut']
            assert turn['outcome'] == 'reply'
        assert row['turns'][-1]['reply'] is None
        assert len(row['timing/replies']) == len(row['turns']) <= 3
        assert row['rewards']['episode_tools:seen'] == len(row['turns']) - 1
    replies = [turn['reply'] for row in rows for turn in row['turns'][:-1]]
    whole = [reply for reply in replies if reply.endswith('=')]
    assert len(set(whole)) == len(whole) > 100


def test_metrics_count_turns_and_replies(workdir):
    steps = [row for row in runs.lines(workdir / 'metrics.jsonl') if row['stage'] == 'grpo']
    rows = runs.lines(workdir / 'completions.jsonl')
    for number, step in enumerate(steps):
        turns = [row['turns'] for row in rows if row['step'] == number]
        assert step['environment/turns'] == pytest.approx(sum(map(len, turns)) / 16)
        replies = [turn['reply'] for of_one in turns for turn in of_one if turn['reply']]
        assert step['environment/reply_tokens'] == pytest.approx(sum(map(len, replies)) / 16)
        assert step['timing/reply'] > 0
        cut = sum(turn.get('cut', False) for of_one in turns for turn in of_one)
        assert step.get('environment/cut', 0) == cut


def test_a_restart_and_a_replay_get_the_recorded_replies(workdir, tmp_path, capsys):
    """As after a kill in the last step: bit for bit the same, though the tool has gone on."""
    other = tmp_path / 'run'
    shutil.copytree(workdir, other)
    shutil.rmtree(other / 'checkpoints' / 'grpo' / '8')
    runs.train(get_config('episode_tools:counter'), other)
    # Replies in evaluations are not recorded.
    runs.assert_same_run(other, workdir, files=('metrics.jsonl', 'completions.jsonl'))
    assert replay(get_config('episode_tools:counter'), workdir, step='7')
    assert 'equal to the run, bit for bit: 16 completions' in capsys.readouterr().out


@pytest.mark.slow  # runs a stage from its start
def test_a_replay_without_the_recorded_replies_says_so(workdir, capsys):
    assert not replay(get_config('episode_tools:counter'), workdir, step='1')
    assert (
        'Likely because the environment replied otherwise: its replies to steps before the oldest '
        'checkpoint are not kept'
    ) in capsys.readouterr().out


def test_a_reply_that_was_not_recorded_is_asked_for(workdir, tmp_path):
    """The run was killed in the middle of the seventh step's episodes."""
    other = tmp_path / 'run'
    shutil.copytree(workdir, other)
    shutil.rmtree(other / 'checkpoints' / 'grpo' / '8')
    path = other / 'replies' / 'grpo.6.0.jsonl'
    known = path.read_text().splitlines(keepends=True)
    path.write_text(''.join(known[:7]) + known[7][:20])
    runs.train(get_config('episode_tools:counter'), other)
    ours, theirs = (
        [row for row in runs.lines(folder / 'completions.jsonl') if row['step'] < 7]
        for folder in (other, workdir)
    )
    assert [r for r in ours if r['step'] < 6] == [r for r in theirs if r['step'] < 6]
    replies = [
        {turn['reply'] for row in rows if row['step'] == 6 for turn in row['turns']}
        for rows in (ours, theirs)
    ]
    assert len(replies[0] & replies[1]) >= 7
    assert replies[0] != replies[1]
    assert len(runs.lines(path)) >= len(known)  # without the line that was torn


def test_failures_are_outcomes_of_their_turns(tmp_path):
    """Errors, hangs, other types, megabytes and text that is none: the run goes on."""
    config = get_config('episode_tools:Unreliable', reply_seconds=0.5)
    config.data.heldout_split = ''
    runs.train(config, tmp_path / 'run')
    rows = runs.lines(tmp_path / 'run' / 'completions.jsonl')
    turns = list(itertools.chain.from_iterable(row['turns'] for row in rows))
    outcomes = {turn.get('outcome') for turn in turns}
    assert {'error', 'timeout', 'not_text', 'reply'} <= outcomes
    steps = runs.lines(tmp_path / 'run' / 'metrics.jsonl')
    failed = sum(v for step in steps for k, v in step.items() if k.startswith('environment/failed'))
    assert failed == sum(turn.get('outcome') in ('error', 'timeout', 'not_text') for turn in turns)
    assert any(turn.get('cut') for turn in turns)


VARIANTS = {
    'refill': {'grpo.refill': 2, 'grpo.drop': 'duplicates'},
    'ahead': {'grpo.ahead': True, 'grpo.algorithm.importance': 'token'},
    'int8': {'grpo.weights': 'int8', 'grpo.algorithm.importance': 'token'},
    'adapters': {'model.lora.rank': 2},
    'filters': {'grpo.sampling.top_k': 50, 'grpo.record': ('support',)},
    'packed': {'grpo.compute.packed': True, 'grpo.compute.rows': 4},
    'critic': {
        'grpo.algorithm.baseline': 'critic', 'grpo.algorithm.scale': 'none',
        'grpo.algorithm.kl': 'k1', 'grpo.algorithm.kl_place': 'reward',
    },
    'process': {
        'grpo.algorithm.supervision': 'process',
        'grpo.step_rewards': {'episode_tools:turn_steps': 1.0},
    },
    'preferences': {
        'grpo.algorithm.loss': 'dpo', 'grpo.algorithm.kl': 'none', 'grpo.algorithm.scale': 'none',
        'grpo.algorithm.beta': 0.1,
    },
    'greedy baseline': {'grpo.algorithm.baseline': 'greedy', 'grpo.algorithm.scale': 'none'},
    'reward model': {
        'reward_model.weight': 1.0, 'reward_model.steps': 2, 'reward_model.batch_size': 4,
        'reward_model.group_size': 4, 'reward_model.replay': 0.25, 'grpo.iterations': 2,
    },
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize('changes', VARIANTS.values(), ids=VARIANTS)
def test_methods_and_options(tmp_path, changes):
    """A tool that forgets: the run goes on after its last checkpoint as it did before."""
    config = get_config('episode_tools:counter')
    config.grpo.update(steps=4)
    config.checkpoint.every = 2
    config.eval.every = 4
    if 'preferences' in str(changes) or 'dpo' in str(changes.values()):
        config.grpo.algorithm.inner_updates = 1
    config.update_from_flattened_dict(changes)
    runs.train(config, tmp_path / 'run')
    other = tmp_path / 'other'
    shutil.copytree(tmp_path / 'run', other)
    newest = max((other / 'checkpoints').glob('grpo*'), key=lambda path: path.name)
    shutil.rmtree(newest / '4')
    runs.train(config, other)
    for name in ('metrics.jsonl', 'completions.jsonl'):
        rows = [
            [{k: v for k, v in row.items() if not runs.TIMES.match(k)} for row in runs.lines(path)]
            for path in (tmp_path / 'run' / name, other / name)
        ]
        assert rows[0] == rows[1]
    turns = [len(row['turns']) for row in runs.lines(other / 'completions.jsonl')]
    assert max(turns) == 3


def test_a_column_that_the_environment_gives_is_refused(tmp_path):
    (tmp_path / 'rows.py').write_text(
        'def rows(split):\n    return [{"question": "1", "turns": 3}] * 9\n'
    )
    config = get_config()
    config.data.name = f'{tmp_path}/rows.py:rows'
    config.data.options = {}
    with pytest.raises(ValueError, match="the data set has a column 'turns', which with an"):
        runs.train(config, tmp_path / 'run')
