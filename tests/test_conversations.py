"""Columns of conversations: prompts with their history, demonstrations, and malformed rows."""

import pytest
from test_prompts import CHATML, NO_SYSTEM, SPACED, chat_tokenizer

from grpo_jax import data
from grpo_jax.data import prompt_conversations, prompt_messages, render_prompts
from grpo_jax.data.conversations import demonstration_of, is_conversation, prompt_column
from grpo_jax.data.questions import key_of, without_leaks


def message(role, content):
    return {'role': role, 'content': content}


ASKED = [message('user', '1+1?'), message('assistant', '2'), message('user', '2+2?')]
SYSTEM = message('system', 'Be brief.')


def rendered(*turns, start='assistant'):
    text = ''.join(f'<|im_start|>{m["role"]}\n{m["content"]}<|im_end|>\n' for m in turns)
    return f'{text}<|im_start|>{start}\n'


def test_a_history_goes_through_the_chat_template():
    tokenizer = chat_tokenizer(CHATML)
    rows = [{'prompt': ASKED, 'answer': 4}, {'prompt': [SYSTEM, *ASKED], 'answer': 4}]
    expected = [rendered(*ASKED), rendered(SYSTEM, *ASKED)]
    assert render_prompts('{prompt}', rows, chat=tokenizer) == expected
    assert render_prompts('{question}', rows, chat=tokenizer) == expected  # the only conversation
    oracle = tokenizer.apply_chat_template(
        [row['prompt'] for row in rows], tokenize=False, add_generation_prompt=True
    )
    assert expected == oracle
    assert prompt_conversations('{prompt}', rows) == [row['prompt'] for row in rows]


def test_a_last_message_of_the_assistant():
    tokenizer = chat_tokenizer(CHATML)
    turns = [ASKED[0], message('assistant', 'It is')]
    (text,) = render_prompts('{prompt}', [{'prompt': turns}], chat=tokenizer)  # is continued
    assert text == rendered(ASKED[0]) + 'It is'
    assert text == tokenizer.apply_chat_template(turns, tokenize=False, continue_final_message=True)
    (text,) = render_prompts('{messages}', [{'messages': turns}], chat=tokenizer)  # is the answer
    assert text == rendered(ASKED[0])
    assert prompt_conversations('{messages}', [{'messages': turns}]) == [turns[:1]]


def test_the_system_message_of_the_config():
    tokenizer = chat_tokenizer(CHATML)
    rows = [{'prompt': ASKED}, {'prompt': [SYSTEM, *ASKED]}]
    other = message('system', 'Think.')
    expected = [rendered(other, *ASKED), rendered(SYSTEM, *ASKED)]
    assert render_prompts('{prompt}', rows, chat=tokenizer, system='Think.') == expected


def test_content_in_parts():
    parts = [{'type': 'text', 'text': 'a'}, {'type': 'text', 'text': 'b'}]
    rows = [{'prompt': [message('user', parts)]}]
    tokenizer = chat_tokenizer(CHATML)
    assert render_prompts('{prompt}', rows, chat=tokenizer) == [rendered(message('user', 'ab'))]


def test_demonstrations():
    tokenizer = chat_tokenizer(CHATML)
    end = tokenizer.convert_tokens_to_ids('<|im_end|>')
    options = {'prompt_length': 90, 'completion_length': 9, 'chat': True}
    turns = [*ASKED, message('assistant', '4')]
    split = {'prompt': ASKED, 'completion': [turns[-1]]}
    for rows, template, completion in (
        ([{'messages': turns}], '{messages}', '{messages}'),
        ([{'messages': turns}], '{question}', '{demonstration}'),
        ([split], '{prompt}', '{completion}'),
        ([split], '{question}', '{demonstration}'),
    ):
        table = data.tokenize_demonstrations(
            rows, tokenizer, template=template, completion_template=completion, **options
        )
        assert table.tokens[0, table.mask[0]].tolist() == [*b'4', end]
        length = table.prompts.length[0]
        assert tokenizer.decode(table.prompts.tokens[0, :length]) == rendered(*ASKED)
    with pytest.raises(ValueError, match=r"row 0: column 'messages' does not end with a text of"):
        data.tokenize_demonstrations(
            [{'messages': ASKED}], tokenizer, template='{messages}',
            completion_template='{messages}', **options,
        )  # fmt: skip


@pytest.mark.parametrize(
    ('bad', 'text'),
    [
        ('text', "row 1: column 'prompt' is not a list of messages .*, but 'text'"),
        ([], r"row 1: column 'prompt' is not a list of messages .*, but \[\]"),
        ([{'content': 'x'}], "row 1: column 'prompt' is not a list of messages"),
        (None, "row 1: column 'prompt' is not a list of messages .*, but None"),
        ([SYSTEM], "row 1: column 'prompt' has no message that can be answered"),
        ([message('user', 3)], "row 1: column 'prompt' has a message whose content is 3"),
        ([message('user', None)], "row 1: column 'prompt' has a message whose content is None"),
        (
            [message('user', [{'type': 'image', 'image': 'x'}])],
            "row 1: column 'prompt' has a message with other parts than text",
        ),
    ],
)
def test_malformed_conversations(bad, text):
    rows = [{'prompt': ASKED}, {'prompt': bad}]
    with pytest.raises(ValueError, match=text):
        render_prompts('{prompt}', rows, chat=chat_tokenizer(CHATML))


def test_templates_that_do_not_fit_conversations():
    row = {'prompt': ASKED}
    with pytest.raises(ValueError, match=r'is a column of conversations, .* set data.chat=True'):
        render_prompts('{prompt}', [row])
    with pytest.raises(ValueError, match='a column of conversations has to stand alone'):
        render_prompts('Question: {prompt}', [row], chat=chat_tokenizer(CHATML))
    with pytest.raises(ValueError, match='a column of conversations has to'):
        render_prompts('{prompt}', [{'prompt': 'text'}, row], chat=chat_tokenizer(CHATML))
    rows = [row, {'prompt': [SYSTEM, *ASKED]}]
    with pytest.raises(ValueError, match='row 1: the chat template rejects the system message'):
        render_prompts('{prompt}', rows, chat=chat_tokenizer(NO_SYSTEM))
    deaf = chat_tokenizer(SPACED.replace('else', "elif m.role == 'assistant'"))
    with pytest.raises(ValueError, match=r'row 1: the chat template leaves out .*Be brief'):
        render_prompts('{prompt}', rows, chat=deaf)
    with pytest.raises(ValueError, match='row 0: the chat template fails: TypeError'):
        render_prompts('{prompt}', [row], chat=chat_tokenizer('{{ messages[0].content + 1 }}'))


def test_which_column_is_the_prompt():
    turns, text = ASKED, 'text'
    assert prompt_column('{prompt}', {'prompt': turns}) == 'prompt'
    assert prompt_column('{turns}', {'turns': turns}) == 'turns'
    assert prompt_column('{question}', {'messages': turns, 'prompt': text}) == 'messages'
    assert prompt_column('{question}', {'messages': turns, 'question': text}) is None
    assert prompt_column('{prompt}', {'prompt': text}) is None
    assert prompt_column('gsm8k_8shot', {'prompt': turns}) is None
    assert not is_conversation([])
    assert not is_conversation([7, 7])
    assert not is_conversation('role')


def test_texts_as_messages():
    rows = [{'question': 'a'}]
    assert prompt_messages('{question}!', rows, system='S') == [
        [message('system', 'S'), message('user', 'a!')]
    ]
    assert prompt_messages('{prompt}', [{'prompt': ASKED}]) == [ASKED]
    assert prompt_conversations('{question}', rows) is None
    assert prompt_conversations('{question}', []) is None


@pytest.mark.parametrize('template', ['{qestion}', '{problem}', '{text}'])
def test_only_the_default_template_stands_for_other_columns(template):
    """A template that names a missing column would have no effect."""
    problem = (
        r"template '\{\w+\}' does not fit the data .KeyError: '\w+'.: the columns are \{prompt"
    )
    rows = [{'prompt': ASKED, 'completion': [message('assistant', '4')]}]
    assert prompt_column('{question}', rows[0]) == 'prompt'
    assert prompt_column(template, rows[0]) is None
    with pytest.raises(ValueError, match=problem):
        render_prompts(template, rows)
    with pytest.raises(ValueError, match=problem):
        prompt_messages(template, rows)
    assert demonstration_of('{demonstration}', rows[0], 0) == '4'
    assert demonstration_of(template, rows[0], 0) is None


def test_leaks_of_conversations():
    answered = [*ASKED, message('assistant', '4')]
    other = [*ASKED[:2], message('user', '3+3?')]
    training = [{'messages': answered}, {'messages': [*other, message('assistant', '6')]}]
    heldout = [{'messages': [*ASKED, message('assistant', 'four')]}]
    assert without_leaks(training, heldout) == (training[1:], 1)
    assert key_of({'prompt': 'A B ?'}) == key_of({'question': 'a b?'})
    assert key_of({'question': 7}) == '7'


def test_conversations_in_files(tmp_path):
    lines = [{'prompt': [message('user', f'{n}?')], 'target': n} for n in range(10)]
    (tmp_path / 'train.jsonl').write_text('\n'.join(map(data.values.json_text, lines)))
    options = {'folder': tmp_path, 'cache_dir': tmp_path / 'cache', 'heldout': 3}
    training, heldout = (list(data.load('jsonl', s, **options)) for s in ('train', 'heldout'))
    assert sorted(row['target'] for row in training + heldout) == [*range(10)]
    assert len(heldout) == 3
    assert all(row in lines for row in training)
