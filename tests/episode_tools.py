"""Environments of short runs: functions named in configs."""

import itertools
import time
import zlib

CALLS = itertools.count()


def echo(prompts, completions, turns, **columns):
    """Replies to about half of the turns, with a text that depends on them."""
    return [
        f'{zlib.crc32(text.encode()) % 100}=' if zlib.crc32((text + 'x').encode()) % 2 else None
        for text in completions
    ]


def counter(prompts, completions, turns, **columns):
    """Never the same reply again."""
    return [f'{next(CALLS)}=' for _ in completions]


def seen(prompts, completions, turns, environment_reward, completion_ids, **columns):
    """A reward that reads the turns."""
    for text, of_one, ids in zip(completions, turns, completion_ids, strict=True):
        written = bytes(token for token in ids if token < 256)  # by the byte tokenizer
        assert written.decode(errors='replace').startswith(of_one[0]['text'].rstrip('\ufffd'))
        assert len(written) <= 32 - sum(len(turn['reply'] or '') for turn in of_one)
        assert '\n'.join(turn['text'] for turn in of_one) == text
        assert [text[: turn['end']].endswith(turn['text']) for turn in of_one]
        assert all(turn['reply'] is not None for turn in of_one[:-1])
    return [float(sum(turn['reply'] is not None for turn in of_one)) for of_one in turns]


class Unreliable:
    """Fails in one of several ways, which depends on the text."""

    def reply(self, text):
        kind = zlib.crc32(text.encode()) % 7
        if kind == 0:
            raise LookupError('no such thing')
        if kind == 1:
            time.sleep(2)
        if kind == 2:
            return 3.5
        if kind == 3:
            return 'a' * 2**21
        if kind == 4:
            return 'half a \ud83d character'
        if kind == 5:
            raise SystemExit(0)
        return 'fine='


def turn_steps(prompts, completions, turns, **columns):
    """A step for each turn that has a text, with a reward that depends on it."""
    return [
        [
            (turn['end'], zlib.crc32(turn['text'].encode()) % 5 / 4)
            for turn in of_one
            if turn['text']
        ]
        for of_one in turns
    ]
