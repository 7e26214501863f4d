"""The episodes of one rollout: calls of the environment in threads, with deadlines."""

import contextlib
import ctypes
import logging
import threading
import time
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any

from grpo_jax.environments.asynchronous import THREAD_NAME
from grpo_jax.environments.calls import Episode
from grpo_jax.environments.failures import Failure, failures
from grpo_jax.environments.forms import Form
from grpo_jax.environments.printing import bounded, streams_by_thread
from grpo_jax.environments.turns import Answer, EndedTurn, Reply, Turn
from grpo_jax.rewards import watchdog
from grpo_jax.rewards.deadlines import GRACE, DeadlineExceeded, message
from grpo_jax.rewards.guards import restored

log = logging.getLogger('grpo_jax')

MOST_HUNG = 64  # threads that go on after their deadlines, beyond which nothing more is called
CLOSE_SECONDS = 10.0  # for `close` of all episodes
_BATCH = 256  # turns in one call of a function of batches

_hung: list[threading.Thread] = []


class _Call:
    """A call of the environment, which either its thread or its deadline ends, not both."""

    def __init__(self, episodes: Sequence[Episode], texts: Sequence[str], *, last: bool) -> None:
        self.episodes, self.texts, self.last = episodes, texts, last
        self.thread: threading.Thread | None = None
        self.started = 0.0
        self.watched = -1  # its number, see `watchdog`
        self._end = threading.Lock()

    def ends(self) -> bool:
        """Return whether the caller is the one that ends the call."""
        return self._end.acquire(blocking=False)


class Episodes:
    """The episodes of one rollout; a context manager. Any thread may use it.

    Args:
        form: the environment.
        what: its name, for messages.
        turns: of the policy, after which an episode is over.
        seconds: that a call may take.
        on_error: 'reply': the policy reads the error of a failure; 'end': the episode is over.
    """

    def __init__(self, form: Form, what: str, *, turns: int, seconds: float, on_error: str) -> None:
        self._form, self._what, self._turns = form, what, turns
        self._seconds, self._on_error = seconds, on_error
        self._episodes: dict[int, Episode] = {}
        self._waiting: deque[_Call] = deque()
        self._running: list[_Call] = []
        self._answers: list[Answer] = []
        self._changed = threading.Condition()
        self._closed = False
        self._guards = contextlib.ExitStack()

    def __enter__(self) -> 'Episodes':
        self._guards.enter_context(streams_by_thread())
        self._guards.enter_context(restored(self._what, lambda thread: thread.name == THREAD_NAME))
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def start(
        self,
        completion: int,
        prompt: str | Sequence[Mapping[str, Any]],
        columns: Mapping[str, Any],
    ) -> None:
        """Begin an episode. A stateful environment is reset before its first reply.

        Args:
            completion: number of the episode.
            prompt: as a text or as messages.
            columns: the row of the data set.

        Raises:
            ValueError: there is an episode with this number.
        """
        with self._changed:
            if completion in self._episodes:
                raise ValueError(f'episode {completion} has been started before')
            self._episodes[completion] = Episode(completion, prompt, columns)

    def submit(self, turns: Sequence[EndedTurn]) -> None:
        """Ask for the replies to turns; `ready` returns them.

        Raises:
            ValueError: an episode is unknown, over, or waits for its reply.
        """
        with self._changed:
            pairs = [(self._open_episode(turn.completion), turn.text) for turn in turns]
            if len({turn.completion for turn in turns}) < len(turns):
                raise ValueError('two turns of one episode at the same time')
            for episode, _ in pairs:
                episode.waits = True
            for last in (False, True):
                chosen = [p for p in pairs if (len(p[0].turns) + 1 >= self._turns) == last]
                size = _BATCH if self._form.batched else 1
                for begin in range(0, len(chosen), size):
                    episodes, texts = zip(*chosen[begin : begin + size], strict=True)
                    self._waiting.append(_Call(episodes, texts, last=last))
            self._start_calls()

    def ready(self, seconds: float = 0.0) -> list[Answer]:
        """Return the answers since the last call, by the numbers of their completions.

        Args:
            seconds: that it waits until there is one.
        """
        until = time.monotonic() + seconds
        with self._changed:
            while True:
                self._end_overdue()
                now = time.monotonic()
                if self._answers or now >= until or not (self._running or self._waiting):
                    break
                deadlines = [call.started + self._seconds for call in self._running]
                self._changed.wait(max(min([until, *deadlines]) - now, 0.001))
            answers, self._answers = self._answers, []
        return sorted(answers, key=lambda answer: answer.completion)

    def close(self) -> None:
        """Call `close` of every episode's object, within a few seconds; it never raises."""
        with self._changed:
            self._closed = True
            self._waiting.clear()
            for call in self._running:
                watchdog.end(call.watched)
            states = [episode.state for episode in self._episodes.values()]
            self._episodes = {}
        closing = [state for state in states if hasattr(state, 'close')]
        threads = [
            threading.Thread(
                target=self._close_all,
                args=(closing[n :: self._form.most_calls],),
                name=THREAD_NAME,
                daemon=True,
            )
            for n in range(min(self._form.most_calls, len(closing)))
        ]
        seconds = min(self._seconds, CLOSE_SECONDS)
        until, watched = time.monotonic() + seconds, self._watch(seconds)
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(max(until - time.monotonic(), 0.0))
        watchdog.end(watched)
        if left := sum(thread.is_alive() for thread in threads):
            log.warning('%s: %d calls of `close` do not end', self._what, left)
        self._guards.close()

    def _watch(self, seconds: float) -> int:
        return watchdog.begin(self._what, seconds + GRACE)

    def _close_all(self, states: Sequence[Any]) -> None:
        with bounded(self._what):
            for state in states:
                try:
                    self._form.close(state)
                except Failure as failure:
                    log.warning('%s: close: %s', self._what, failure.detail)

    def _open_episode(self, completion: int) -> Episode:
        """Return the episode of a turn, which gets a reply now."""
        episode = self._episodes.get(completion)
        if episode is None or episode.over or episode.waits:
            fault = 'not started' if episode is None else 'over' if episode.over else 'answered now'
            raise ValueError(f'a turn of episode {completion}, which is {fault}')
        return episode

    def _start_calls(self) -> None:
        """Start calls that wait, as many as may run."""
        while self._waiting and len(self._running) < self._form.most_calls:
            _hung[:] = [thread for thread in _hung if thread.is_alive()]
            call = self._waiting.popleft()
            call.started = time.monotonic()
            if len(_hung) >= MOST_HUNG:
                self._refuse(call, f'{len(_hung)} earlier calls go on after their deadlines')
                continue
            # The program ends without waiting for a daemon.
            call.thread = threading.Thread(
                target=self._run, args=(call,), name=THREAD_NAME, daemon=True
            )
            call.watched = self._watch(self._seconds)
            try:
                call.thread.start()
            except RuntimeError as error:  # there are too many
                watchdog.end(call.watched)
                self._refuse(call, str(error))
                continue
            self._running.append(call)
        self._changed.notify_all()

    def _refuse(self, call: _Call, why: str) -> None:
        """Answer a call that is not made."""
        self._answer(call, [self._failed(call, Failure('refused', why))] * len(call.texts))

    def _run(self, call: _Call) -> None:
        """Carry out a call, in its thread."""
        replies: list[Reply] | Failure
        with contextlib.suppress(DeadlineExceeded):  # which may come late
            try:
                with bounded(self._what), failures():
                    replies = self._form.respond(call.episodes, call.texts, last=call.last)
            except Failure as failure:
                replies = failure
            if call.ends():
                with self._changed:
                    self._finish(call, replies)

    def _end_overdue(self) -> None:
        """End the calls that take too long, and interrupt their threads if they can be."""
        now = time.monotonic()
        for call in [c for c in self._running if now >= c.started + self._seconds]:
            if call.ends():
                assert call.thread is not None
                _interrupt(call.thread)
                _hung.append(call.thread)
                self._finish(call, Failure('timeout', message(self._seconds)))

    def _finish(self, call: _Call, replies: list[Reply] | Failure) -> None:
        self._running.remove(call)
        watchdog.end(call.watched)
        if self._closed:
            return
        if isinstance(replies, list):
            self._answer(call, replies)
        elif len(call.texts) > 1:  # whichever turn it was: each alone
            pairs = zip(call.episodes, call.texts, strict=True)
            self._waiting += [_Call([e], [text], last=call.last) for e, text in pairs]
        else:
            self._answer(call, [self._failed(call, replies)])
        self._start_calls()

    def _failed(self, call: _Call, failure: Failure) -> Reply:
        """Return the reply that stands for a failure of a whole call."""
        lost = self._form.stateful and (failure.outcome == 'timeout' or not call.episodes[0].begun)
        over = lost or self._on_error == 'end'
        reply = self._form.fail(call.texts[0], f'error: {failure.text}')
        messages = None if over else reply.messages
        return reply._replace(messages=messages, outcome=failure.outcome, detail=failure.detail)

    def _answer(self, call: _Call, replies: Sequence[Reply]) -> None:
        seconds = time.monotonic() - call.started
        for episode, text, reply in zip(call.episodes, call.texts, replies, strict=True):
            if call.last and reply.messages is not None:
                outcome = 'turn_limit' if reply.outcome == 'reply' else reply.outcome
                reply = reply._replace(messages=None, outcome=outcome)
            shown = '\n'.join(m['content'] for m in reply.messages or ())
            episode.turns.append(Turn(text, shown))
            episode.waits, episode.over = False, reply.messages is None
            details = (reply.outcome, reply.detail, seconds, reply.calls, reply.reward)
            self._answers.append(Answer(episode.completion, reply.messages, *details))


def _interrupt(thread: threading.Thread) -> None:
    """Raise DeadlineExceeded in a thread, at the next line of Python that it runs."""
    if thread.ident is not None and thread.is_alive():
        number = ctypes.c_ulong(thread.ident)
        ctypes.pythonapi.PyThreadState_SetAsyncExc(number, ctypes.py_object(DeadlineExceeded))
