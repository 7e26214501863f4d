"""A run from a chat model's checkpoint with the tool `python`, by the config for Qwen3-4B.

The checkpoint is a tiny Qwen3 with a BPE tokenizer and a chat template of its kind. Demonstrations
have taught it to call the tool and to read its reply, as a real one has learned.
"""

import itertools
import json
import re
import shutil

import folders
import pytest
import runs
from test_sandbox import needs_sandbox

from configs import qwen3_4b_python_tool
from grpo_jax import evaluate, show
from grpo_jax.run.config import defaults
from grpo_jax.run.export import export
from grpo_jax.run.replay.output import replay

tokenizers = pytest.importorskip('tokenizers')
transformers = pytest.importorskip('transformers')

pytestmark = [pytest.mark.slow, needs_sandbox]

# As that of Qwen3, without thoughts: tools are in the system message, and their replies in messages
# of the user.
TEMPLATE = """{%- if tools %}{{ '<|im_start|>system\\nCall by <tool_call>: ' }}
{%- for tool in tools %}{{ tool.function.name + '(' }}
{%- for name in tool.function.parameters.properties %}{{ name }}{% endfor %}{{ ')' }}{% endfor %}
{{- '<|im_end|>\\n' }}{% endif -%}
{%- for m in messages -%}
{%- if m.role == 'tool' -%}
{%- if loop.previtem.role != 'tool' %}{{ '<|im_start|>user' }}{% endif -%}
{{- '\\n<tool_response>\\n' + m.content + '\\n</tool_response>' -}}
{%- if loop.last or loop.nextitem.role != 'tool' %}{{ '<|im_end|>\\n' }}{% endif -%}
{%- else %}{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}{% endif -%}
{%- endfor -%}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}
{%- if enable_thinking is defined and enable_thinking is false %}{{ '<think>\\n\\n</think>\\n\\n' }}
{%- endif %}{% endif -%}"""
SPECIAL = ['<|endoftext|>', '<|im_start|>', '<|im_end|>']
NAMES = ('tool_call', 'tool_response', 'think')
MARKS = [mark for name in NAMES for mark in (f'<{name}>', f'</{name}>')]  # not special
SCHEMA = {
    'type': 'function',
    'function': {'name': 'python', 'parameters': {'properties': {'code': {'type': 'string'}}}},
}


def call(a, b):
    arguments = json.dumps({'name': 'python', 'arguments': {'code': f'{a} * {b}'}})
    return f'<tool_call>\n{arguments}\n</tool_call>'


def products(split):
    """Problems in the columns of MATH."""
    rows = [
        {'question': f'What is {a} * {b}?', 'answer': str(a * b), 'product': (a, b)}
        for a, b in itertools.product(range(2, 8), repeat=2)
    ]
    return {'train': rows[::2] + rows[1::2], 'test500': rows[:8]}.get(split)


def conversations(split):
    """Demonstrations of both turns, with the prompts that the config for Qwen3-4B makes."""
    template = qwen3_4b_python_tool.get_config().data.prompt
    rows = []
    for row in products('train'):
        asked = {'role': 'user', 'content': template.format(question=row['question'])}
        called = {'role': 'assistant', 'content': call(*row['product'])}
        reply = {'role': 'tool', 'name': 'python', 'content': row['answer']}
        said = {'role': 'assistant', 'content': f'\\boxed{{{row["answer"]}}}'}
        rows += [{'messages': [asked, called]}, {'messages': [asked, called, reply, said]}]
    return rows if split == 'train' else None


def make_tokenizer():
    """Byte-level BPE, as Qwen's."""
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = tokenizers.decoders.ByteLevel()
    rows = conversations('train')
    texts = [TEMPLATE, *(m['content'] for row in rows for m in row['messages'])]
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=SPECIAL,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        eos_token='<|im_end|>',
        pad_token='<|endoftext|>',
        additional_special_tokens=SPECIAL[1:2],
    )
    tokenizer.add_tokens(MARKS)
    tokenizer.chat_template = TEMPLATE
    return tokenizer


@pytest.fixture(scope='module')
def pretrained(tmp_path_factory):
    """A checkpoint that calls the tool: SFT of a random one, exported."""
    folder = tmp_path_factory.mktemp('pretrained')
    tokenizer = make_tokenizer()
    end, pad = map(tokenizer.convert_tokens_to_ids, ('<|im_end|>', '<|endoftext|>'))
    random = folders.write(
        folder / 'random', tokenizer=tokenizer, vocab_size=len(tokenizer), width=64, layers=2,
        heads=4, kv_heads=2, head_dim=16, mlp_width=128, qk_norm='head',
        fields={'eos_token_id': end, 'pad_token_id': pad},
    )  # fmt: skip
    config = defaults()
    config.pretrained = str(random)
    config.data.update(
        name='test_chat_with_tools:conversations', prompt='{messages}', chat=True,
        demonstration='{messages}', prompt_length=160, completion_length=48,
        chat_template_kwargs={'enable_thinking': False, 'tools': [SCHEMA]},
    )  # fmt: skip
    config.sft.update(steps=70, batch_size=24)
    config.sft.optimizer.update(learning_rate=3e-3, warmup_steps=10)
    config.grpo.steps = 0
    config.data.heldout_split = ''
    runs.train(config, folder / 'sft')
    export(config, str(folder / 'sft'), str(folder / 'exported'))
    return folder / 'exported'


def get_config(pretrained):
    config = qwen3_4b_python_tool.get_config()
    config.pretrained = str(pretrained)
    config.model.dtype = 'float32'
    config.data.update(
        name='test_chat_with_tools:products', prompt_length=160, completion_length=160
    )
    config.environment.update(turns=3, reply_tokens=48)
    config.grpo.update(steps=3, batch_size=4, group_size=4)
    config.grpo.optimizer.warmup_steps = 0
    config.eval.update(every=3, batch_size=8)
    config.checkpoint.every = 1
    config.log.completions = 16
    return config


@pytest.fixture(scope='module')
def workdir(pretrained, tmp_path_factory):
    workdir = tmp_path_factory.mktemp('tool') / 'run'
    runs.train(get_config(pretrained), workdir)
    return workdir


def test_the_model_calls_the_tool_and_reads_its_reply(workdir):
    rows = runs.lines(workdir / 'completions.jsonl')
    assert len(rows) == 3 * 16
    replied, right = 0, 0
    for row in rows:
        first, *others = row['turns']
        if first['outcome'] == 'reply' and first['calls'][0]['arguments']['code'].count('*') == 1:
            a, b = map(int, first['calls'][0]['arguments']['code'].split('*'))
            assert f'<tool_response>\n{a * b}\n</tool_response>' in first['reply']
            assert others
            replied += 1
        asked = re.search(r'What is (.*)\?', row['prompt'])[1]
        answered = f'\\boxed{{{eval(asked)}}}' in row['completion']
        assert answered or row['reward'] == 0
        right += row['reward']
    assert replied > 40
    assert 8 < right < 48


def test_an_episode_is_the_conversation_that_the_template_renders(workdir, pretrained):
    """An oracle that renders the whole conversation at once."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(pretrained)
    special = re.compile('|'.join(map(re.escape, SPECIAL)))
    compared = 0
    for row in runs.lines(workdir / 'completions.jsonl'):
        turns = row['turns']
        if [turn.get('outcome') for turn in turns] != ['reply', 'end']:
            continue
        question = row['prompt'].partition('\nuser\n')[2].partition('\nassistant')[0]
        (sent,) = turns[0]['calls']
        messages = [
            {'role': 'user', 'content': question},
            {'role': 'assistant', 'content': '<think>\n\n</think>\n\n' + turns[0]['text']},
            {'role': 'tool', 'content': str(eval(sent['arguments']['code']))},
        ]
        whole = tokenizer.apply_chat_template(
            messages, tools=[SCHEMA], tokenize=False, add_generation_prompt=True,
            enable_thinking=False,
        )  # fmt: skip
        assert row['prompt'] + turns[0]['text'] + turns[0]['reply'] == special.sub('', whole)
        compared += 1
    assert compared > 30


def test_a_restart_and_a_replay_are_equal_to_the_run(workdir, pretrained, tmp_path, capsys):
    other = tmp_path / 'run'
    shutil.copytree(workdir, other)
    shutil.rmtree(other / 'checkpoints' / 'grpo' / '3')
    runs.train(get_config(pretrained), other)
    runs.assert_same_run(other, workdir, steps=3)
    assert replay(get_config(pretrained), workdir, step='1')
    assert 'equal to the run, bit for bit: 16 completions' in capsys.readouterr().out


def test_it_is_evaluated_and_shown(workdir, pretrained, capsys, tmp_path):
    """The answers with the tool are those of the evaluation in the run."""
    evaluate.main(get_config(pretrained), str(workdir), output=str(tmp_path / 'answers.jsonl'))
    summary = json.loads(capsys.readouterr().out.splitlines()[-1])
    last = runs.lines(workdir / 'heldout.jsonl')[-1]
    assert summary['eval/accuracy'] == last['metrics']['eval/accuracy']
    answers = runs.lines(tmp_path / 'answers.jsonl')
    assert [row['completion'] for row in answers] == last['completions']
    assert sum(row['turns'][0]['outcome'] == 'reply' for row in answers) > 4
    show.main(get_config(pretrained), str(workdir), step='2')
    text = capsys.readouterr().out
    assert re.search(r'python.*\d·\*·\d', text)
    assert '<tool_response>' in text
