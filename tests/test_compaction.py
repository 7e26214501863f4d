"""How many slots are decoded, and when there are fewer; test_sample.py decodes them."""

import itertools

import pytest

from grpo_jax.engine import compaction


def test_slots_of_groups_are_halved():
    """With long prompts, slots are not taken apart from their groups."""
    for size, expected in (
        (24, {24: 24, 13: 24, 12: 12, 7: 12, 6: 6, 4: 6, 3: 3, 2: 2, 1: 2}),
        (7, {7: 7, 5: 7, 4: 4, 3: 4, 1: 2}),
        (2, {2: 2, 1: 2}),  # never fewer than 4 slots of a device
    ):
        for most, rows_left in expected.items():
            shape = compaction.smallest_shape(
                most, 3 * most, compaction.SlotShape(3, size), prompt=10**6, columns=1
            )
            assert shape == compaction.SlotShape(3, rows_left)


@pytest.mark.parametrize(
    ('most', 'total', 'prompt', 'expected'),
    [
        (8, 15, 64, (16, 1, True)),
        (3, 15, 64, (16, 1, True)),
        (2, 15, 64, (8, 2, False)),  # no fewer slots apart
        (8, 17, 64, (32, 1, True)),
        (4, 17, 64, (8, 4, False)),
        (8, 33, 64, (8, 8, False)),
        (8, 15, 768, (16, 1, True)),  # keys: 16 (768 + 128) = 8 (768 + 8 * 128)
        (8, 15, 769, (8, 8, False)),
        (1, 5, 64, (8, 1, False)),
        (1, 1, 64, (4, 1, True)),
        (8, 8, 64, (8, 1, True)),
        (8, 5, 64, (8, 1, True)),
        (8, 2, 64, (4, 1, True)),
        (1, 4, 64, (4, 1, True)),
    ],
)
def test_slots_apart_from_their_groups(most, total, prompt, expected):
    shape = compaction.smallest_shape(most, total, compaction.SlotShape(8, 8), prompt, 128)
    assert shape == compaction.SlotShape(*expected)


@pytest.mark.parametrize('prompt', [1, 40, 500])
def test_thresholds_are_reached_where_there_is_a_smaller_shape(prompt):
    """For all numbers of live slots."""
    for now in itertools.starmap(compaction.SlotShape, itertools.product(range(1, 8), range(1, 8))):
        in_group, in_all = compaction.compaction_thresholds(now, prompt, 64)
        for most in range(1, now.rows + 1):
            for total in range(most, most * now.groups + 1):
                smaller = compaction.smallest_shape(most, total, now, prompt, 64)
                assert (smaller != now) == (most <= in_group or total <= in_all)
                size = smaller.groups * smaller.rows
                assert smaller == now or total <= size < now.groups * now.rows
