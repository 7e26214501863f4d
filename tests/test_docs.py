"""The documentation: links, examples, commands, and that nothing is missing from its tables."""

import importlib
import os
import pathlib
import re
import shlex
import subprocess
import sys
import tomllib

import pytest

import grpo_jax
from docs.hooks import tables
from grpo_jax import data, rewards
from grpo_jax.run import arguments, evaluation, key_help, methods, problems
from grpo_jax.run import config as run_config
from grpo_jax.run import defaults as run_defaults

ROOT = pathlib.Path(__file__).parents[1]
DOCS = sorted((ROOT / 'docs').rglob('*.md'))
PAGES = [ROOT / 'README.md', ROOT / 'CHANGELOG.md', *DOCS]
FENCE = re.compile(r'^```(\w*)\n(.*?)^```$', re.DOTALL | re.MULTILINE)
LINK = re.compile(r'\[[^\]]*\]\(([^)\s]+)\)')
NAMED_FILE = re.compile(r'(?:configs|benchmarks|tests|notebooks|grpo_jax|docs|\.ci)/[\w./]+\w')


def name(page):
    return str(page.relative_to(ROOT))


def blocks(page, language):
    return [code for found, code in FENCE.findall(page.read_text()) if found == language]


def prose(page):
    return FENCE.sub('', page.read_text())


def anchors(page):
    """The anchors of a page's headings, as GitHub and MkDocs make them."""
    headings = re.findall(r'^#+ (.*)$', prose(page), re.MULTILINE)
    return {re.sub(r'[^\w\- ]', '', text).strip().lower().replace(' ', '-') for text in headings}


@pytest.mark.parametrize('page', PAGES, ids=name)
def test_links_lead_somewhere(page):
    for link in LINK.findall(prose(page)):
        if ':' in link:
            continue
        path, _, anchor = link.partition('#')
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), f'{link}: no such file'
        assert not anchor or anchor in anchors(target), f'{link}: no such heading'


@pytest.mark.parametrize('page', PAGES, ids=name)
def test_named_files_exist(page):
    for path in NAMED_FILE.findall(page.read_text()):
        if page.name != 'CHANGELOG.md' or not path.startswith('grpo_jax/'):
            assert (ROOT / path).exists(), f'{path}: no such file'


@pytest.mark.parametrize('page', [p for p in PAGES if blocks(p, 'python')], ids=name)
def test_examples_run(page, capsys):
    """The examples of a page, one after the other; `config` has the defaults at first."""
    namespace = {'__name__': 'example', 'config': run_config.defaults()}
    for number, code in enumerate(blocks(page, 'python')):
        exec(compile(code, f'{name(page)}, example {number}', 'exec'), namespace)
        if 'def get_config' in code:
            config = namespace['get_config']()
            methods.algorithm_of(config)
            evaluation.evaluation_options(config.eval)
            rewards.build(config.grpo.rewards)
    if page.name == 'README.md':
        documented = (ROOT / 'docs/metrics.md').read_text()
        missing = [key for key in namespace['metrics'] if f'`{key}`' not in documented]
        assert not missing
        assert namespace['metrics']['reward'] > 0.9


def test_own_data_and_reward_from_start_to_end(tmp_path, monkeypatch):
    """The three files of the page work together, from any folder."""
    page = (ROOT / 'docs/data.md').read_text().partition('## Your own data and reward')[2]
    (tmp_path / 'mine').mkdir()
    names = ('train.jsonl', 'my_reward.py', 'config.py')
    for file, (_, code) in zip(names, FENCE.findall(page), strict=False):
        (tmp_path / 'mine' / file).write_text(code)
    monkeypatch.chdir(tmp_path)
    config, _ = arguments.parse(['--config=mine/config.py', '--workdir=runs/mine'])
    rows = problems.load_rows(config, tmp_path / 'runs', 'train')
    monkeypatch.chdir('/')
    functions, weights = rewards.build(config.grpo.rewards)
    rewards.check_arguments(functions, list(rows[0]))
    columns = {'target': [14, 14, 14], 'nums': [[7, 7]] * 3, 'question': ['q'] * 3}
    texts = ['7+7=14', '14', '7']
    scores = rewards.score(functions, weights, prompts=texts, completions=texts, columns=columns)
    # The target with a number and 4 of 6 digits, the target alone, and a digit.
    assert scores.total.tolist() == pytest.approx([1 + 0.5 * 4 / 6, 0.5 + 0.5, 0 + 0.5])
    assert len(rows) == 3


def test_the_tokenizer_with_a_chat_template(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    page = (ROOT / 'docs/data.md').read_text().partition('## Conversations')[2]
    (code,) = [code for _, code in FENCE.findall(page) if 'save_pretrained' in code]
    exec(compile(code, 'docs/data.md', 'exec'), {})
    files = {path.name for path in (tmp_path / 'my_tokenizer').iterdir()}
    assert files == {'tokenizer.json', 'tokenizer_config.json', 'chat_template.jinja'}
    tokenizer = data.load_tokenizer('my_tokenizer')
    rows = [{'prompt': [{'role': 'user', 'content': 'Is 2 < π?'}]}]
    (prompt,) = data.render_prompts('{prompt}', rows, chat=tokenizer)
    assert prompt == 'user: Is 2 < π?<|end|>assistant: '
    ids = tokenizer.encode(prompt, add_special_tokens=False)
    assert len(ids) == len(prompt.encode()) - len('<|end|>') + 1
    assert tokenizer.decode(ids) == prompt
    assert data.turn_end(tokenizer) == ('', tokenizer.eos_token_id)


COMMANDS = [
    (page, line)
    for page in PAGES
    for code in blocks(page, 'bash')
    for line in code.replace('\\\n', ' ').splitlines()
]


@pytest.mark.parametrize(('page', 'line'), COMMANDS, ids=[line[:60] for _, line in COMMANDS])
def test_commands_name_what_exists(page, line):
    for command in re.split(r'&&|\|', line):
        words = [word for word in shlex.split(command) if not re.match(r'[A-Z_]+=', word)]
        if words[:2] == ['pip', 'install']:
            extras = re.findall(r'\.\[([\w,]+)\]', command)
            known = tomllib.loads((ROOT / 'pyproject.toml').read_text())['project']
            assert set(','.join(extras).split(',')) <= {*known['optional-dependencies'], ''}
        if words[:1] == ['python']:
            check_command(words[1:])


def check_command(words):
    """A script or module that exists, with options that its source or docstring names."""
    if words[0] == '-m':
        script, arguments = words[1], words[2:]
        if script == 'venv':
            return
        source = importlib.util.find_spec(script).origin
    else:
        source, arguments = ROOT / words[0], words[1:]
    documented = pathlib.Path(source).read_text()
    for argument in arguments:
        option, _, value = argument.removeprefix('--').partition('=')
        if option.startswith('config.'):
            key = option.removeprefix('config.')
            known = run_config.flatten(run_config.defaults())
            assert key in known or key.startswith(run_defaults.FREE), f'unknown key {key}'
        else:
            assert f'--{option}' in documented or f'{option!r}' in documented, f'unknown {argument}'
        if option == 'config':
            assert (ROOT / value.partition('.py')[0]).with_suffix('.py').exists()


def test_the_readme_is_short():
    assert len((ROOT / 'README.md').read_text().splitlines()) <= 150
    example = blocks(ROOT / 'README.md', 'python')[0]
    assert len(example.strip().splitlines()) <= 25


def test_every_config_key_is_described():
    descriptions = key_help.descriptions()
    assert descriptions.keys() == run_config.flatten(run_config.defaults()).keys()
    assert not [key for key, text in descriptions.items() if len(text) < 3]
    page = tables.config_keys()
    for key in descriptions:
        shown = f'optimizer.{key.rpartition(".")[2]}' if '.optimizer.' in key else key
        assert f'| `{shown}` |' in page


def test_every_preset_names_its_source():
    rows = tables.TABLES['presets']().splitlines()[2:]
    assert len(rows) == len(grpo_jax.presets.PRESETS)
    assert not [row for row in rows if row.endswith('|  |')]


def test_every_public_name_is_in_the_reference():
    reference = (ROOT / 'docs/api/index.md').read_text()
    missing = [name for name in grpo_jax.__all__ if f'`{name}`' not in reference]
    assert not missing


def test_every_metric_is_defined():
    documented = (ROOT / 'docs/metrics.md').read_text() + (ROOT / 'docs/evaluation.md').read_text()
    groups = 'clip_ratio|completions|critic|perf|refill|rewards|sampling|timing|trust_region'
    used = set()
    for path in (ROOT / 'grpo_jax').rglob('*.py'):
        used |= set(re.findall(rf"'((?:{groups})/[\w/]+)'", path.read_text()))
    assert len(used) > 30
    assert not [metric for metric in used if f'`{metric}`' not in documented]


@pytest.mark.slow
def test_the_site_builds(tmp_path):
    """Offline, with warnings as errors; pages have their generated parts and formulas."""
    environment = os.environ | {'JAX_PLATFORMS': 'cpu', 'NO_MKDOCS_2_WARNING': '1'}
    command = [sys.executable, '-m', 'mkdocs', 'build', '--strict', '-q', '-d', str(tmp_path)]
    process = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr[-4000:]
    pages = {path: path.read_text() for path in tmp_path.rglob('*.html')}
    assert len(pages) > len(DOCS)
    for path, text in pages.items():
        assert '<!-- table:' not in text, path
        assert '<!-- source:' not in text, path
        assert 'class="arithmatex"' not in text, path
        assert not re.search(r'<(script|link|img)[^>]+(src|href)="https?://', text), path
    assert '<math' in pages[tmp_path / 'concepts/advantages/index.html']
    assert 'grpo.algorithm.clip_high' in pages[tmp_path / 'config/index.html']
