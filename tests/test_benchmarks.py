"""The benchmark harness on its smallest workload: what it computes, never how long it takes."""

import dataclasses
import functools
import json
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from benchmarks import (
    accuracy,
    bare,
    decode,
    floors,
    kernels,
    refill,
    roofline,
    step,
    timing,
    workloads,
)
from benchmarks.flops import count_flops
from benchmarks.ours import Ours, make_model, parse_options
from grpo_jax.models.kernels import decode_token

ROOT = pathlib.Path(__file__).parents[1]


@pytest.fixture(scope='module')
def ours():
    shape = workloads.Shape(
        vocab_size=2048, width=16, layers=2, heads=2, kv_heads=1, head_dim=8, mlp_width=24
    )
    workload = dataclasses.replace(workloads.WORKLOADS['smoke'], shape=shape)
    return Ours(workload, parse_options(['microbatch=2']))


@pytest.mark.slow
def test_record_of_a_run(ours, tmp_path, capsys):
    labels = {'workload': 'smoke', 'options': ['microbatch=2']}
    row = step.measure(ours, labels, steps=2, warmup=1, with_floors=True)
    assert {'prompts', 'sample', 'reward', 'update', 'score', 'step'} == set(row['seconds'])
    assert {(s['n'], s['min'] <= s['median'] <= s['max']) for s in row['seconds'].values()} == {
        (2, True)
    }
    phases = ('prompts', 'sample', 'reward', 'update')
    assert sum(row['seconds'][name]['min'] for name in phases) <= row['seconds']['step']['max']
    assert row['tokens_per_step']['median'] == 2 * 2 * 8
    assert row['first_step_s'] > row['seconds']['step']['min']
    assert set(row['floors']) == {'sample', 'update', 'update and reference'}
    assert row['share_of_matmul'].keys() == row['flops_per_s'].keys() == row['model_flops'].keys()
    assert row['settings'].items() > labels.items()
    assert row['peak_bytes'] > 2**20

    path = tmp_path / 'rows.jsonl'
    timing.write(row, str(path))
    timing.write(row, str(path))
    assert [json.loads(line) for line in path.read_text().splitlines()] == [row, row]
    assert step.describe(row)
    assert '[grpo_jax smoke]' in capsys.readouterr().out


def test_blocks_of_the_sampler(ours, tmp_path):
    """Their seconds, and the bytes that each of their columns reads at least."""
    took = decode.seconds(ours.workload, ours.model, ours.reference, 1, block=3)
    assert list(took) == [3, 6, 8]
    assert min(took.values()) > 0
    c = ours.workload.shape
    matrices = roofline.layer_parameters(c) + c.width * c.vocab_size
    token = 2 * c.layers * c.kv_heads * c.head_dim
    # Columns 4 to 6 read both prompts of 8 tokens, and 3 to 5 tokens of their four rows.
    read = decode.of_columns(ours.workload, 6) - decode.of_columns(ours.workload, 3)
    assert read == 4 * (3 * matrices + token * (3 * 2 * 8 + 4 * (3 + 4 + 5)))
    assert kernels.longest(tmp_path, 10) == ['no accelerator ran anything']


@pytest.mark.parametrize('late', tiny.some_slow([0, 1], 0))
def test_accuracy_of_attention(late, monkeypatch):
    """Rounding is within the tolerance, and a kernel that reads a column too many is not."""

    def token(q, new, cache, *rest, **options):
        cache = cache._replace(t=cache.t + late)
        return kernel(q, new, cache, *rest, interpret=True, **options)

    kernel = decode_token.attend_token
    monkeypatch.setattr(decode_token, 'attend_token', token)
    shape = workloads.Shape(layers=1, heads=4, kv_heads=2, head_dim=16, dtype='bfloat16')
    config = make_model(shape).config
    groups = dict(accuracy.of_groups(config, 2, 2, 10, 12))
    assert 0 < max(groups.values()) < accuracy.TOLERANCE
    for c in (config, dataclasses.replace(config, **accuracy.WINDOWED)):
        tokens = accuracy.of_token(c, 2, 2, 10, 70)
        assert all((0 < error < accuracy.TOLERANCE) == (late == 0) for _, error in tokens)


def test_slots_are_refilled():
    column = {1: 1.0, 2: 1.5}
    seconds = functools.partial(refill.simulate, np.array([3, 1, 2]), step_seconds=column)
    assert seconds(2, 1) == 3 * 1.5  # [3, 1], [2, 2], [1, 1] are left
    assert seconds(2, 2) == 2 * 1.5 + 2 * 1.5  # [3, 1], then [1, 2]
    assert seconds(1, 1) == 6


@pytest.mark.slow
def test_bare_programs_compute_what_ours_do(ours):
    result = floors.check(ours)
    assert result['logprob_difference'] < floors.TOLERANCE
    assert result['same_draws'] > floors.SAME_DRAWS


def test_bare_draw_follows_the_softmax():
    logits = 2 * np.random.default_rng(0).standard_normal(100)
    draws = 20_000
    tokens = bare.draw(jax.random.key(0), jnp.broadcast_to(jnp.asarray(logits), (draws, 100)))
    expected = np.exp(logits) / np.exp(logits).sum() * draws
    counts = np.bincount(tokens, minlength=100)
    assert len(counts) == 100
    assert ((counts - expected) ** 2 / expected).sum() < 99 + 5 * np.sqrt(2 * 99)


def test_model_flops_and_bytes_by_hand():
    shape = workloads.Shape(
        vocab_size=10, width=4, layers=1, heads=2, kv_heads=1, head_dim=2, mlp_width=3
    )
    workload = workloads.Workload(1, 2, 2, 3, shape=shape)
    lengths = np.array([[3, 1]])
    matrices = 4 * (2 + 1 + 1 + 2) * 2 + 3 * 4 * 3
    assert roofline.layer_parameters(shape) == matrices
    read, predicted = 2 + 2, 4  # the prompt and two tokens of the longer row
    keys = (1 + 2) + (3 + 4)
    products = 2 * (matrices * read + 4 * 10 * predicted)
    assert roofline.forward_flops(workload, lengths) == products + 4 * 2 * 2 * keys
    cached = 2 * 2 * (2 * 2 + 1 + 2)  # of the prompt at two positions, of the row 1 and 2 columns
    assert roofline.decode_bytes(workload, lengths) == 4 * (2 * (matrices + 4 * 10) + cached)


def test_model_flops_are_near_those_of_our_programs(ours):
    prompts = ours.prompts(0)
    counted = count_flops(lambda p: ours.sample(p, 0), prompts, while_trips=7)
    model = roofline.forward_flops(ours.workload, np.full((2, 2), 8))
    assert model <= counted < 1.15 * model


def test_workloads():
    texts = workloads.prompt_texts(3, 10)
    words = workloads.words(4096)
    ids = {word: i for i, word in enumerate(words)}
    tokens = workloads.encode(texts, ids)
    assert len(words) == len(ids) == 4096
    assert tokens.shape == (3, 10)
    assert [workloads.decode(row, words) for row in tokens] == texts
    assert workloads.decode(np.array([ids['7'], workloads.EOS, 0]), words) == '7'
    assert workloads.reward('7 0') == pytest.approx(10 / 3)
    assert workloads.reward('') == 0
    assert len(workloads.WORKLOADS['W3'].eos_ids) == 86
    assert min(workloads.WORKLOADS['W1'].eos_ids) >= 4096


def test_tokenizer_of_the_peers():
    text = workloads.prompt_texts(1, 10)[0]
    tokenizer = workloads.hugging_face_tokenizer(4096)
    ids = {word: i for i, word in enumerate(workloads.words(4096))}
    assert tokenizer(text).input_ids == workloads.encode([text], ids)[0].tolist()


def test_options_find_their_place():
    pairs = ['loss=cispo', 'beta=0.1', 'microbatch=4', 'remat=True', 'dtype=bfloat16', 'block=8']
    options = parse_options(pairs)
    assert options.algorithm == {'loss': 'cispo', 'beta': 0.1}
    assert options.compute == {'microbatch': 4, 'remat': True}
    assert options.model == {'dtype': 'bfloat16'}
    assert options.sample == {'block': 8}
    for wrong in ('width', 'lenght=3'):
        with pytest.raises(ValueError, match=wrong):
            parse_options([wrong])


def test_tables_of_a_comparison(tmp_path):
    def row(framework, step, score, update, peak):
        seconds = {'step': step, 'sample': 1.0, 'score': score, 'update': update}
        of = {name: {'median': s, 'min': s, 'max': s, 'n': 3} for name, s in seconds.items()}
        one = {'median': 10.0, 'max': 0.0}
        return {
            'framework': framework, 'workload': 'W1', 'seconds': of, 'tokens_per_step': one,
            'tokens_per_s': {'step': one}, 'noise': one, 'first_step_s': 9.0,
            'peak_bytes': peak * 2**30, 'probe_flops_per_s': [1e9, 2e9],
        }  # fmt: skip

    rows = [
        row('grpo_jax', 2.0, 0.5, 1.0, 1), row('trl', 6.0, 1.0, 4.0, 3),
        row('trl', 8.0, 1.0, 4.0, 3), row('trl', 9.0, 1.0, 4.0, 3), row('tunix', 7.0, 2.0, 2.5, 5),
    ]  # fmt: skip
    path = tmp_path / 'rows.jsonl'
    path.write_text(''.join(json.dumps(row) + '\n' for row in rows))
    command = [sys.executable, '-m', 'benchmarks.compare', '--rounds=0', f'--output={path}']
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert '| W1 | trl | 9 | 8.00 (6.00-9.00) | 1.00 | 5.00 | 9.00 | 3.00 |' in done.stdout
    ratios = '| W1 | 3.50 (tunix) | 1.00 (trl) | 4.50 (tunix) | 1.00 (trl) | 3.00 (trl) |'
    assert ratios in done.stdout
