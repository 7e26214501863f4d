"""Runs coroutines of environments in one event loop, in a thread of its own."""

import asyncio
import concurrent.futures
import threading
from collections.abc import Awaitable
from typing import Any

from grpo_jax.rewards.deadlines import DeadlineExceeded, message

THREAD_NAME = 'environment'
_RESPONDS = 1.0  # seconds in which a loop has to respond that nothing blocks


class EventLoop:
    """An event loop that any thread may run coroutines in.

    It is the same for all of them, so that clients of services can keep their connections. A loop
    that a coroutine blocks is left behind, and the next coroutine gets another one.
    """

    def __init__(self) -> None:
        self._loop: asyncio.AbstractEventLoop | None = None
        self._lock = threading.Lock()

    def run(self, awaitable: Awaitable[Any], seconds: float) -> Any:
        """Wait for a coroutine and return its result, or raise its exception.

        Raises:
            DeadlineExceeded: it did not return in so many seconds, and is canceled.
        """
        loop = self._running()
        future = asyncio.run_coroutine_threadsafe(_within(awaitable, seconds), loop)
        try:
            value, error = future.result(seconds + _RESPONDS)
        except (concurrent.futures.TimeoutError, concurrent.futures.CancelledError):
            future.cancel()
            self._leave(loop)
            raise DeadlineExceeded(message(seconds)) from None
        if error is not None:
            raise error
        return value

    def _running(self) -> asyncio.AbstractEventLoop:
        with self._lock:
            if self._loop is None:
                self._loop = asyncio.new_event_loop()
                run = self._loop.run_forever
                thread = threading.Thread(target=run, name=THREAD_NAME, daemon=True)
                thread.start()
            return self._loop

    def _leave(self, loop: asyncio.AbstractEventLoop) -> None:
        with self._lock:
            if self._loop is loop:
                self._loop = None
        loop.call_soon_threadsafe(loop.stop)


async def _within(awaitable: Awaitable[Any], seconds: float) -> tuple[Any, BaseException | None]:
    """Return the result or the exception, as some would end the loop if they were raised."""
    try:
        async with asyncio.timeout(seconds) as timeout:
            return await awaitable, None
    except asyncio.CancelledError:
        raise
    except TimeoutError as error:
        return None, DeadlineExceeded(message(seconds)) if timeout.expired() else error
    except BaseException as error:
        return None, error
