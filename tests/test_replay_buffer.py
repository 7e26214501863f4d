"""Samples of earlier iterations in the batches of a reward model."""

import numpy as np
import pytest

from grpo_jax.run.replay_buffer import ReplayBuffer

SIZE = 10


def batch(iteration, step, size=SIZE):
    """A tree whose numbers say where each group comes from."""
    names = 100 * iteration + 10 * step + np.arange(size) / 100
    return {'name': names, 'pair': (np.stack([names, -names], 1), names > 1e9)}


def fill(folder, iterations, steps=3, share=0.2, seed=0):
    """The mixed batches of the last iteration."""
    for iteration in range(1, iterations + 1):
        replay = ReplayBuffer(folder, iteration, share, seed)
        mixed = [replay.mix(step, batch(iteration, step)) for step in range(steps)]
    return mixed


def replayed(mixed, iteration, step):
    """The groups that are not the batch's own; the others have to be in their places."""
    own = batch(iteration, step)['name']
    other = mixed['name'] != own
    np.testing.assert_array_equal(mixed['pair'][0], np.stack([mixed['name'], -mixed['name']], 1))
    return np.flatnonzero(other).tolist(), mixed['name'][other]


def test_the_first_iteration_replays_nothing(tmp_path):
    for step, mixed in enumerate(fill(tmp_path, 1, share=1.0)):
        assert replayed(mixed, 1, step)[0] == []
    found = sorted(path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob('*.npz'))
    assert found == ['1/0.npz', '1/1.npz', '1/2.npz']


@pytest.mark.parametrize(
    ('share', 'size', 'count'),
    [
        (0.0, 10, 0),
        (0.1, 10, 1),
        (0.26, 10, 3),
        (0.24, 10, 2),
        (0.01, 10, 1),
        (0.1, 4, 1),
        (1, 4, 4),
    ],
)
def test_how_many_groups_are_replayed(share, size, count, tmp_path):
    """The last ones of the batch; at least one unless the share is 0."""
    ReplayBuffer(tmp_path, 1, share, 0).mix(0, batch(1, 0, 6))
    given = batch(2, 0, size)
    mixed = ReplayBuffer(tmp_path, 2, share, 0).mix(0, given)
    other = np.flatnonzero(mixed['name'] != given['name'])
    assert other.tolist() == list(range(size - count, size))
    assert np.isin(mixed['name'][other], batch(1, 0, 6)['name']).all()


def test_only_earlier_iterations_are_replayed(tmp_path):
    """All of them, all their steps and all their groups have a chance; each leaf goes along."""
    seen = set()
    for seed in range(4):
        folder = tmp_path / str(seed)
        for step, mixed in enumerate(fill(folder, 3, share=1.0, seed=seed)):
            places, names = replayed(mixed, 3, step)
            assert places == list(range(SIZE))
            seen |= {round(name * 100) for name in names}
    assert {name // 1000 for name in seen} == {10, 11, 12, 20, 21, 22}
    assert {name % 100 for name in seen} == set(range(SIZE))


def test_what_is_kept_is_what_was_sampled(tmp_path):
    """Not what was replayed into it, so that old samples do not multiply."""
    fill(tmp_path, 2, share=1.0)
    with np.load(tmp_path / '2' / '1.npz') as kept:
        np.testing.assert_array_equal(kept['arr_0'], batch(2, 1)['name'])


def test_a_repeated_step_replays_the_same(tmp_path):
    mixed = fill(tmp_path, 2, share=0.5)
    for step in (2, 1):  # also after later ones have been kept
        again = ReplayBuffer(tmp_path, 2, 0.5, 0).mix(step, batch(2, step))
        np.testing.assert_array_equal(again['name'], mixed[step]['name'])
    assert not list(tmp_path.rglob('partial*'))


def test_steps_and_seeds_replay_different_groups(tmp_path):
    first = [replayed(m, 2, k)[1].tolist() for k, m in enumerate(fill(tmp_path / 'a', 2, share=1))]
    other = fill(tmp_path / 'b', 2, share=1, seed=1)
    assert first[0] != first[1] != first[2]
    assert replayed(other[0], 2, 0)[1].tolist() != first[0]


def test_the_given_batch_is_left_alone(tmp_path):
    fill(tmp_path, 1)
    given = batch(2, 0)
    ReplayBuffer(tmp_path, 2, 1.0, 0).mix(0, given)
    np.testing.assert_array_equal(given['name'], batch(2, 0)['name'])


@pytest.mark.parametrize('share', [-0.1, 1.1, float('nan')])
def test_a_share_out_of_range(share, tmp_path):
    with pytest.raises(
        ValueError, match=f'reward_model.replay={share} is out of range: make it 0 to 1'
    ):
        ReplayBuffer(tmp_path, 1, share, 0)


def test_files_of_others_and_of_a_killed_run_are_not_replayed(tmp_path):
    expected = fill(tmp_path / 'a', 2)
    fill(tmp_path / 'b', 1)
    for name in ('partial.npz', '0.partial', 'notes.npz', '1 (copy).npz'):
        (tmp_path / 'b' / '1' / name).write_bytes(b'PK')
    found = [ReplayBuffer(tmp_path / 'b', 2, 0.2, 0).mix(step, batch(2, step)) for step in range(3)]
    for ours, theirs in zip(found, expected, strict=True):
        np.testing.assert_array_equal(ours['name'], theirs['name'])


@pytest.mark.parametrize('damage', ['empty', 'short', 'bit'])
def test_a_damaged_file_is_named(tmp_path, damage):
    fill(tmp_path, 1, steps=1)
    path = tmp_path / '1' / '0.npz'
    data = bytearray(path.read_bytes())
    data[200] ^= 1
    path.write_bytes({'empty': b'', 'short': data[:300], 'bit': data}[damage])
    with pytest.raises(ValueError, match=r'0\.npz is damaged \(.*\): restore it'):
        ReplayBuffer(tmp_path, 2, 0.2, 0).mix(0, batch(2, 0))
