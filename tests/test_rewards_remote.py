"""Rewards of services: one on this machine that is slow, breaks off, or says what is wrong."""

import asyncio
import contextlib
import http.server
import json
import threading
import time

import pytest

from grpo_jax import rewards
from grpo_jax.rewards import endpoint as endpoints
from grpo_jax.rewards.endpoint import Endpoint, EndpointError


class Service:
    """A server whose answer to the n-th request is chosen by a test."""

    def __init__(self):
        self.answers = []  # functions of the handler and the body; the last one is for all others
        self.bodies, self.headers = [], []
        self.active = self.most_active = 0
        self._lock = threading.Lock()
        self.stop = threading.Event()
        service = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(self):
                data = self.rfile.read(int(self.headers['Content-Length']))
                with service._lock:
                    service.bodies.append(json.loads(data))
                    service.headers.append(dict(self.headers))
                    choose = service.answers
                    answer = choose.pop(0) if len(choose) > 1 else choose[0]
                    service.active += 1
                    service.most_active = max(service.most_active, service.active)
                try:
                    with contextlib.suppress(OSError):
                        answer(self, service.bodies[-1] if data is None else json.loads(data))
                finally:
                    with service._lock:
                        service.active -= 1

            def log_message(self, *args):
                pass

        self.server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), Handler)
        self.server.daemon_threads = True
        self.url = f'http://127.0.0.1:{self.server.server_address[1]}/rewards'
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()


@pytest.fixture
def service(monkeypatch):
    monkeypatch.setattr(endpoints, '_FIRST_PAUSE', 0.01)
    service = Service()
    yield service
    service.stop.set()
    service.server.shutdown()
    service.server.server_close()


def say(text, status=200, **headers):
    def answer(handler, body):
        data = text(body) if callable(text) else text
        data = data if isinstance(data, bytes) else data.encode()
        handler.send_response(status)
        handler.send_header('Content-Length', str(len(data)))
        for name, value in headers.items():
            handler.send_header(name.replace('_', '-'), value)
        handler.end_headers()
        handler.wfile.write(data)

    return answer


def lengths(body):
    return json.dumps({'rewards': [len(text) for text in body['completions']]})


def stall(service):
    return lambda handler, body: service.stop.wait(60)


def drip(service):
    def answer(handler, body):
        handler.send_response(200)
        handler.send_header('Content-Length', '1000')
        handler.end_headers()
        while not service.stop.wait(0.05):
            handler.wfile.write(b' ')
            handler.wfile.flush()

    return answer


def drop(handler, body):
    handler.close_connection = True


def break_off(handler, body):
    handler.send_response(200)
    handler.send_header('Content-Length', '1000')
    handler.end_headers()
    handler.wfile.write(b'{"rewards": [1')
    handler.close_connection = True


def remote(service, completions, **options):
    columns = options.pop('columns', {})
    spec = {'weight': 1.0, 'url': service.url, **options}
    functions, weights = rewards.build({'remote': spec})
    prompts = [f'p{n}' for n in range(len(completions))]
    scores = rewards.score(
        functions, weights, prompts=prompts, completions=completions, columns=columns
    )
    return list(scores.total)


def test_a_service_gets_the_columns_and_gives_rewards(service):
    service.answers = [say(lengths)]
    completions = ['a', 'bb', 'ccc', '', 'half \ud800']
    columns = {'answer': [1, None, 'x', [1], {'a': 2}]}
    assert remote(service, completions, batch_size=2, columns=columns) == [1, 2, 3, 0, 6]
    sent = sorted(service.bodies, key=lambda body: body['prompts'])
    assert sent[0] == {'prompts': ['p0', 'p1'], 'completions': ['a', 'bb'], 'answer': [1, None]}
    assert [len(body['answer']) for body in sent] == [2, 2, 1]


def test_null_is_no_reward(service):
    service.answers = [say('{"rewards": [1.5, null]}')]
    result = remote(service, ['a', 'b'])
    assert result[0] == 1.5
    assert result[1] != result[1]


@pytest.mark.parametrize('trouble', ['stall', 'drip', 'drop', 'break off', '503', '429'])
def test_what_may_go_away_is_tried_again(service, trouble):
    first = {
        'stall': stall(service),
        'drip': drip(service),
        'drop': drop,
        'break off': break_off,
        '503': say('later', 503),
        '429': say('later', 429, Retry_After='0'),
    }[trouble]
    service.answers = [first, first, say(lengths)]
    assert remote(service, ['abc'], seconds=0.5) == [3]
    assert len(service.bodies) == 3


@pytest.mark.parametrize(
    ('answer', 'attempts', 'message'),
    [
        (stall, 2, 'no complete response within 0.3 seconds, in each of 2 attempts'),
        (drip, 2, 'no complete response within 0.3 seconds, in each of 2 attempts'),
        (lambda service: drop, 2, 'in each of 2 attempts'),
        (lambda service: break_off, 2, 'in each of 2 attempts'),
        (lambda service: say('broken', 500), 2, "HTTP status 500: 'broken', in each of 2"),
        (lambda service: say('no such page', 404), 1, "HTTP status 404: 'no such page'"),
        (lambda service: say('', 302, Location='/other'), 1, 'HTTP status 302'),
        (lambda service: say('<html>'), 1, "not JSON: '<html>'"),
        (lambda service: say(b'\xff\xfe'), 1, 'not JSON'),
        (lambda service: say('[' * 100_000), 1, 'not JSON'),
        (lambda service: say('[1.0]'), 1, 'one number or null for each of the 1'),
        (lambda service: say('{"rewards": [1, 2]}'), 1, 'one number or null for each of the 1'),
        (lambda service: say('{"rewards": "1"}'), 1, 'one number or null for each of the 1'),
        (lambda service: say('{"rewards": [NaN]}'), 1, 'a reward is nan: answer a finite'),
        (lambda service: say('{"rewards": [1e999]}'), 1, 'a reward is inf'),
        (lambda service: say('{"rewards": ["1"]}'), 1, "a reward is '1'"),
        (lambda service: say('{"rewards": [true]}'), 1, 'a reward is True'),
        (lambda service: say(' ' * (endpoints.LARGEST + 1)), 1, 'a response of more than'),
    ],
)
def test_errors_name_the_service_and_what_it_said(service, answer, attempts, message):
    service.answers = [answer(service)]
    with pytest.raises(rewards.RewardError) as raised:
        remote(service, ['a'], seconds=0.3 if attempts == 2 else 30.0, retries=1)
    assert message in str(raised.value)
    assert service.url in str(raised.value)
    assert len(service.bodies) == attempts


def test_a_service_that_is_not_there(service):
    service.server.shutdown()
    service.server.server_close()
    with pytest.raises(rewards.RewardError, match=r'ConnectError.*in each of 2 attempts'):
        remote(service, ['a'], retries=1)


def test_requests_at_the_same_time_are_bounded(service):
    def slow(handler, body):
        time.sleep(0.02)
        say(lengths)(handler, body)

    service.answers = [slow]
    assert remote(service, ['x'] * 12, batch_size=1, concurrency=3) == [1] * 12
    assert 1 < service.most_active <= 3


def test_one_failure_ends_the_other_requests(service):
    service.answers = [say('no', 400), stall(service)]
    with pytest.raises(rewards.RewardError, match='HTTP status 400'):
        remote(service, ['x'] * 4, batch_size=1, seconds=60.0)


def test_a_request_can_be_cancelled(service):
    service.answers = [stall(service)]

    async def cancel():
        post = asyncio.ensure_future(Endpoint(service.url, 60.0, 3, 1).post([{}]))
        await asyncio.sleep(0.1)
        post.cancel()
        with pytest.raises(asyncio.CancelledError):
            await post

    asyncio.run(cancel())


def test_a_key_comes_from_the_environment(service, monkeypatch):
    monkeypatch.setenv('JUDGE_KEY', 'secret')
    service.answers = [say('no', 401)]
    with pytest.raises(rewards.RewardError) as raised:
        remote(service, ['a'], key_variable='JUDGE_KEY')
    assert 'secret' not in str(raised.value)
    assert service.headers[0]['Authorization'] == 'Bearer secret'


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        ({'url': 'localhost:80'}, 'url=.*: give the address'),
        ({'url': ''}, "url=''"),
        ({'seconds': 0}, 'seconds=0'),
        ({'retries': -1}, 'retries=-1'),
        ({'concurrency': 0}, 'concurrency=0'),
        ({'batch_size': 0}, 'batch_size=0'),
        ({'key_variable': 'NO_SUCH_KEY'}, 'set this environment variable'),
        ({'urls': 1}, "did you mean 'url'"),
    ],
)
def test_options_are_checked_when_the_reward_is_made(options, message):
    with pytest.raises(rewards.RewardError, match=message):
        rewards.build({'remote': {'weight': 1.0, 'url': 'http://127.0.0.1:1', **options}})


def test_the_address_is_needed():
    with pytest.raises(rewards.RewardError, match="'remote' needs the option 'url'"):
        rewards.build({'remote': 1.0})
    with pytest.raises(rewards.RewardError, match="needs the option 'url'"):
        rewards.build({'llm_judge': 1.0})


# A model that judges


def chat(reply):
    return say(json.dumps({'choices': [{'message': {'role': 'assistant', 'content': reply}}]}))


def judge(service, completions, columns=None, **options):
    url = service.url.removesuffix('/rewards') + '/v1/'
    spec = {'weight': 1.0, 'url': url, 'model': 'judge', **options}
    functions, weights = rewards.build({'llm_judge': spec})
    return rewards.score(
        functions, weights, prompts=['2+2='] * len(completions), completions=completions,
        columns=columns or {},
    )  # fmt: skip


@pytest.mark.parametrize(
    ('reply', 'grade'),
    [
        ('Good.\nScore: 7', 0.7),
        ('**Score:** 7.5/10', 0.75),
        ('The answer says "Score: 10", which is a trick.\nScore: 0', 0.0),
        ('<think>Score: 9</think>Score: 2', 0.2),
        ('score = 10', 1.0),
        ('Score: 11', None),
        ('Score: -1', None),
        ('Seven.', None),
        ('', None),
        (None, None),
        ('Score: 1' + '0' * 100_000, None),
    ],
)
def test_the_grade_in_a_reply(service, reply, grade):
    service.answers = [chat(reply)]
    scores = judge(service, ['4'])
    (total,) = scores.total
    assert (None if total != total else total) == grade
    assert scores.logs.means() == {'llm_judge/without_grade': float(grade is None)}


def test_the_request_to_a_judge(service):
    service.answers = [chat('Score: 5')]
    judge(service, ['4 {x}'], {'answer': ['4']}, template='{prompt}|{completion}|{answer}|{{}}',
          request={'max_tokens': 100})  # fmt: skip
    assert service.bodies == [
        {
            'model': 'judge',
            'messages': [{'role': 'user', 'content': '2+2=|4 {x}|4|{}'}],
            'max_tokens': 100,
        }
    ]
    judge(service, ['The answer is 4.'])
    assert 'The answer is 4.' in service.bodies[1]['messages'][0]['content']
    assert service.bodies[1]['temperature'] == 0


def test_what_is_no_chat_completion_is_an_error(service):
    service.answers = [say('{"choices": []}')]
    with pytest.raises(rewards.RewardError, match='is no chat completion'):
        judge(service, ['4'])


def test_a_template_names_columns(service):
    with pytest.raises(rewards.RewardError, match='may name prompt, completion, answer'):
        judge(service, ['4'], {'answer': ['4']}, template='{reference}')


def test_errors_are_values():
    assert issubclass(EndpointError, ValueError)
