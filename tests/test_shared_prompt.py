"""Who sees what in a group, entry by entry, and when two masks are the same."""

import numpy as np

from grpo_jax.models.kernels.shared_prompt import SharedPromptMask


def test_a_query_sees_the_prompt_and_its_completion_up_to_itself():
    rows, size, past = 3, 4, 5
    expected = np.zeros((12, 17), bool)
    for g, i in np.ndindex(rows, size):
        expected[g * size + i, :past] = True
        for j in range(i + 1):
            expected[g * size + i, past + g * size + j] = True
    mask = SharedPromptMask(rows, size, past)
    assert mask.shape == expected.shape
    np.testing.assert_array_equal(mask[:, :], expected)
    for q, k, queries, keys in np.ndindex(12, 17, 6, 6):  # blocks at all offsets
        block = slice(q, q + queries + 1), slice(k, k + keys + 1)
        np.testing.assert_array_equal(mask[block], expected[block])


def test_equal_masks_are_one():
    """So that they are worked through once, for all heads and layers."""
    mask = SharedPromptMask(3, 4, 5)
    assert mask == SharedPromptMask(3, 4, 5)
    assert hash(mask) == hash(SharedPromptMask(3, 4, 5))
    assert mask != SharedPromptMask(4, 3, 5)
