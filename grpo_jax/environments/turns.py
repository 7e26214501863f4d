"""What passes between the policy and an environment: turns, tool calls and replies."""

import re
from collections.abc import Mapping
from typing import Any, NamedTuple, TypeAlias

Message: TypeAlias = dict[str, Any]  # {'role': 'tool' or 'user', 'content': text, maybe 'name'}

# How a turn was answered. `reply` and `end` are as intended, and the others are failures, which are
# counted: a tool call that cannot be carried out as it is written, an environment that raised, that
# took too long, that returned something else than a text, or that was not asked, because the turn
# was the last one or too many earlier calls still run.
OUTCOMES = ('reply', 'end', 'bad_call', 'error', 'timeout', 'not_text', 'turn_limit', 'refused')

LONGEST_REPLY = 2**16  # characters that are kept of a reply; a rollout keeps fewer tokens
_LONGEST_DETAIL = 300
_SURROGATES = re.compile('[\ud800-\udfff]+')


class ToolCall(NamedTuple):
    """A call of a tool in what the policy wrote."""

    name: str  # '' if the text does not say
    arguments: Mapping[str, Any]  # by the names of parameters
    error: str = ''  # why it cannot be carried out


class EndedTurn(NamedTuple):
    """A turn that the policy has ended."""

    completion: int  # number of the episode, unique within an `Episodes`
    text: str  # with the stop string that ended it, without an end-of-sequence token


class Turn(NamedTuple):
    """An earlier turn of an episode."""

    text: str  # of the policy
    reply: str  # of the environment


class Reply(NamedTuple):
    """What an environment makes of a turn; see `Answer`."""

    messages: tuple[Message, ...] | None
    outcome: str
    detail: str = ''
    calls: tuple[ToolCall, ...] = ()
    reward: float | None = None


class Answer(NamedTuple):
    """The reply to a turn."""

    completion: int
    messages: tuple[Message, ...] | None  # None: the episode is over
    outcome: str  # of `OUTCOMES`
    detail: str  # one line for logs; '' if all is well
    seconds: float  # from the start of the call
    calls: tuple[ToolCall, ...]  # that the turn has
    reward: float | None = None  # by `get_reward` of a stateful environment, which may have none


def clean(text: str) -> tuple[str, str]:
    """Return a reply that any tokenizer can encode, and what was changed, or ''.

    Surrogates that are half of a character become the character where they are a pair and U+FFFD
    where they are not. What is beyond `LONGEST_REPLY` characters is left out.
    """
    notes = []
    length = str.__len__(text)
    text = str.__getitem__(text, slice(LONGEST_REPLY))
    if length > LONGEST_REPLY:
        notes.append(f'cut from {length} to {LONGEST_REPLY} characters')
    if _SURROGATES.search(text):
        text = text.encode('utf-16', 'surrogatepass').decode('utf-16', 'replace')
        notes.append('it had surrogates, which are no characters')
    return str(text), '; '.join(notes)


def one_line(text: str) -> str:
    """Return a text in one line of at most 300 characters."""
    line = ' '.join(text[: 4 * _LONGEST_DETAIL].split())
    return line if len(line) <= _LONGEST_DETAIL else f'{line[:_LONGEST_DETAIL]}…'
