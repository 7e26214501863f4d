"""Reward functions that do everything wrong. 'b' in a completion sets them off; others get 1.

The environment variables HOSTILE_TEXT and HOSTILE_STEP name another text, and the first step of a
run at which it does.
"""

import asyncio
import contextlib
import ctypes
import itertools
import json
import os
import re
import subprocess
import sys
import threading
import time
import zlib

import numpy as np

TEXT = os.environ.get('HOSTILE_TEXT', 'b')
STEP = int(os.environ.get('HOSTILE_STEP', '0'))
PRINTED = '\x1b[2J\x1b]0;title\x07\x9b31m\u202e'


def triggered(completions):
    return any(TEXT in text for text in completions)


def ones(completions):
    return [1.0] * len(completions)


def hostile(act):
    """A reward function that calls `act` where there is a 'b'; 1 for all where it returns None."""

    def function(completions, trainer_state=None, **columns):
        early = trainer_state is not None and trainer_state.global_step < STEP
        found = act(completions) if triggered(completions) and not early else None
        return ones(completions) if found is None else found

    function.__name__ = function.__qualname__ = act.__name__
    globals()[act.__name__] = function  # where a worker process finds it
    return function


@hostile
def raises(_):
    raise ValueError(f'no {PRINTED}')


class _Silent(Exception):
    def __str__(self):
        raise RuntimeError


@hostile
def raises_what_cannot_be_printed(_):
    raise _Silent


@hostile
def recurses(_):
    return recurses(['b'])


@hostile
def sleeps(_):
    time.sleep(1000)


@hostile
def loops(_):
    while True:
        pass


@hostile
def catches_everything(_):
    end = time.monotonic() + 1.5
    while time.monotonic() < end:
        try:
            while time.monotonic() < end:
                pass
        except BaseException:
            pass
    raise ValueError('at last')


@hostile
def backtracks(_):
    re.fullmatch('(a+)+', 'a' * 60 + 'b')


@hostile
def waits_for_a_process(_):
    subprocess.run(['sleep', '1000'])


@hostile
def waits_for_a_lock(_):
    lock = threading.Lock()
    lock.acquire()
    lock.acquire()


@hostile
def too_few(completions):
    return ones(completions)[1:]


@hostile
def too_many(completions):
    return [*ones(completions), 1.0]


@hostile
def nan(completions):
    return [float('nan') if TEXT in text else 1.0 for text in completions]


@hostile
def infinite(completions):
    return np.array([np.inf if TEXT in text else 1.0 for text in completions])


@hostile
def strings(completions):
    return ['1.0' if TEXT in text else 1.0 for text in completions]


@hostile
def generator(completions):
    return (1.0 for _ in completions)


@hostile
def endless_generator(_):
    return itertools.count()


@hostile
def dictionary(completions):
    return dict.fromkeys(range(len(completions)), 1.0)


@hostile
def nothing_at_all(completions):
    return 'x' * len(completions)


class _Number:
    def __repr__(self):
        raise RuntimeError


@hostile
def objects(completions):
    return [_Number() if TEXT in text else 1.0 for text in completions]


@hostile
def sys_exit(_):
    sys.exit(0)


@hostile
def os_exit(_):
    os._exit(0)


@hostile
def interrupts(_):
    raise asyncio.CancelledError


# These end the process that they run in, or take all of its memory.


@hostile
def segfault(_):
    ctypes.string_at(0)


@hostile
def ten_gigabytes(_):
    held = [bytearray(2**28) for _ in range(40)]
    return [float(len(held))]


@hostile
def closes_descriptors(_):
    os.closerange(0, 4096)


@hostile
def never_returns_from_c(_):
    sum(itertools.repeat(0))


# These do harm and return rewards.


@hostile
def patches_json(_):
    json.dumps = json.loads = None


@hostile
def changes_directory(_):
    os.chdir('/')


@hostile
def prints_escape_codes(_):
    print(PRINTED)
    sys.stderr.write(PRINTED)


@hostile
def prints_megabytes(_):
    for _ in range(50):
        print('x' * 100_000)


@hostile
def writes_megabytes_to_descriptors(_):
    for _ in range(50):
        os.write(1, b'\x1b[2J' + b'x' * 100_000)


def crashes_on_some(completions, **columns):
    """End the process at about a quarter of the texts."""
    if any(zlib.crc32(text.encode()) % 4 == 0 for text in completions):
        os._exit(0)
    return ones(completions)


async def _forever(completions, **columns):
    await asyncio.sleep(1000 if triggered(completions) else 0)
    return ones(completions)


async def _refuses_to_be_cancelled(completions, **columns):
    while triggered(completions):
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.sleep(1000)
    return ones(completions)


async def _blocks(completions, **columns):
    time.sleep(1000 if triggered(completions) else 0)
    return ones(completions)


FAILING = (
    raises, raises_what_cannot_be_printed, recurses, sleeps, loops, catches_everything, backtracks,
    waits_for_a_process, waits_for_a_lock, too_few, too_many, nan, infinite, strings, generator,
    endless_generator, dictionary, nothing_at_all, objects, sys_exit, os_exit, interrupts,
)  # fmt: skip
ASYNC = (_forever, _refuses_to_be_cancelled, _blocks)
DEADLY = (
    segfault, ten_gigabytes, closes_descriptors, never_returns_from_c,
)  # fmt: skip
HARMFUL = (
    patches_json, changes_directory, prints_escape_codes, prints_megabytes,
)  # fmt: skip
ENDLESS = (sleeps, loops, backtracks, waits_for_a_process, waits_for_a_lock, catches_everything)
