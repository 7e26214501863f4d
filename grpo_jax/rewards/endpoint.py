"""Send JSON to a service and get JSON back: deadlines, retries and bounded concurrency."""

import dataclasses
import importlib
import json
import os
import random
from collections.abc import Mapping, Sequence
from typing import Any

LARGEST = 2**24  # bytes of a response
_FIRST_PAUSE = 0.5  # seconds before the second attempt; each further one waits twice as long
_LONGEST_PAUSE = 30.0
_TRANSIENT = (408, 409, 425, 429, 500, 502, 503, 504)  # HTTP statuses that may go away


class EndpointError(ValueError):
    """A service does not answer, or not as it should; the message names it and what it said."""


@dataclasses.dataclass(frozen=True)
class Endpoint:
    """A service that answers POST requests.

    Attributes:
        url: its address.
        seconds: for an attempt, from its beginning to the last byte of the response.
        retries: attempts after the first one, where the service is not reached, ends the
            connection, takes too long or says that it cannot answer now (HTTP 429, 503 and the
            like).
        concurrency: requests at the same time.
        key_variable: name of the environment variable with a key, sent as a bearer token; or ''.

    Raises:
        ValueError: an option is out of range, or the variable is not set.
    """

    url: str
    seconds: float
    retries: int
    concurrency: int
    key_variable: str = ''

    def __post_init__(self) -> None:
        if not isinstance(self.url, str) or not self.url.startswith(('http://', 'https://')):
            raise ValueError(
                f'url={self.url!r}: give the address of a service, http://… or https://…'
            )
        number = isinstance(self.seconds, int | float) and not isinstance(self.seconds, bool)
        if not number or not 0 < self.seconds <= 86400:
            raise ValueError(f'seconds={self.seconds!r}: give a number above 0')
        for name, least in (('retries', 0), ('concurrency', 1)):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise ValueError(f'{name}={value!r}: give a whole number, at least {least}')
        if self.key_variable and not os.environ.get(self.key_variable):
            raise ValueError(
                f'key_variable={self.key_variable!r}: set this environment variable to the key'
            )

    async def post(self, bodies: Sequence[Mapping[str, object]]) -> list[Any]:
        """Send requests; return the JSON of their responses in the same order.

        Raises:
            EndpointError: one has failed, after all its attempts; the others are cancelled.
        """
        import asyncio  # only here: it would take a tenth of the time to import this package

        http = importlib.import_module('httpx2')  # only here: it takes a tenth of a second
        free = asyncio.Semaphore(self.concurrency)
        key = os.environ.get(self.key_variable, '') if self.key_variable else ''
        headers = {'Authorization': f'Bearer {key}'} if key else {}
        limits = http.Limits(max_connections=self.concurrency)
        async with http.AsyncClient(headers=headers, timeout=None, limits=limits) as client:

            async def answer(body: Mapping[str, object]) -> Any:
                async with free:
                    return await self._attempts(http, client, body)

            try:
                async with asyncio.TaskGroup() as group:
                    tasks = [group.create_task(answer(body)) for body in bodies]
            except BaseExceptionGroup as failed:
                raise failed.exceptions[0] from None
        return [task.result() for task in tasks]

    async def _attempts(self, http: Any, client: Any, body: Mapping[str, object]) -> Any:
        import asyncio

        for attempt in range(self.retries + 1):
            pause = min(_FIRST_PAUSE * 2**attempt, _LONGEST_PAUSE)
            try:
                async with asyncio.timeout(self.seconds):
                    status, asked, data = await _post(client, self.url, body)
            except TimeoutError:
                problem = f'no complete response within {self.seconds:g} seconds'
            except http.HTTPError as error:
                problem = f'{type(error).__name__}: {error}'
            else:
                if status == 200:
                    return _parse(self.url, data)
                problem = f'HTTP status {status}: {data[:200].decode(errors="replace")!r}'
                if status not in _TRANSIENT:
                    raise EndpointError(f'{self.url}: {problem}')
                pause = min(max(pause, asked), _LONGEST_PAUSE)
            if attempt < self.retries:  # not at the same time as the other requests that failed
                await asyncio.sleep(pause * (0.5 + _random.random() / 2))
        raise EndpointError(f'{self.url}: {problem}, in each of {self.retries + 1} attempts')


_random = random.Random()  # not the global one, whose numbers belong to the user


async def _post(client: Any, url: str, body: Mapping[str, object]) -> tuple[int, float, bytes]:
    """Return the status, the seconds after which to ask again, and the content."""
    content = json.dumps(body)  # in ASCII: a text may have half of a surrogate pair
    headers = {'Content-Type': 'application/json'}
    async with client.stream('POST', url, content=content, headers=headers) as response:
        data = bytearray()
        async for part in response.aiter_bytes():
            data += part
            if len(data) > LARGEST:
                raise EndpointError(f'{url}: a response of more than {LARGEST} bytes')
        after = response.headers.get('retry-after', '')
        return response.status_code, float(after) if after.isdecimal() else 0.0, bytes(data)


def _parse(url: str, data: bytes) -> Any:
    try:
        return json.loads(data)
    except (ValueError, RecursionError):
        start = data[:200].decode(errors='replace')
        raise EndpointError(f'{url}: the response is not JSON: {start!r}') from None
