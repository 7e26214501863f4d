"""The environments that come with the package, and how names and options lead to them."""

import itertools
import json
import math
import random
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from grpo_jax import environments
from grpo_jax.environments import EndedTurn, build
from grpo_jax.environments.builtin import search as search_module
from grpo_jax.environments.builtin.calculator import calculator
from grpo_jax.rewards import sandbox

WAIT = 60.0


def play(environment, columns, *turns, prompt=''):
    """The answers to the turns of one episode."""
    answers = []
    with environment.episodes() as episodes:
        episodes.start(0, prompt, columns)
        for text in turns:
            episodes.submit([EndedTurn(0, text)])
            while not (got := episodes.ready(WAIT)):
                pass
            answers += got
    return answers


def texts(answers):
    return [a.messages and '\n'.join(m['content'] for m in a.messages) for a in answers]


@pytest.mark.parametrize(
    ('expression', 'result'),
    [
        ('123 * 456', '56088'),
        ('(12.5 + 3) * 4 =', '62'),
        ('1/3', '0.333333333333333'),
        ('0.1 + 0.2', '0.3'),
        ('7 // 2 + 7 % 4', '6'),
        ('-2 ** 2', '-4'),
        ('2^10 × 3 ÷ 4', '768'),
        ('2 ** -2', '0.25'),
        ('2 ** 0.5', '1.4142135623731'),
        ('0 ** 0', '1'),
        ('(-1) ** 999999999999999999999', '-1'),
        ('1 ** 9**9**9', 'error: the numbers are too large'),
        ('99999999999999999999 + 1', '100000000000000000000'),
        ('9**9**9', 'error: the numbers are too large'),
        ('9**999 * 0', 'error: the numbers are too large'),
        ('1e999', 'error: the numbers are too large'),
        ('10**100', '1' + '0' * 100),
        ('10**100 + 1', 'error: the numbers are too large'),
        ('0.1 ** 200', 'error: the numbers are too large'),
        ('1 / 0', 'error: division by zero'),
        ('0 ** -1', 'error: division by zero'),
        ('1 % 0', 'error: division by zero'),
    ],
)
def test_calculator(expression, result):
    assert calculator(expression) == result


@pytest.mark.parametrize(
    'expression',
    ['', 'x', '1 +', '__import__("os").getcwd()', '"a" * 9', 'True', '1 < 2', '[1][0]', '1j', '1,2',
     '(-8) ** (1/3)', 'abs(1)', '(' * 900, '-' * 999 + '1', '1\x00', '9' * 5000],
)  # fmt: skip
def test_what_is_no_arithmetic_is_an_error(expression):
    assert calculator(expression).startswith('error: ')


EXPRESSIONS = st.recursive(
    st.integers(0, 99).map(str),
    lambda inner: st.tuples(inner, st.sampled_from(['+', '-', '*', '/']), inner).map(
        lambda parts: f'({" ".join(parts)})'
    ),
    max_leaves=6,
)


@given(EXPRESSIONS)
def test_the_calculator_is_exact(expression):
    try:
        value = _fraction(expression)
    except ZeroDivisionError:
        assert calculator(expression) == 'error: division by zero'
        return
    result = calculator(expression)
    if value.denominator == 1:
        assert result == str(value)
    else:
        assert math.isclose(float(result), value, rel_tol=1e-14)


def _fraction(expression):
    """An oracle: Python's own arithmetic on fractions."""
    spelled = ''.join(f'F({c})' if c.isdigit() else c for c in _tokens(expression))
    return Fraction(eval(spelled, {'F': Fraction}))


def _tokens(expression):
    return expression.replace('(', '( ').replace(')', ' )').split()


def test_calculator_as_an_environment():
    environment = build('calculator', {}, turns=4, seconds=WAIT)
    assert environment.format == 'plain'
    (schema,) = environment.tools
    assert schema['function']['name'] == 'calculator'
    assert schema['function']['parameters']['required'] == ['expression']
    answers = play(environment, {}, 'calculator(12*34)', 'calculator(5)', 'calculator(', 'so 408')
    assert texts(answers) == ['408', '5', 'error: the line does not end with its `)`', None]
    assert [a.outcome for a in answers] == ['reply', 'reply', 'bad_call', 'end']
    (answer,) = play(build('calculator', {}, turns=1, seconds=WAIT), {}, 'calculator(1)')
    assert (answer.messages, answer.outcome, len(answer.calls)) == (None, 'turn_limit', 1)
    answers = play(environment, {}, 'so 408')
    assert (texts(answers), answers[0].outcome, answers[0].calls) == ([None], 'end', ())


def test_a_call_that_does_not_fit_the_tool_is_answered_with_what_does():
    environment = build('calculator', {}, turns=9, seconds=WAIT, format='hermes')
    calls = [
        {'name': 'calculator', 'arguments': {'expr': '1'}},
        {'name': 'calculator', 'arguments': {}},
        {'name': 'calculate', 'arguments': {'expression': '1'}},
        {'name': 'calculator', 'arguments': {'expression': 1.5}},
        {'name': 'calculator', 'arguments': {'expression': [1]}},
    ]
    text = ''.join(f'<tool_call>{json.dumps(call)}</tool_call>' for call in calls)
    (answer,) = play(environment, {}, text)
    replies = [message['content'] for message in answer.messages]
    assert replies[0] == (
        "error: calculator: missing a required argument: 'expression', of expression"
    )
    assert replies[1] == replies[0]
    assert "there is no tool 'calculate', did you mean 'calculator'?" in replies[2]
    assert replies[3] == '1.5'
    assert replies[4] == 'error: calculator: expression is [1], not of type str'
    assert [m['name'] for m in answer.messages][2] == 'calculate'
    assert answer.outcome == 'bad_call'  # the first failure


def test_guess():
    environment = build('guess', {}, turns=9, seconds=WAIT)
    answers = play(environment, {'number': '42'}, 'is it 10?', 'I think of 99', 'hm', '42')
    assert texts(answers) == ['higher', 'lower', 'guess a number', None]
    assert [a.reward for a in answers] == [0.0, 0.0, 0.0, 0.25]
    assert [a.outcome for a in answers] == ['reply', 'reply', 'reply', 'end']
    with pytest.raises(
        ValueError, match=r"'guess'.*needs 'number', which is not a column .*: it h"
    ):
        environment.check(['question'])
    environment.check(['question', 'number'])


class Room:
    """A game in Gymnasium's form: find the way out of a corridor."""

    def __init__(self, length=5):
        self.length, self.closed = length, False

    def reset(self, seed=None, options=None):
        self.at = random.Random(seed).randrange(self.length)
        return self._see(), {}

    def step(self, action):
        self.at += {'left': -1, 'right': 1}.get(action, 0)
        out = not 0 <= self.at < self.length
        return self._see(), 1.0 if out else -0.125, out, False, {}

    def _see(self):
        return f'You are in room {self.at}.'


class OldRoom(Room):
    """In the form of the older Gym."""

    def reset(self, seed=None):
        return super().reset(seed)[0]

    def step(self, action):
        observation, reward, out, _, info = super().step(action)
        return observation, reward, out, info


class Numbers(Room):
    def _see(self):
        return self.at


def not_a_game():
    return 3


@pytest.mark.parametrize('game', ['Room', 'OldRoom'])
def test_gym(game):
    path = f'{__file__}:{game}'
    rows = environments.gym_rows(path, range(3), {'length': 3}, instruction='Leave by left, right.')
    at = [random.Random(seed).randrange(3) for seed in range(3)]
    assert [row['question'] for row in rows] == [
        f'Leave by left, right.\n\nYou are in room {room}.' for room in at
    ]
    environment = build('gym', {'game': path, 'options': {'length': 3}}, turns=9, seconds=WAIT)
    environment.check(list(rows[0]))
    turns = ['I go\n\nleft \n'] * (at[0] + 1)
    answers = play(environment, rows[0], 'wait', *turns, prompt=rows[0]['question'])
    rooms = [at[0], *range(at[0] - 1, -1, -1)]
    assert texts(answers) == [*(f'You are in room {room}.' for room in rooms), None]
    assert answers[-1].reward == 1.0 - 0.125 * len(rooms)


def test_a_game_that_is_none_is_told_at_once():
    for name, message in (('not_a_game', 'has no reset and step'), ('nothing', 'has no')):
        with pytest.raises(ValueError, match=message):
            environments.gym_rows(f'{__file__}:{name}', [0])
    with pytest.raises(TypeError, match='wrap the game so that it returns texts'):
        environments.gym_rows(f'{__file__}:Numbers', [0])
    (answer,) = play(build('gym', {'game': f'{__file__}:Numbers'}, turns=2, seconds=WAIT),
                     {'seed': 1}, 'left')  # fmt: skip
    assert (answer.messages, answer.outcome) == (None, 'error')


WORDS = ['alpha', 'beta', 'gamma', 'delta', 'epsilon', 'zeta']


@given(st.lists(st.lists(st.sampled_from(WORDS), max_size=6), min_size=1, max_size=6),
       st.lists(st.sampled_from(WORDS), min_size=1, max_size=3))  # fmt: skip
def test_search_ranks_by_bm25(documents, query):
    """An oracle that computes the formula for every document."""
    documents = [' '.join(document) for document in documents]
    n, mean = len(documents), sum(len(d.split()) for d in documents) / len(documents) or 1.0

    def score(document):
        total, length = 0.0, len(document.split())
        for word in set(query):
            df = sum(word in d.split() for d in documents)
            tf = document.split().count(word)
            idf = math.log(1 + (n - df + 0.5) / (df + 0.5))
            total += idf * tf * 2.5 / (tf + 1.5 * (0.25 + 0.75 * length / mean)) if tf else 0.0
        return total

    found = search_module.Index(documents).best(' '.join(query).upper(), n)
    scores = [score(document) for document in documents]
    assert sorted(found) == [i for i, s in enumerate(scores) if s > 0]
    ranked = [scores[i] for i in found]
    assert all(a >= b - 1e-12 for a, b in itertools.pairwise(ranked))


def test_search(tmp_path):
    corpus = tmp_path / 'corpus.jsonl'
    rows = [{'title': 'Paris', 'text': 'The capital of France.'}, {'text': 'Zürich lies on a lake'}]
    corpus.write_text('\n\n'.join(json.dumps(row) for row in rows))
    options = {'corpus': str(corpus), 'k': 1}
    environment = build('search', options, turns=4, seconds=WAIT)
    answers = play(environment, {}, 'search(capital of france?)', 'search("ZÜRICH")', 'search(x)')
    assert texts(answers) == [
        '[1] Paris: The capital of France.', '[1] Zürich lies on a lake', 'nothing found',
    ]  # fmt: skip
    corpus.write_text('{"text": 3}\n')
    with pytest.raises(ValueError, match=r"^options.corpus: .*, line 1 has no text 'text'"):
        build('search', options, turns=4, seconds=WAIT)
    corpus.write_text('\n')
    with pytest.raises(ValueError, match=r'^options.corpus: .* has no documents'):
        build('search', options, turns=4, seconds=WAIT)
    with pytest.raises(ValueError, match=r"^options.corpus='nowhere.jsonl': no such file"):
        build('search', {'corpus': 'nowhere.jsonl'}, turns=4, seconds=WAIT)
    with pytest.raises(ValueError, match=r'^options.k=0: give a whole number'):
        build('search', {**options, 'k': 0}, turns=4, seconds=WAIT)


@pytest.fixture
def sandboxed():
    try:
        sandbox.shared()
    except sandbox.SandboxError:
        pytest.skip('needs bubblewrap')


def code(source):
    return f'```python\n{source}\n```'


def test_python_keeps_names_and_shows_output_values_and_errors(sandboxed):
    environment = build('python', {'longest': 100}, turns=99, seconds=WAIT)
    assert environment.format == 'fenced'
    answers = play(
        environment, {},
        code('import math\nx = 6\nprint("hidden later")'),
        code('y = x * 7\ny'),
        code('print(y, math.floor(2.5))\nNone'),
        code('def f(n):\n    return 1 / n\nf(0)'),
        code('y +='),
        code('z = 5\nraise SystemExit(3)'),
        code('z + f(1)'),
        code('print("a" * 1000)'),
        code('import sys\nprint("to stderr", file=sys.stderr)\n"π"'),
        code('input()'),
        code('open("/etc/passwd")'),
        'The answer is 42.',
    )  # fmt: skip
    assert texts(answers) == [
        'hidden later',
        '42',
        '42 2',
        'ZeroDivisionError: division by zero (cell 4, line 2)',
        'SyntaxError: invalid syntax (cell 5)',
        'SystemExit: 3',
        '6.0',
        f'{"a" * 50}\n… 900 characters left out …\n{"a" * 50}',
        "to stderr\n'π'",
        'EOFError: EOF when reading a line (cell 10, line 1)',
        "FileNotFoundError: [Errno 2] No such file or directory: '/etc/passwd' (cell 11, line 1)",
        None,
    ]
    assert answers[-1].outcome == 'end'


def test_python_is_bounded(sandboxed):
    environment = build('python', {'seconds': 0.5, 'state': False}, turns=9, seconds=WAIT)
    answers = play(
        environment, {}, code('while True: pass'), code('x = 1'), code('x'),
        code('import os\nos.write(1, b"x" * 10**6); os._exit(0)'), code('import os\nos._exit(3)'),
        code('b"x" * 10**10'),
    )  # fmt: skip
    said = texts(answers)
    assert said[0] == 'error: the code did not end within 0.5 seconds'
    assert said[1:3] == ['(no output)', "NameError: name 'x' is not defined (cell 1, line 1)"]
    assert len(said[3]) < 5000
    assert said[4].startswith('error: the program was ended')
    assert said[5].startswith('MemoryError')


def test_python_checks_its_options():
    for options, message in (
        ({'seconds': 0}, r'^options.seconds=0: give a number above 0'),
        ({'memory': 1.5}, r'^options.memory=1.5: give a number above 63'),
        ({'state': 1}, r'^options.state=1: make it True or False'),
        ({'second': 1}, r"^options.second=1: environment 'python' has no such option, did you mean "
                        "'seconds'"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            build('python', options, turns=2, seconds=WAIT)


class Counter:
    """In TRL's form."""

    def __init__(self, start: int = 0):
        self.start = start

    def reset(self, **columns) -> None:
        self.value = self.start + columns['offset']

    def increase(self, by: int) -> str:
        """Increase the counter.

        Args:
            by: How much.

        Returns:
            The value.
        """
        self.value += by
        return f'it is {self.value}'

    async def read(self) -> dict:
        """Read the counter."""
        return {'value': self.value}

    def get_reward(self) -> float:
        return self.value

    def _hidden(self):
        """Not a tool."""


class Other:
    def reset(self):
        """Begin."""

    def say(self) -> str:
        """Say something."""


def double(number: int, *, times: int = 1) -> int:
    """Double a number.

    Args:
        number: The number.
        times: How often.
    """
    return number * 2**times


async def later(text: str) -> str:
    """Say something.

    Args:
        text: What to say.
    """
    return text


def undocumented(x):
    return x


def half_documented(x: int, y) -> int:
    """Add.

    Args:
        x: One.
        y: Another.
    """


def find(name):
    return f'{__file__}:{name}'


def call(name, **arguments):
    return f'<tool_call>{json.dumps({"name": name, "arguments": arguments})}</tool_call>'


def test_a_class_in_the_form_of_trl():
    environment = build(
        find('Counter'), {'start': 10}, turns=9, seconds=WAIT, templates=['<tool_call>']
    )
    assert environment.format == 'hermes'
    names = [tool['function']['name'] for tool in environment.tools]
    assert names == ['increase', 'read']
    assert environment.tools[0]['function']['parameters']['properties']['by']['type'] == 'integer'
    answers = play(
        environment, {'offset': 5}, call('increase', by=2), call('increase', by=1) + call('read'),
        call('reset'), call('_hidden'), 'done',
    )  # fmt: skip
    assert texts(answers)[:2] == ['it is 17', 'it is 18\n{"value": 18}']
    assert all('there is no tool' in text for text in texts(answers)[2:4])
    assert [a.reward for a in answers] == [17.0, 18.0, 18.0, 18.0, 18.0]
    assert answers[1].messages[1] == {'role': 'tool', 'name': 'read', 'content': '{"value": 18}'}


def test_functions_are_tools():
    environment = build(find('double'), {}, turns=9, seconds=WAIT)
    assert texts(play(environment, {}, 'double(21)', 'double(1, times=3)')) == ['42', '8']
    environment = build(find('later'), {}, turns=9, seconds=WAIT)
    assert texts(play(environment, {}, 'later("now")')) == ['now']


def test_several_tools_in_one():
    functions = ['calculator', find('double'), find('Counter')]
    environment = build('tools', {'functions': functions}, turns=9, seconds=WAIT, format='hermes')
    names = [tool['function']['name'] for tool in environment.tools]
    assert names == ['calculator', 'double', 'increase', 'read']
    text = call('calculator', expression='2*3') + call('double', number=4) + call('increase', by=1)
    assert texts(play(environment, {'offset': 0}, text)) == ['6\n8\nit is 1']
    options = {'functions': {find('Counter'): {'start': 7}, find('double'): {}}}
    environment = build('tools', options, turns=9, seconds=WAIT, format='hermes')
    assert texts(play(environment, {'offset': 0}, call('increase', by=1))) == ['it is 8']


def batched(prompts, completions, turns, *, suffix, **columns):
    return [text + suffix for text in completions]


class Replying:
    def reply(self, text):
        return text


class TwoArguments:
    def reply(self, text, number):
        return text


class Empty:
    pass


class Greedy:
    most_calls = 0

    def reply(self, text):
        return text


@pytest.mark.parametrize(
    ('name', 'options', 'message'),
    [
        ('calculater', {}, "unknown environment 'calculater', did you mean 'calculator'?"),
        (find('nothing'), {}, "has no 'nothing'"),
        (find('undocumented'), {}, 'is no function with a docstring: an environment is a function'),
        (find('half_documented'), {}, 'give it a docstring with a summary'),
        (find('Empty'), {}, 'is a class without such methods: an environment is a function'),
        (find('TwoArguments'), {}, r'reply cannot be called with a text alone'),
        (find('Greedy'), {}, 'most_calls=0 of .*: make it 1 or more'),
        (find('batched'), {}, "^options: environment .* needs 'suffix': set it"),
        (find('batched'), {'sufix': 1}, r'^options.sufix=1: .*, did you mean .suffix.'),
        (find('batched'), {'turns': 1}, r'^options.turns=1: .* has no such option'),
        (find('double'), {'times': 2}, r'^options.times: .* is a tool, which has none: remove it'),
        (find('Replying'), {'x': 2}, r'^options.x=2: .* \(it has none\)'),
        (find('Counter'), {'begin': 2}, r'^options.begin=2: .* \(it has start\)'),
        ('calculator', {'x': 2}, r'^options.x: .* is a tool, which has none'),
        ('tools', {}, "^options: environment 'tools' needs 'functions'"),
        ('tools', {'functions': []}, r'^options.functions=\[\]: list the names'),
        ('tools', {'functions': 'calculator'}, r"^options.functions='calculator': list the names"),
        ('tools', {'functions': ['guess']}, "^options.functions: 'guess' is no tool: remove it"),
        ('tools', {'functions': ['calculator', 'calculater']}, "unknown environment 'calculater'"),
        ('tools', {'functions': [find('Counter'), find('Other')]}, 'is a second class of tools'),
        ('gym', {'game': 'nowhere:Game'}, r"^options.game='nowhere:Game': PluginError"),
        ('pathlib:Path', {}, 'without such methods'),
    ],
)  # fmt: skip
def test_what_is_no_environment_is_told_with_a_remedy(name, options, message):
    with pytest.raises(ValueError, match=message):
        build(name, options, turns=2, seconds=WAIT)


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        ({'turns': 0}, r'^turns=0: make it at least 1'),
        ({'seconds': 0.0}, r'^seconds=0.0: give a number of seconds above 0'),
        ({'seconds': math.inf}, r'^seconds=inf'),
        ({'format': 'xml'}, r"^format='xml' is unknown: use one of auto, hermes"),
        ({'on_error': 'stop'}, r"^on_error='stop' is unknown: use one of reply, end"),
        ({'format': 'fenced'}, r"^format='fenced' needs one tool with the single parameter 'code'"),
    ],
)
def test_limits_are_checked(options, message):
    with pytest.raises(ValueError, match=message):
        build('calculator', {}, **({'turns': 2, 'seconds': WAIT} | options))
    with pytest.raises(ValueError, match=r"^format='plain' has no effect"):
        build('guess', {}, turns=2, seconds=WAIT, format='plain')


def test_options_reach_a_function_of_batches():
    environment = build(find('batched'), {'suffix': '!'}, turns=2, seconds=WAIT)
    assert texts(play(environment, {}, 'a')) == ['a!']
    assert environment.tools == []


def test_rows_are_not_changed_by_an_environment():
    columns = {'number': 1, 'list': [1, {'a': []}]}
    environment = build(find('Changing'), {}, turns=2, seconds=WAIT)
    play(environment, columns, 'a')
    assert columns == {'number': 1, 'list': [1, {'a': []}]}


class Changing:
    def reset(self, **columns):
        columns['list'][1]['a'].append(2)

    def reply(self, text):
        return text
