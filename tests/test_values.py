"""Values of columns: their types and the spelling of their numbers."""

import copy
import json
import pickle

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest

from grpo_jax.data import render_prompts
from grpo_jax.data.values import SpelledFloat, json_text, parse_json, text_of

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda values: st.lists(values) | st.dictionaries(st.text(), values),
    max_leaves=8,
)


@pytest.mark.parametrize(
    'text', ['1e-07', '1e-7', '0.0000001', '0.10', '1E5', '1.0', '-0.0', '12345678901234567890.5']
)
def test_a_number_keeps_its_spelling(text):
    value = parse_json(text)
    assert isinstance(value, float)
    assert value == float(text)
    copies = [value, copy.deepcopy(value), pickle.loads(pickle.dumps(value))]
    for number in copies:
        assert str(number) == f'{number}' == text_of(number) == json_text(number) == text
        assert number + 1 == float(text) + 1
    assert f'{value:.3f}' == f'{float(text):.3f}'
    assert json.loads(json.dumps(value)) == value
    assert np.float32(value) == np.float32(float(text))
    nested = f'{{"a": [{text}, null, true, 3]}}'
    assert json_text(parse_json(nested)) == nested


def test_common_numbers_are_plain():
    values = parse_json('[0.5, 3, 1e-07, true, null, "1e-7"]')
    assert [type(value) for value in values] == [float, int, float, bool, type(None), str]
    assert type(parse_json('1e-7')) is SpelledFloat


def test_text_of_values():
    values = ['x', 7, [7, 7], None, True, {'k': False}, ['é', 1.0], 'null']
    assert [text_of(value) for value in values] == [
        'x', '7', '[7, 7]', 'null', 'true', '{"k": false}', '["é", 1.0]', 'null',
    ]  # fmt: skip


@hypothesis.given(JSON)
def test_json_is_read_as_it_was_written(value):
    assert parse_json(json_text(value)) == value
    assert json_text(parse_json(json.dumps(value, ensure_ascii=False))) == json_text(value)


def test_values_in_prompts():
    row = parse_json('{"nums": [7, 7], "target": 14, "eps": 1e-7, "half": 0.50, "none": null}')
    (text,) = render_prompts('{nums} {target} {eps} {half} {none}', [row])
    assert text == '[7, 7] 14 1e-7 0.50 null'
    assert render_prompts('{nums[0]:02d} {target:+d} {eps:.8f}', [row]) == ['07 +14 0.00000010']
    for template in ('{nums[2]}', '{nums[x]}', '{none[0]}', '{nums:d}'):
        with pytest.raises(ValueError, match='does not fit the data'):
            render_prompts(template, [row])
