"""The files of a run: JSON lines, TensorBoard events, a picture and a table."""

import math
import re
import struct

import matplotlib.image
import numpy as np
import pytest
import runs
from tensorboardX.proto.event_pb2 import Event

from grpo_jax.run import report
from grpo_jax.run.evaluation import Evaluation


def curves(folder):
    """Tag -> {step: value} of all TensorBoard event files under a folder."""
    found = {}
    for path in sorted(folder.rglob('events.out.tfevents.*')):
        data = path.read_bytes()
        while data:  # records of length, checksum, event, checksum
            (length,) = struct.unpack('<Q', data[:8])
            event = Event.FromString(data[12 : 12 + length])
            for value in event.summary.value:
                found.setdefault(value.tag, {})[event.step] = value.simple_value
            data = data[16 + length :]
    return found


def make_evaluation(step, completions=('1', '2'), correct=(True, False)):
    metrics = {'eval/accuracy': sum(correct) / 2, 'eval/mean_length': float(step)}
    return Evaluation(metrics, ['1+0=', '1+2='], list(completions), list(correct))


@pytest.fixture
def written(tmp_path):
    """Two SFT steps and three GRPO steps with an evaluation before and after them."""
    records = report.Records(tmp_path, 'sft', 0)
    for step in range(2):
        records.metrics(step, {'loss': 3.0 - step})
    records.close()
    records = report.Records(tmp_path, 'grpo', 0)
    records.heldout(0, make_evaluation(0))
    for step in range(3):
        records.metrics(step, {'reward': step / 2, 'kl': math.nan if step == 1 else 0.5, 'n': 2})
        records.completions(step, [{'prompt': 'é', 'reward': None}, {'prompt': ' ', 'reward': 0}])
    records.heldout(3, make_evaluation(3, ('1', '3'), (True, True)))
    records.close()
    return tmp_path


def test_lines(written):
    assert runs.lines(written / 'metrics.jsonl') == [
        {'stage': 'sft', 'step': 0, 'loss': 3.0},
        {'stage': 'sft', 'step': 1, 'loss': 2.0},
        {'stage': 'grpo', 'step': 0, 'reward': 0.0, 'kl': 0.5, 'n': 2},
        {'stage': 'grpo', 'step': 1, 'reward': 0.5, 'kl': None, 'n': 2},
        {'stage': 'grpo', 'step': 2, 'reward': 1.0, 'kl': 0.5, 'n': 2},
    ]
    assert runs.lines(written / 'completions.jsonl')[2:4] == [
        {'stage': 'grpo', 'step': 1, 'prompt': 'é', 'reward': None},
        {'stage': 'grpo', 'step': 1, 'prompt': ' ', 'reward': 0},
    ]
    assert 'é' in (written / 'completions.jsonl').read_text()
    assert runs.lines(written / 'heldout.jsonl')[1] == {
        'stage': 'grpo',
        'step': 3,
        'metrics': {'eval/accuracy': 1.0, 'eval/mean_length': 3.0},
        'prompts': ['1+0=', '1+2='],
        'completions': ['1', '3'],
        'correct': [True, True],
    }
    assert [row['step'] for row in report.read(written / 'metrics.jsonl', 'sft')] == [0, 1]


def test_infinities_are_null(tmp_path):
    records = report.Records(tmp_path, 'grpo', 0)
    records.metrics(0, {'a': math.inf, 'b': -math.inf, 'c': 1.5})
    records.close()
    row = {'stage': 'grpo', 'step': 0, 'a': None, 'b': None, 'c': 1.5}
    assert runs.lines(tmp_path / 'metrics.jsonl') == [row]


def test_lines_are_on_disk_at_once(tmp_path):
    records = report.Records(tmp_path, 'grpo', 0)
    records.metrics(0, {'reward': 1.0})
    assert len(runs.lines(tmp_path / 'metrics.jsonl')) == 1
    records.close()


def test_event_files(written):
    assert curves(written / 'tensorboard' / 'sft') == {'loss': {0: 3.0, 1: 2.0}}
    assert curves(written / 'tensorboard' / 'grpo') == {
        'reward': {0: 0.0, 1: 0.5, 2: 1.0},
        'kl': {0: 0.5, 2: 0.5},
        'n': {0: 2, 1: 2, 2: 2},
        'eval/accuracy': {0: 0.5, 3: 1.0},
        'eval/mean_length': {0: 0.0, 3: 3.0},
    }


@pytest.mark.parametrize(
    ('stage', 'step', 'kept'),
    [
        ('grpo', 3, 5),
        ('grpo', 2, 4),
        ('grpo', 0, 2),
        ('sft', 2, 2),  # a run that was stopped in SFT has not begun GRPO
        ('sft', 1, 1),
        ('sft', 0, 0),
    ],
)
def test_a_resumed_run_cuts_off_what_it_will_write_again(written, stage, step, kept):
    before = (written / 'metrics.jsonl').read_text().splitlines()
    report.Records(written, stage, step).close()
    assert (written / 'metrics.jsonl').read_text().splitlines() == before[:kept]
    wanted = min(step, 3) if stage == 'grpo' else 0
    assert len(runs.lines(written / 'completions.jsonl')) == 2 * wanted
    steps = [row['step'] for row in runs.lines(written / 'heldout.jsonl')]
    assert steps == [s for s in (0, 3) if s < wanted]


@pytest.mark.parametrize('torn', ['{"stage": "grpo", "st', '{"stage": "grpo", "step": 0, "x": 1}'])
def test_a_torn_last_line_is_removed(written, torn):
    path = written / 'metrics.jsonl'
    before = path.read_text()
    path.write_text(before + torn)  # killed before the end of the line
    report.remove_lines(path, 'grpo', 3)
    assert path.read_text() == before
    assert not list(written.glob('*.partial'))


BREAKS = '\r\v\f\x1c\x1d\x1e\x85\u2028\u2029'


def test_texts_with_any_line_break_are_one_line(tmp_path):
    """A resumed run cuts what comes after its step, and nothing else; a finished one is read."""
    records = report.Records(tmp_path, 'grpo', 0)
    for step in range(3):
        records.completions(step, [{'prompt': c, 'completion': BREAKS} for c in BREAKS])
        records.metrics(step, {'reward': 0.0})
    records.heldout(2, make_evaluation(2, (BREAKS, 'b')))
    records.close()
    assert report.has_heldout(tmp_path, 'grpo', 2)
    assert report.before_and_after(tmp_path, 3)
    report.Records(tmp_path, 'grpo', 2).close()
    rows = report.read(tmp_path / 'completions.jsonl', 'grpo')
    assert [row['prompt'] for row in rows] == 2 * list(BREAKS)
    assert {row['completion'] for row in rows} == {BREAKS}


@pytest.mark.parametrize(
    'line', ['{}', '{"stage": "x", "step": 1}', '{"stage": "sft", "step": "1"}', '{"stage": "sf']
)
def test_a_line_that_is_no_record_is_named(written, line):
    path = written / 'heldout.jsonl'
    path.write_text(path.read_text() + line + '\n')
    message = r'heldout\.jsonl, line 3 (has no stage and step of a run|is not a JSON object .*): '
    for reads in (
        lambda: report.Records(written, 'grpo', 1),
        lambda: report.has_heldout(written, 'grpo', 9),
        lambda: report.before_and_after(written, 3),
    ):
        with pytest.raises(ValueError, match=message):
            reads()
    assert not list(written.glob('*.partial'))


def test_the_curves_of_a_killed_run_are_those_of_an_unbroken_one(tmp_path):
    """Also in the files themselves, whatever reads them; a torn record and other files do no harm.

    No process closes its files, and all begin within a second.
    """
    folder = tmp_path / 'tensorboard' / 'grpo'
    for first, last in ((0, 4), (2, 3), (3, 7), (5, 8)):
        records = report.Records(tmp_path, 'grpo', first)
        for step in range(first, last):
            records.metrics(step, {'reward': 1.0 + step, 'mine/ä': -1.0})
        (newest,) = folder.glob('*.grpo_jax')
        newest.write_bytes(newest.read_bytes() + b'\x18\0\0')  # killed within a write
        (folder / 'events.out.tfevents.1.of.another').write_bytes(b'')
    records = report.Records(tmp_path, 'grpo', 8)
    records.metrics(8, {'reward': 9.0, 'mine/ä': -1.0})
    records.remove_from(8)
    records.metrics(8, {'reward': 9.0, 'mine/ä': -1.0})
    records.close()
    assert curves(folder) == {
        'reward': {step: 1.0 + step for step in range(9)},
        'mine/ä': {step: -1.0 for step in range(9)},
    }
    assert len(list(folder.iterdir())) == 2


def test_table(written):
    assert report.before_and_after(written, 3).splitlines() == [
        'prompt  before (step 0)  after (step 3)',
        '---------------------------------------',
        '1+0=    + 1              + 1           ',
        '1+2=    - 2              + 3           ',
    ]
    assert report.before_and_after(written, 3, count=1).splitlines()[-1].startswith('1+0=')


def test_iterations_are_numbered_through(written):
    records = report.Records(written, 'grpo-2', 0)
    records.heldout(0, make_evaluation(0))
    records.metrics(0, {'reward': 2.0})
    records.heldout(3, make_evaluation(3))
    records.close()
    rows = report.read_policy(written / 'heldout.jsonl', 3)
    assert [(row['stage'], row['step']) for row in rows] == [
        ('grpo', 0), ('grpo', 3), ('grpo-2', 3), ('grpo-2', 6),
    ]  # fmt: skip
    rows = report.read_policy(written / 'metrics.jsonl', 3)
    assert [row['step'] for row in rows] == [0, 1, 2, 3]
    report.remove_lines(written / 'metrics.jsonl', 'reward-2', 0)  # comes before grpo-2
    assert [row['stage'] for row in runs.lines(written / 'metrics.jsonl')][-1] == 'grpo'


def test_without_iterations_sft_is_what_there_is(tmp_path):
    records = report.Records(tmp_path, 'sft', 0)
    records.heldout(0, make_evaluation(0))
    records.close()
    assert [row['stage'] for row in report.read_policy(tmp_path / 'heldout.jsonl', 0)] == ['sft']


def test_an_evaluation_counts_once_its_line_is_whole(written):
    assert report.has_heldout(written, 'grpo', 3)
    assert not report.has_heldout(written, 'grpo', 2)
    assert not report.has_heldout(written, 'grpo-2', 3)
    assert not report.has_heldout(written / 'nowhere', 'grpo', 3)
    path = written / 'heldout.jsonl'
    path.write_text(path.read_text()[:-5])
    assert not report.has_heldout(written, 'grpo', 3)


def test_long_texts_are_cut(tmp_path):
    records = report.Records(tmp_path, 'grpo', 0)
    long = Evaluation({'eval/accuracy': 0.0}, ['a' * 50 + 'end'], ['x\n  y' + 'z' * 99], [False])
    records.heldout(0, long)
    records.close()
    last = report.before_and_after(tmp_path, 1).splitlines()[-1]
    cell = '- x y' + 'z' * 34 + '...'
    assert last.split('  ') == ['a' * 27 + 'end', cell, cell]


def test_control_characters_are_escaped(tmp_path):
    records = report.Records(tmp_path, 'grpo', 0)
    texts = ['\x1b[2J\x00 \u202eé\\frac', '好\r\n\x7f\x9b1']
    records.heldout(0, Evaluation({}, ['\x07?', 'q\n'], texts, rewards=[0.5, 1.0]))
    records.close()
    lines = report.before_and_after(tmp_path, 1).split('\n')
    assert [re.split(' {2,}', line.strip())[:2] for line in lines[2:]] == [
        [r'\x07?', r'0.5: \x1b[2J\x00 \u202eé\frac'],
        ['q', r'1: 好 \x7f\x9b1'],
    ]


def test_picture(written):
    path = report.plot(written, 3)
    assert path == written / 'reward.png'
    picture = matplotlib.image.imread(path)
    assert picture.shape[:2] == (720, 1080)
    panels = [picture[y : y + 360, x : x + 540, :3] for y in (0, 360) for x in (0, 540)]
    colors = [len(np.unique(panel.reshape(-1, 3), axis=0)) for panel in panels]
    blue = [((panel[..., 2] - panel[..., 0]) > 0.5).sum() for panel in panels]
    assert min(colors) > 20  # letters
    # Reward and KL are drawn; there is no sampled accuracy and no length in these records, but
    # held-out accuracy.
    assert blue[0] > 200
    assert blue[3] > 20
    assert blue[2] == 0
    assert blue[1] > 20


def test_event_files_hold_what_the_lines_hold(finished):
    for stage, steps in (('sft', 5), ('grpo', 8)):
        found = curves(finished / 'tensorboard' / stage)
        rows = report.read(finished / 'metrics.jsonl', stage)
        tests = report.read(finished / 'heldout.jsonl', stage)
        rows += [{'step': row['step'], **row['metrics']} for row in tests]
        names = {name for row in rows for name in row} - {'stage', 'step'}
        assert len(rows) == steps + 3 * (stage == 'grpo')
        assert len(found) == len(names)
        for name in names:
            expected = {row['step']: row[name] for row in rows if name in row}
            tag = re.sub('[^-/.a-zA-Z0-9_]', '_', name)  # what TensorBoard allows
            assert found[tag] == pytest.approx(expected, rel=1e-6)


def test_the_picture_of_a_run(finished):
    picture = matplotlib.image.imread(finished / 'reward.png')[..., :3]
    for y in (0, 360):
        for x in (0, 540):
            panel = picture[y : y + 360, x : x + 540]
            assert ((panel[..., 2] - panel[..., 0]) > 0.5).sum() > 100
