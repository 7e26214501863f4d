"""Steps of finished runs that are replayed: the same numbers, and what the update did with them."""

import contextlib
import functools
import html.parser
import io
import json
import os
import re
import zlib

import jax
import numpy as np
import pytest
import runs
import test_runs_of_methods as methods
import tiny

from grpo_jax import data
from grpo_jax import replay as command
from grpo_jax.algorithm.explanation import TokenTerms, make_explain
from grpo_jax.run import checkpoint, policy_trainer, saved_config
from grpo_jax.run.defaults import defaults
from grpo_jax.run.health import UnhealthyError, batch_arrays
from grpo_jax.run.replay import check, origin, output, page, rerun, table, tokens
from grpo_jax.run.replay.tokens import Completion

pytestmark = pytest.mark.usefixtures('compiled_once')


def files(workdir):
    """All that a change of a folder would change."""
    return {path: (path.lstat().st_mtime_ns, path.lstat().st_size) for path in workdir.rglob('*')}


@pytest.fixture(scope='module')
def seventh(finished, tmp_path_factory):
    """The replay of a step by the command: its result, comparison, output and folder."""
    folder, found = tmp_path_factory.mktemp('replay') / 'out', {}

    def checked(result, workdir):
        found['result'] = result
        found['check'] = check.check(result, workdir)
        return found['check']

    before = files(finished)
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()) as text:
        patch.setattr(output, 'check', checked)
        patch.setattr('sys.argv', ['r', f'--workdir={finished}', '--step=7', f'--output={folder}'])
        command.run()
    assert files(finished) == before
    return found['result'], found['check'], text.getvalue(), folder


def test_a_step_is_that_of_the_run(seventh):
    """From the checkpoint before it, of which steps 6 and 7 are run again."""
    result, compared, printed, _ = seventh
    assert result.origin.start == 6
    metrics = len([name for name in result.metrics if not runs.TIMES.match(name)])
    assert metrics > 30
    same = f'16 completions and their rewards, {metrics} metrics'
    checkpoint = 'parameters and moments of the checkpoint grpo/8'
    assert compared == ((*same.split(', '), checkpoint), (), ())
    assert 'grpo: replays the steps 6 to 7\n' in printed
    assert f'equal to the run, bit for bit: {same}, {checkpoint}\n' in printed
    assert 'not compared' not in printed


def test_the_arrays_are_those_of_clipped_grpo(seventh, finished):
    """The coefficients of the first inner update by hand, from the log-probs and the rewards."""
    with np.load(seventh[3] / 'arrays.npz') as arrays:
        a = dict(arrays)
    rewards, mask = a['rewards'].astype(float), a['rollout/mask']
    assert rewards.shape == (4, 4)
    spread = rewards.std(1, ddof=1, keepdims=True)
    advantages = (rewards - rewards.mean(1, keepdims=True)) / (spread + 1e-4)
    kl_slope = 1 - np.exp(a['ref_logprobs'] - a['logprobs'])
    beta = saved_config.read(finished / 'config.json').grpo.algorithm.beta
    expected = (beta * kl_slope - advantages[..., None]) / (16 * mask.sum(-1, keepdims=True))
    np.testing.assert_allclose(a['coefficients'], np.where(mask, expected, 0), atol=2e-6)
    assert np.abs(a['coefficients']).max() > 1e-3
    np.testing.assert_array_equal(a['trained'], mask)
    np.testing.assert_array_equal(a['ratio'], mask)  # 1 before the first update
    np.testing.assert_allclose(a['logprobs'], np.where(mask, a['rollout/logprobs'], 0), atol=1e-4)
    recorded = [row for row in runs.lines(finished / 'completions.jsonl') if row['step'] == 7]
    summary = json.loads((seventh[3] / 'replay.json').read_text())
    assert [{'stage': 'grpo', 'step': 7} | row for row in summary['completions']] == [
        row for row in recorded if row['stage'] == 'grpo'
    ]


class Texts(html.parser.HTMLParser):
    """The texts of a page by the class of the element that they are in, and all tags."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.texts, self.stack = [], {}, []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag in ('meta', 'wbr'):
            return
        self.stack.append(dict(attrs).get('class') or tag)
        self.texts.setdefault(self.stack[-1], []).append('')

    def handle_endtag(self, tag):
        self.stack.pop()

    def handle_data(self, text):
        for name in {*self.stack}:
            self.texts[name][-1] += text


def test_the_page_shows_each_completion_by_its_reward(seventh):
    result, text = seventh[0], (seventh[3] / 'page.html').read_text()
    found = Texts(text)
    names = {tag for tag, _ in found.tags}
    assert not names & {'script', 'link', 'img', 'iframe'}
    assert '://' not in text
    assert 'url(' not in text
    rows = result.completions
    order = [
        i for group in range(4)
        for i in sorted(range(4 * group, 4 * group + 4), key=lambda i: -rows[i]['reward'])
    ]  # fmt: skip
    plain = [(k, i) for k, i in enumerate(order) if rows[i]['completion'].isascii()]
    assert len(plain) > 2  # the others have bytes that are no characters
    for k, i in plain:
        shown = found.texts['completion'][k].removesuffix('<eos>').replace('↵\n', '\\n')
        assert shown.replace('⇥', '\\t') == tokens.visible(rows[i]['completion'])
    assert found.texts['prompt'] == [rows[4 * i]['prompt'] for i in range(4)]
    for i, about in zip(order, found.texts['about'], strict=True):
        assert about.startswith(f'{i % 4}: reward {rows[i]["reward"]:.6g} (')
    colored = [attrs for tag, attrs in found.tags if tag == 'span' and 'title' in attrs]
    assert len(colored) == result.rollout.mask.sum()
    signs = [attrs['class'].split()[0] == 'u' for attrs in colored if attrs['class']]
    lowered = [float(re.search(r'coefficient (\S+)$', a['title'])[1]) < 0 for a in colored
               if a['class']]  # fmt: skip
    assert signs == lowered
    assert {True, False} == {*signs}


def test_the_table_has_a_line_for_each_token(seventh):
    result, _, printed, _ = seventh
    group, number = table.default_completion(result.terms, None)
    sums = np.abs(result.terms.coefficients).sum(-1)
    assert sums[group, number] == sums.max()
    start = printed.index(f'grpo step 7, prompt {group}, completion {number}')
    lines = printed[start:].splitlines()
    length = int(result.rollout.mask[group, number].sum())
    assert lines[3].split() == [
        'token', 'log-prob', 'old', 'reference', 'ratio', 'advantage', 'KL', 'entropy',
        'coefficient',
    ]  # fmt: skip
    for i, line in enumerate(lines[4 : 4 + length]):
        cells = line.split()
        assert cells[0] == str(i)
        coefficient = result.terms.coefficients[group, number, i]
        assert float(cells[9]) == pytest.approx(coefficient, rel=1e-3)
    assert lines[4 + length].startswith('equal to the run')
    assert table.default_completion(result.terms, 2)[0] == 2


# Differences


@pytest.fixture
def edited(finished, tmp_path):
    """Writes the run's records anew, with changed lines of step 7."""
    os.symlink(finished / 'checkpoints', tmp_path / 'checkpoints')

    def write(name, change):
        for file in ('metrics', 'completions'):
            rows = runs.lines(finished / f'{file}.jsonl')
            last = [row for row in rows if (row['stage'], row['step']) == ('grpo', 7)]
            if file == name:
                change(last)
            (tmp_path / f'{file}.jsonl').write_text(
                ''.join(json.dumps(row, ensure_ascii=False) + '\n' for row in rows)
            )
        return tmp_path

    return write


def other_text(rows):
    rows[3]['completion'] += '\u2028more'


def other_reward(rows):
    rows[5]['reward'] += 1
    rows[5]['rewards']['runs:lucky'] += 1


def other_metric(rows):
    rows[0]['loss'] = np.nextafter(rows[0]['loss'], 1)
    rows[0]['step_time'] = 1e9


@pytest.mark.parametrize(
    ('name', 'change', 'message', 'cause'),
    [
        ('completions', other_text, r"^completion 3 from character \d+ on: '' here, '.*more' in",
         r'^No cause is known: versions, devices and data seem to be those of the run \(jax 0'),
        ('completions', other_reward, '^the reward of completion 5: .* here, .* in completions.js',
         'not deterministic, or was changed since$'),
        ('metrics', other_metric, "^the metric 'loss': .* here, .* in metrics.jsonl$",
         'versions, devices'),
    ],
)  # fmt: skip
def test_differences_are_named(seventh, edited, name, change, message, cause):
    result = seventh[0]
    compared = check.check(result, edited(name, change))
    assert re.search(message, compared.different[0])
    if change is other_reward:
        assert compared.different[1].startswith("the reward 'runs:lucky' of completion 5: ")
    assert len(compared.different) == 1 + (change is other_reward)
    assert re.search(cause, check.likely_cause(result, compared.different))
    lines = output._verdict(result, compared)
    assert lines[-1].startswith('DIFFERENT from the run: ')
    assert '\n' not in lines[-1]


def test_causes_that_are_known_are_named(seventh):
    result = seventh[0]
    assert result.changed == result.origin.inputs == ()
    now = result.origin.environment
    assert now.keys() == {'jax', 'jaxlib', 'devices', 'processes'}
    before = now | {'jax': '0.9.9', 'devices': '64 TPU v5p'}
    other = result._replace(
        origin=result.origin._replace(environment=before, inputs=('the code of a',)),
        changed=('the data have changed (row 3)',),
    )
    assert check.likely_cause(other, ['the metric']) == (
        f'Likely because jax was 0.9.9 and is {now["jax"]} here; devices was 64 TPU v5p and is '
        f'{now["devices"]} here; the data have changed (row 3); the run changed the code of a'
    )


def test_parameters_that_differ_by_a_bit_are_named(seventh, finished):
    result = seventh[0]
    state = result.state
    changed = state.params['embedding'].at[0, 0].multiply(1 + 2**-23)
    other = result._replace(state=state._replace(params=state.params | {'embedding': changed}))
    (text,) = check.check(other, finished).different
    assert re.fullmatch(
        r"1 of \d+ arrays differ from those, such as state.params\['embedding'\], in the "
        'checkpoint grpo/8', text,
    )  # fmt: skip


def test_what_the_run_has_not_kept_is_said(seventh, tmp_path):
    compared = check.check(seventh[0], tmp_path)
    assert compared == ((), (), ('completions', 'metrics', 'the checkpoint grpo/8'))
    assert (
        'not compared, because the run has not kept them'
        in output._verdict(seventh[0], compared)[0]
    )


# Where a replay begins, and what it refuses


@pytest.fixture
def folder(tmp_path):
    """A folder with checkpoints of two stages and 60 steps of GRPO."""
    for name in ('sft/5', 'grpo/20', 'grpo/50'):
        (tmp_path / 'checkpoints' / name / 'params').mkdir(parents=True)
    rows = [{'stage': 'sft', 'step': 4}] + [{'stage': 'grpo', 'step': k} for k in range(60)]
    (tmp_path / 'metrics.jsonl').write_text(''.join(json.dumps(row) + '\n' for row in rows))
    return tmp_path


def find(folder, step, stage=''):
    return origin.find_origin(defaults(), folder, stage, step)


@pytest.mark.parametrize(
    ('step', 'start'), [(0, 0), (19, 0), (20, 20), (49, 20), (50, 50), (60, 50)]
)
def test_the_newest_checkpoint_before_a_step(folder, step, start):
    assert find(folder, step)[1:3] == ('grpo', start)
    assert find(folder, 3, 'sft')[1:3] == ('sft', 0)


def test_the_config_of_the_time(folder):
    """Changes after a step are undone, and no checkpoint of before a change is used."""
    rows = [
        (None, 0, {'seed': 7}),
        ('sft', 5, {'grpo.steps': 60}),
        ('grpo', 30, {'grpo.steps': 80, 'eval.k': [1, 2]}),
        ('grpo', 50, {'grpo.optimizer.learning_rate': 0.5}),
        ('grpo', 50, {'jax': '0.11.0', 'the code of a reward': 'digest'}),
    ]
    lines = []
    current = saved_config.from_json(saved_config.to_json(defaults()), quiet=True)
    config = {'seed': 0, 'grpo.steps': 100, 'eval.k': [1, 8], 'grpo.optimizer.learning_rate': 1e-6}
    config |= {'jax': '0.10.2', 'the code of a reward': 'before'}
    for stage, step, changes in rows:
        both = {key: {'from': config[key], 'to': value} for key, value in changes.items()}
        lines.append({'stage': stage, 'step': step, 'changes': both})
        config |= changes
    (folder / 'changes.jsonl').write_text(''.join(json.dumps(row) + '\n' for row in lines))
    current.grpo.steps, current.eval.k, current.grpo.optimizer.learning_rate = 80, (1, 2), 0.5
    (folder / 'environment.json').write_text('{"jax": "0.11.0", "devices": "2 cpu"}')
    found = origin.find_origin(current, folder, 'grpo', 49 - 20)
    assert found.environment == {'jax': '0.10.2', 'devices': '2 cpu'}
    assert found.inputs == ('the code of a reward',)
    assert origin.find_origin(current, folder, 'grpo', 55).environment['jax'] == '0.11.0'
    before, start = find_config(current, folder, 25)
    assert (before.grpo.steps, before.eval.k, start) == (60, (1, 8), 20)
    assert before.grpo.optimizer.learning_rate == 1e-6
    after, start = find_config(current, folder, 55)
    assert (after.grpo.steps, after.grpo.optimizer.learning_rate, start) == (80, 0.5, 50)
    with pytest.raises(ValueError, match=r'^grpo step 40 cannot be replayed: the config was chang'):
        find_config(current, folder, 40)
    assert find_config(current, folder, 2, 'sft')[0].grpo.steps == 100


def find_config(config, folder, step, stage='grpo'):
    found = origin.find_origin(config, folder, stage, step)
    return found.config, found.start


@pytest.mark.parametrize(
    ('stage', 'step', 'message'),
    [
        ('', 61, '--step=61: .* this step of grpo; its steps .*: 0 to 4 of sft, 0 to 59 of grpo'),
        ('reward', 1, '--step=1: the run has not done this step of reward;'),
    ],
)
def test_steps_that_were_not_done(folder, stage, step, message):
    with pytest.raises(ValueError, match=message):
        find(folder, step, stage)


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        ([], '--step=NUMBER is missing'),
        (['--step=-1'], '--step=-1: give a number, from 0'),
        (['--step=1', '--output={run}/out'], '--output=.* is in the run, which a replay leaves'),
        (['--step=1', '--config.seed=3'], '--config.seed has no effect: a step is replayed with'),
        (['--step=99'], '--step=99: the run has not done this step of grpo'),
        (['--step=7', '--prompt=4'], '--prompt=4: the steps of grpo have 4, numbered from 0'),
        (['--step=7', '--completion=4'], '--completion=4: the steps of grpo have 4, numbered'),
    ],
)
def test_options_that_are_refused(finished, options, message, monkeypatch, capsys):
    given = [option.format(run=finished) for option in options]
    monkeypatch.setattr('sys.argv', ['replay', f'--workdir={finished}', *given])
    with pytest.raises(SystemExit) as error:
        command.run()
    assert error.value.code == 2
    assert re.match(f'error: {message}', capsys.readouterr().err)
    assert not (finished / 'out').exists()


# Texts


def test_texts_of_tokens_join_to_the_text():
    tokenizer = data.byte_tokenizer()
    for text in ('a  b\n\tc', 'plain', ''):
        ids = [*text.encode(), 257]
        assert tokens.token_texts(tokenizer, ids) == [*text, '<eos>']
    parts = tokens.token_texts(tokenizer, [*'aé'.encode(), ord('b')])
    assert len(parts) == 4
    assert '\ufffd' not in ''.join(parts)
    assert (parts[0], parts[-1]) == ('a', 'b')


def empty_terms(length):
    zeros = np.zeros((1, 1, length), np.float32)
    return TokenTerms(*[zeros] * 8, trained=zeros > 0)


def test_texts_on_a_page_are_escaped_and_visible():
    texts = ('<script>', '&amp;', ' ', '\n', '\t', '\x1b[31m', '"\'', 'é数', '\u2028')
    spans = ''.join(
        page._spans(empty_terms(len(texts)), Completion(0, 0, texts, True, 1.0, {}), 1.0)
    )
    found = Texts(spans)
    assert {tag for tag, _ in found.tags} == {'span', 'i', 'wbr'}
    assert found.texts['untrained'] == [
        '<script>', '&amp;', '·', '↵\n', '⇥', '\\x1b[31m', '"\'', 'é数', '\\u2028',
    ]  # fmt: skip
    titles = [attrs['title'].splitlines()[0] for tag, attrs in found.tags if tag == 'span']
    assert titles == [repr(text) for text in texts]


def test_a_table_is_aligned_and_obeys_no_text():
    texts = ('\x1b[31m', '数', 'a b', 'x' * 40, 'e\u0301')
    lines = table.table(empty_terms(5), Completion(0, 0, texts, False, None, {})).splitlines()
    assert len(lines) == 6
    assert '\x1b' not in ''.join(lines)
    assert {table._width(line) for line in lines[1:]} == {table._width(lines[1])}
    assert all(line.endswith('not trained') for line in lines[1:])
    assert 'a·b' in lines[3]
    assert table.heading(None, Completion(0, 0, texts, False, None, {'f': None, 'g': 0.5})) == (
        'no reward (f none, g 0.5), 5 tokens, cut off'
    )


# Methods: five steps of each, from their workdirs


def sometimes(prompts, completions, **columns):
    """Half of the rewards are None."""
    return [None if zlib.crc32(text.encode()) % 2 else float(len(text) % 3) for text in completions]


def with_missing_rewards():
    config = methods.get_config('grpo', refill=1)
    config.grpo.rewards = {'test_replay:sometimes': 1.0}
    config.eval.correct = ''
    return config


def ahead():
    return methods.get_config('tis', ahead=True)


RUNS = methods.RUNS | {
    'missing rewards': with_missing_rewards,
    'ahead': ahead,
    'entropy': methods.controlled,
    'entropy, ahead': functools.partial(methods.controlled, ahead=True),
}
SLOW = (
    'missing rewards', 'ppo', 'dpo', 'process', 'trpo', 'rft', 'ahead', 'entropy, ahead', 'remax',
    'adapted rft', 'adapted, reward model', 'iterative', 'deepseek_v32',
)  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize('name', SLOW)
def test_five_steps_of_a_method(name, tmp_path, monkeypatch):
    """Each step of each stage by itself, from whatever checkpoint is kept before it."""
    monkeypatch.setattr(policy_trainer, 'make_explain', functools.cache(make_explain))
    config = RUNS[name]()
    iterations = config.grpo.iterations
    config.grpo.steps = 5 if iterations == 1 else 3
    config.log.completions = 1000
    config.checkpoint.update(every=2, keep=9 if name == 'iterative' else 2)
    runs.train(config, tmp_path)
    rows = runs.lines(tmp_path / 'metrics.jsonl')
    assert len(rows) == config.grpo.steps * iterations + (
        config.reward_model.steps * iterations if config.reward_model.weight else 0
    )
    before = files(tmp_path)
    compared = set()
    for row in rows:
        found = origin.find_origin(
            saved_config.read(tmp_path / 'config.json'), tmp_path, row['stage'], row['step']
        )
        with rerun.replayed(found, tmp_path, row['step']) as result:
            same, different, missing = check.check(result, tmp_path)
        assert different == ()
        assert 'metrics' not in missing
        compared |= {text.partition(' of ')[0] for text in same}
        if result.terms is None:
            assert row['stage'].startswith('reward')
            continue
        assert tiny.largest(result.terms.coefficients) > 0 or row['loss'] == 0
        if config.grpo.algorithm.inner_updates == 1:
            loss = (result.terms.weights * result.terms.losses).sum()
            assert loss == pytest.approx(row['loss'], abs=2e-5)
        if name == 'missing rewards':
            assert result.rollout.kept is not None
            np.testing.assert_array_equal(
                result.terms.trained, result.rollout.mask & result.rollout.kept[..., None]
            )
    assert 'parameters and moments' in compared
    assert files(tmp_path) == before


@pytest.mark.slow
def test_a_later_inner_update_has_ratios(finished):
    """Its log-probs are those of the parameters after the first one."""
    found = origin.find_origin(saved_config.read(finished / 'config.json'), finished, '', 7)
    with rerun.replayed(found, finished, 7, update=1) as result:
        assert check.check(result, finished).different == ()
    terms = jax.tree.map(np.asarray, result.terms)
    mask = result.rollout.mask
    ratio = np.exp(terms.logprobs - terms.old_logprobs)
    np.testing.assert_allclose(terms.ratio, np.where(mask, ratio, 0), rtol=1e-6)
    assert np.abs(ratio - 1)[mask].max() > 1e-3
    with pytest.raises(ValueError, match='--update=2: the steps of grpo have 2, numbered'):  # noqa: SIM117
        with rerun.replayed(found, finished, 7, update=2):
            pass


@pytest.mark.slow
def test_a_step_of_sft(finished):
    found = origin.find_origin(saved_config.read(finished / 'config.json'), finished, 'sft', 4)
    with rerun.replayed(found, finished, 4) as result:
        same, different, missing = check.check(result, finished)
    assert different == ()
    assert missing == ('completions',)
    assert same[1] == 'parameters and moments of the checkpoint sft/5'
    mask = result.rollout.mask
    np.testing.assert_allclose(result.terms.coefficients, -result.terms.weights, atol=1e-7)
    assert result.terms.trained.sum() == mask.sum()


# Runs that were stopped


def stopping(functions, **options):
    """Five steps, of rewards that depend on the step."""
    config = methods.get_config('grpo')
    config.grpo.steps = 5
    config.grpo.algorithm.update(options.pop('algorithm'))
    config.grpo.rewards = functions
    config.eval.correct = ''
    config.checkpoint.every = 2
    config.log.completions = 1000
    config.health.update(options)
    return config


def sudden(prompts, completions, trainer_state, **columns):
    """A thousand times as large in step 3."""
    factor = 1000.0 if trainer_state.global_step == 3 else 1.0
    return [factor * reward for reward in runs.lucky(prompts, completions)]


def huge(prompts, completions, **columns):
    return [1000.0 + reward for reward in runs.lucky(prompts, completions)]


@pytest.mark.slow
@pytest.mark.parametrize('kind', ['skipped', 'sudden'])
def test_a_run_that_was_stopped_is_replayed(kind, tmp_path):
    if kind == 'skipped':
        estimator = {'advantage_estimator': 'runs:infinite_above_100', 'beta': 0.0}
        config = stopping({'test_replay:huge': 1.0}, skipped_updates=2, algorithm=estimator)
        step, saved = 1, 2
    else:
        plain = {'scale': 'none', 'beta': 0.0}
        config = stopping(
            {'test_replay:sudden': 1.0}, grad_norm=50.0, history=2, algorithm=plain
        )  # fmt: skip
        step, saved = 3, 2
    with pytest.raises(UnhealthyError, match=rf'^grpo step {step}: .*the run is stopped\. '):
        runs.train(config, tmp_path)
    assert max(checkpoint.steps_of_stages(tmp_path)['grpo']) == saved
    found = origin.find_origin(saved_config.read(tmp_path / 'config.json'), tmp_path, '', step)
    with rerun.replayed(found, tmp_path, step) as result:
        assert check.check(result, tmp_path).different == ()
    with np.load(tmp_path / 'stopped' / f'grpo-{step}.npz') as arrays:
        kept = dict(arrays)
    assert json.loads(str(kept.pop('metrics')))['reward'] == result.metrics['reward']
    ours = batch_arrays(result.rollout, result.rewards)
    assert kept.keys() == ours.keys()
    assert all(kept[name].tobytes() == ours[name].tobytes() for name in kept)
    if kind == 'sudden':
        assert found.start == saved
        with pytest.raises(UnhealthyError, match=f'^grpo step {step}: '):
            runs.train(config, tmp_path)  # the same numbers, with the history of the records
        config.health.grad_norm = 0.0
        runs.train(config, tmp_path, override=True)
        assert max(checkpoint.steps_of_stages(tmp_path)['grpo']) == 5
