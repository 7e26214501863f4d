"""The tokens of a run: template variables, dates, unknown ids, ends, stops and shown tags."""

import dataclasses
import datetime
import json

import folders
import jax
import numpy as np
import pytest

from grpo_jax.run import checkpoint, export, grading, parameters, problems, setup
from grpo_jax.run.tokenization import end_ids, vocabulary
from grpo_jax.types import Sampling

DATED = "{{ strftime_now('%d %b %Y') }}: " + folders.CHATML
THINKING = folders.CHATML.replace(
    'assistant\n{% endif %}', 'assistant\n{% if not enable_thinking %}<think>{% endif %}{% endif %}'
)


def dated_tokenizer(template=DATED, special=()):
    tokenizer = folders.chat_tokenizer()
    tokenizer.add_special_tokens({'additional_special_tokens': list(special)}, False)
    tokenizer.chat_template = template
    return tokenizer


def make(tmp_path, *, tokenizer=None, data=None, questions=('one', 'two'), **options):
    """(config, setup, held-out problems) of a run from a checkpoint."""
    source = folders.write(tmp_path / 'model', tokenizer=tokenizer, **options)
    rows = folders.rows(tmp_path / 'rows', train=['train'], test=questions)
    config = folders.get_config(source, **rows, **(data or {}))
    config.data.update(prompt_length=512, completion_length=6)
    config.eval.update(batch_size=1)
    prepared = setup.prepare(config, tmp_path / 'run')
    return config, prepared, problems.heldout_problems(prepared)


def prompt_of(prepared, heldout, row=0):
    ids = heldout.table.tokens[row, : heldout.table.length[row]]
    return prepared.tokenizer.decode(ids)


# Chat templates


def test_the_date_of_the_start_is_kept(tmp_path):
    config, prepared, heldout = make(tmp_path, tokenizer=dated_tokenizer(), data={'chat': True})
    today = datetime.date.today()
    assert (config.data.date, prepared.config.data.date) == (None, today.isoformat())
    assert prompt_of(prepared, heldout).startswith(today.strftime('%d %b %Y: <|im_start|>user'))
    # The run was started on another day, and is resumed by the same config.
    started = prepared.config.copy_and_resolve_references()
    started.data.date = '2020-02-03'
    workdir = tmp_path / 'run'
    workdir.mkdir(exist_ok=True)
    checkpoint.claim_workdir(workdir, started)
    _, resumed = checkpoint.check_workdir(str(workdir), config)
    again = setup.prepare(resumed, workdir)
    assert again.config.data.date == '2020-02-03'
    assert prompt_of(again, problems.heldout_problems(again)).startswith('03 Feb 2020: ')


def test_exports_have_the_template_of_the_tokenizer(tmp_path):
    tokenizer = dated_tokenizer()
    tokenizer.save_pretrained(tmp_path / 'dated')
    config, prepared, _ = make(
        tmp_path, tokenizer=tokenizer, data={'chat': True, 'date': '2020-02-03'}
    )
    assert prepared.tokenizer.chat_template != DATED
    config.tokenizer = str(tmp_path / 'dated')  # so that it is saved anew
    folders.pretend(config, tmp_path / 'trained', parameters.initial_params(prepared))
    export.export(config, str(tmp_path / 'trained'), str(tmp_path / 'out'))
    assert (tmp_path / 'out' / 'chat_template.jinja').read_text() == DATED


def test_no_date_is_recorded_without_need(tmp_path):
    tokenizer = folders.chat_tokenizer()
    _, prepared, _ = make(tmp_path, tokenizer=tokenizer, data={'chat': True})
    assert prepared.config.data.date is None
    config = folders.get_config(tmp_path / 'model', date='2020-02-31', chat=True)
    with pytest.raises(ValueError, match=r"data.date='2020-02-31': write it as '2026-01-31'"):
        setup.prepare(config, tmp_path / 'other')


def test_variables_and_prefix_reach_the_prompts(tmp_path):
    data = {'chat': True, 'chat_template_kwargs': {'enable_thinking': False}}
    data |= {'assistant_prefix': 'Let me see: <b>'}
    _, prepared, heldout = make(tmp_path, tokenizer=dated_tokenizer(THINKING), data=data)
    assert prompt_of(prepared, heldout) == (
        '<|im_start|>user\none<|im_end|>\n<|im_start|>assistant\n<think>Let me see: <b>'
    )
    data['chat_template_kwargs'] = {'enable_thinking': True}
    config = folders.get_config(tmp_path / 'model', **data)
    config.data.chat = False
    with pytest.raises(ValueError, match=r'data.chat_template_kwargs has no effect with data.chat'):
        setup.prepare(config, tmp_path / 'other')


def test_the_prefix_without_a_chat_template(tmp_path):
    data = {'prompt': 'Q: {question} A:', 'assistant_prefix': ' <think>'}
    _, prepared, heldout = make(tmp_path, data=data)
    assert prompt_of(prepared, heldout, 1) == 'Q: two A: <think>'


# Ids without an embedding, and embeddings without a token


def test_only_tokens_in_use_need_an_embedding(tmp_path):
    """Gemma 3 1B has a token for images more than embeddings: it is in no prompt."""
    _, prepared, _ = make(tmp_path, tokenizer=folders.chat_tokenizer(), vocab_size=259)
    assert prepared.model.config.token_ranges == ()
    message = "'<.im_end.>' is token 259 of the tokenizer, but the checkpoint embeds 259 tokens"
    with pytest.raises(ValueError, match=message):
        make(
            tmp_path / 'used', tokenizer=folders.chat_tokenizer(), vocab_size=259,
            questions=['one', 'end with <|im_end|>'],
        )  # fmt: skip


def test_the_ranges_of_a_vocabulary():
    tokenizer = folders.chat_tokenizer()  # 260 tokens
    ends = np.array([257])
    assert vocabulary(tokenizer, ends) == {'vocab_size': 260, 'token_ranges': ()}
    assert vocabulary(tokenizer, ends, 260) == {'vocab_size': 260, 'token_ranges': ()}
    assert vocabulary(tokenizer, ends, 259) == {'vocab_size': 259, 'token_ranges': ()}
    assert vocabulary(tokenizer, ends, 264)['token_ranges'] == ((0, 260),)
    # An end that the checkpoint names can be sampled, whatever the tokenizer knows.
    found = vocabulary(tokenizer, np.array([257, 262, 900]), 264)
    assert found['token_ranges'] == ((0, 260), (262, 263))


def sampled(prepared, heldout, rows, group_size=64):
    params = parameters.initial_params(prepared)
    prompts = heldout.table.select(np.array(rows))
    return jax.device_get(
        prepared.sampler(params, prompts, step=0, sampling=Sampling(), group_size=group_size)
    )


def test_ids_beyond_the_tokenizer_are_never_sampled(tmp_path):
    likely = [97, 98, 260, 261, 262, 263]
    _, prepared, heldout = make(
        tmp_path, tokenizer=folders.chat_tokenizer(), params=folders.writing(*likely),
        tied_head=False,
    )  # fmt: skip
    assert prepared.model.config.token_ranges == ((0, 260),)
    rollout = sampled(prepared, heldout, [0])
    assert set(rollout.tokens[rollout.mask]) == {97, 98}
    np.testing.assert_allclose(rollout.logprobs[rollout.mask], np.log(0.5), atol=1e-5)


def test_the_same_row_twice_has_different_completions(tmp_path):
    _, prepared, heldout = make(
        tmp_path, params=folders.writing(*range(97, 123)), tied_head=False
    )  # fmt: skip
    rollout = sampled(prepared, heldout, [0, 1, 0], group_size=4)
    tokens = rollout.tokens.reshape(12, -1)
    assert len(np.unique(tokens, axis=0)) == 12
    np.testing.assert_array_equal(
        rollout.tokens[:2], sampled(prepared, heldout, [0, 1], group_size=4).tokens
    )


# Ends


@pytest.mark.parametrize(
    ('generation', 'expected'),
    [
        (None, [257, 65, 66]),
        ({'temperature': 0.5}, [257, 65, 66]),
        ({'eos_token_id': None}, [257, 65, 66]),
        ({'eos_token_id': 67}, [257, 67]),
    ],
)
def test_ends_in_the_config_count_where_no_others_are_stated(generation, expected, tmp_path):
    fields = {'eos_token_id': [65, 66, 257]}
    config, prepared, _ = make(tmp_path, generation=generation, fields=fields)
    assert sorted(prepared.ends) == sorted(expected)
    assert sorted(end_ids(config, prepared.tokenizer, tmp_path / 'model')) == sorted(expected)
    params = parameters.initial_params(prepared)
    folders.pretend(config, tmp_path / 'trained', params)
    export.export(config, str(tmp_path / 'trained'), str(tmp_path / 'out'))
    settings = json.loads((tmp_path / 'out' / 'generation_config.json').read_text())
    assert sorted(settings['eos_token_id']) == sorted(expected)
    assert json.loads((tmp_path / 'out' / 'config.json').read_text())['eos_token_id'] == [
        65, 66, 257,
    ]  # fmt: skip


def test_stops_that_are_special_tokens_end_completions(tmp_path):
    letters = [*b'ab', folders.IM_START]
    tokenizer = folders.chat_tokenizer()
    config, prepared, heldout = make(
        tmp_path, tokenizer=tokenizer, params=folders.writing(*letters), tied_head=False,
        data={'stops': ('<|im_start|>', 'bb')},
    )  # fmt: skip
    rollout = sampled(prepared, heldout, [0])
    for tokens, mask, ended in zip(
        rollout.tokens[0], rollout.mask[0], rollout.ended[0], strict=True
    ):
        used = tokens[mask].tolist()
        ends = used[-1] == folders.IM_START or used[-2:] == [98, 98]
        assert ended == ends
        assert folders.IM_START not in used[:-1]
    texts = grading.grade_texts(rollout, heldout, {}, {})
    assert not any('<' in text for text in texts.completions)
    config.data.stops = ('<|im_start|>user',)
    with pytest.raises(ValueError, match=r"contains the special token '<.im_start.>', which is no"):
        setup.prepare(config, tmp_path / 'run')


# Tags


def test_rewards_see_the_tags_of_the_prompt_format(tmp_path):
    special = ['<think>', '</think>']
    letters = [*b'ab', 260, 261]
    data = {'prompt': '{question} Think between <think> and </think>.'}
    config, prepared, heldout = make(
        tmp_path, tokenizer=dated_tokenizer(None, special), params=folders.writing(*letters),
        tied_head=False, data=data,
    )  # fmt: skip
    seen = []

    def reward(prompts, completions, **columns):
        seen.extend(completions)
        return [float('<think>' in text) for text in completions]

    rollout = sampled(prepared, heldout, [0])
    scores = grading.grade_texts(rollout, heldout, {'tags': reward}, {'tags': 1.0}).scores
    spelled = {97: 'a', 98: 'b', 260: '<think>', 261: '</think>'}
    expected = [
        ''.join(spelled[token] for token in row[used].tolist())
        for row, used in zip(rollout.tokens[0], rollout.mask[0], strict=True)
    ]
    assert seen == expected
    assert 0 < scores.total.mean() < 1
    config.data.visible_tokens = ()
    hiding = setup.prepare(config, tmp_path / 'run')
    assert {260, 261} <= hiding.hidden
    again = dataclasses.replace(prepared, hidden=hiding.hidden)
    texts = grading.grade_texts(rollout, problems.heldout_problems(again), {}, {}).completions
    assert texts == [text.replace('<think>', '').replace('</think>', '') for text in expected]
