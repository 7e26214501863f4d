"""What a run's environment replies to the turns of a rollout, agreed on by all processes.

A process calls the environment for the completions of the groups that it grades. After each block
all of them share the replies that have come in, as tokens, so that all dispatch the same programs.
"""

import time
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Int

from grpo_jax.data import completion_texts, turn_end
from grpo_jax.engine.episodes import Replies, Turns
from grpo_jax.environments import Answer, EndedTurn, ToolCall
from grpo_jax.run import hosts
from grpo_jax.run.episodes.recorded import RecordedReplies, Reply
from grpo_jax.run.graded_texts import decode_prompts
from grpo_jax.run.problems import Problems
from grpo_jax.run.setup import Setup
from grpo_jax.run.shared_grading import in_shares
from grpo_jax.types import Prompts

POLL = 0.5  # seconds that a process waits for a reply while nothing is decoded
# Seconds that it waits for the replies to turns that have just ended. A tool that is faster is
# always read in the same round, and its completions miss no block.
GRACE = 0.05

Place = tuple[int, int]  # group and completion


class _Answered(NamedTuple):
    """The turns that were answered since the last block, of M groups."""

    done: Bool[np.ndarray, 'M G']
    length: Int[np.ndarray, 'M G']  # tokens of the reply; 0: the episode is over


class Exchange:
    """Calls an environment for one rollout; see `engine.episodes.Exchange`. A context manager.

    Tokens do not depend on when a reply comes, but the last bits of their log-probs do: the shapes
    of the programs that compute them differ. A recorded reply is therefore given in the same round
    again, where rounds are the calls after which something was computed.

    Args:
      setup: of a run with an environment.
      problems: the data set that the prompts are from.
      prompts: of the rollout.
      group_size: G.
      recorded: the replies that are known, and where new ones are kept.
    """

    def __init__(
        self,
        setup: Setup,
        problems: Problems,
        prompts: Prompts,
        group_size: int,
        recorded: RecordedReplies,
    ) -> None:
        assert setup.environment is not None
        assert setup.renderer is not None
        self._problems, self._recorded, self._renderer = problems, recorded, setup.renderer
        self._episodes = setup.environment.episodes()
        self._longest = setup.config.environment.reply_tokens
        self._end = turn_end(problems.tokenizer)[1] if setup.config.data.chat else None
        self._prompts: Prompts = hosts.fetch(prompts._replace(routing=None))
        self._shape = len(self._prompts.index), group_size
        self._asked: Any = np.full(self._shape, -1)  # tokens when the environment was asked last
        self._start: Any = np.zeros(self._shape, int)  # first token of each completion's turn
        self._over: Any = np.zeros(self._shape, bool)
        self._tokens: Any = None  # i32[B, G, T] when a turn ended last
        # In this process: the texts of turns, how many of them the environment has answered, and
        # the completions for which it has been asked.
        self._texts: dict[Place, list[str]] = {}
        self._sent: dict[Place, int] = {}
        self._waiting: set[Place] = set()
        self._held: dict[Place, Reply] = {}  # recorded, and not yet due
        self._round = 0

    def __enter__(self) -> 'Exchange':
        self._episodes.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self._episodes.close()
        self._recorded.close()

    def __call__(self, turns: Turns, idle: bool) -> Replies:
        """Returns what has been replied since the last call; with `idle` it waits for a reply."""
        last = turns.tokens.shape[2]
        full = turns.length == last
        new = turns.ended & ~self._over & ~full & (turns.length != self._asked)
        if new.any():
            self._tokens = hosts.fetch(turns.tokens)
            self._asked[new] = turns.length[new]
        replies: dict[Place, Reply] = {}

        def answer(share: Int[np.ndarray, ' M']) -> tuple[_Answered, str]:
            own = np.isin(np.arange(len(new)), share)
            self._ask(new & own[:, None])
            replies.update(self._due(self._round))
            until = time.monotonic() + (GRACE if new.any() else 0.0)
            replies.update(self._collect(last, POLL if idle and not replies else 0.0))
            while self._waiting and (left := until - time.monotonic()) > 0:
                replies.update(self._collect(last, left))
            if idle and not replies and not self._waiting and self._held:
                replies.update(self._due(min(reply.round for reply in self._held.values())))
            return self._answered(replies, share), ''

        nothing = np.zeros((0, self._shape[1]), np.int32)
        answered, _ = in_shares(len(new), answer, _Answered(nothing > 0, nothing))
        self._round += not idle or bool(answered.done.any())
        self._start[answered.done] = (turns.length + answered.length)[answered.done]
        self._over |= full | (answered.done & (answered.length == 0))
        tokens = self._shared_tokens(replies, int(answered.length.max()))
        return Replies(tokens, answered.length, self._over.copy())

    def _ask(self, new: Bool[np.ndarray, 'B G']) -> None:
        """Submits turns of this process, but those to which the replies are known."""
        places: list[Place] = [(int(b), int(g)) for b, g in np.argwhere(new)]
        for place, text in zip(places, self._turn_texts(places), strict=True):
            self._texts.setdefault(place, []).append(text)
            row, completion, read = self._key(place)
            known = self._recorded.find(row, completion, read)
            room = self._tokens.shape[2] - len(read) - 1
            if known is not None and len(known.tokens) <= room:  # less with another length
                self._held[place] = known
                continue
            if place not in self._sent:
                self._begin(place)
            self._submit(place)

    def _due(self, number: int) -> dict[Place, Reply]:
        """Returns the recorded replies that were given in rounds up to this one."""
        due = [place for place, reply in self._held.items() if reply.round <= number]
        return {place: self._held.pop(place) for place in due}

    def _begin(self, place: Place) -> None:
        self._sent[place], p = 0, self._problems
        row = int(self._prompts.index[place[0]])
        if p.conversations is not None:
            prompt: Any = p.conversations[row]
        else:
            one = Prompts(*(x[place[0]][None] for x in self._prompts[:3]))
            (prompt,) = decode_prompts(one, 1, p)
        self._episodes.start(self._number(place), prompt, dict(p.rows[row]))

    def _submit(self, place: Place) -> None:
        """Asks for the reply to the first turn that the environment has not answered.

        Where earlier replies were recorded, it is asked for them again, so that it knows them.
        """
        text = self._texts[place][self._sent[place]]
        self._episodes.submit([EndedTurn(self._number(place), text)])
        self._waiting.add(place)

    def _collect(self, last: int, seconds: float) -> Iterator[tuple[Place, Reply]]:
        """Yields the replies that have come in; waits for one up to so many seconds."""
        for answer in self._episodes.ready(seconds) if self._waiting else ():
            place = divmod(answer.completion, self._shape[1])
            self._waiting.remove(place)
            self._sent[place] += 1
            if self._sent[place] < len(self._texts[place]) and answer.messages is not None:
                self._submit(place)  # it was a reply that is recorded
                continue
            row, completion, read = self._key(place)
            reply = self._reply(answer, int(read[-1]), last - len(read) - 1)
            self._recorded.add(row, completion, read, reply)
            yield place, reply

    def _reply(self, answer: Answer, ended_by: int, room: int) -> Reply:
        """Returns an answer as tokens, of which there is room for so many."""
        reply = Reply(
            [], answer.outcome, answer.detail, [_fields(call) for call in answer.calls],
            seconds=round(answer.seconds, 3), reward=answer.reward, round=self._round,
        )  # fmt: skip
        if answer.messages is None:
            return reply
        try:
            tokens, cut = self._renderer.fit(
                answer.messages, ended_by_eos=ended_by == self._end,
                longest=min(self._longest, room),
            )  # fmt: skip
        except ValueError:  # not even what the template writes around a reply
            return reply._replace(outcome='no_room')
        return reply._replace(tokens=tokens, cut=cut)

    def _answered(self, replies: dict[Place, Reply], share: Int[np.ndarray, ' M']) -> _Answered:
        length: Any = np.full((len(share), self._shape[1]), -1, np.int32)
        for (group, completion), reply in replies.items():
            length[group - share[0], completion] = len(reply.tokens)
        return _Answered(length >= 0, np.maximum(length, 0))

    def _shared_tokens(self, replies: dict[Place, Reply], longest: int) -> Int[np.ndarray, 'B G F']:
        """Returns the tokens of all replies, in all processes."""

        def own(share: Int[np.ndarray, ' M']) -> tuple[Any, str]:
            tokens: Any = np.zeros((len(share), self._shape[1], longest), np.int32)
            for (group, completion), reply in replies.items():
                tokens[group - share[0], completion, : len(reply.tokens)] = reply.tokens
            return tokens, ''

        nothing: Any = np.zeros((*self._shape, longest), np.int32)
        if not longest:
            return nothing
        tokens: Any = in_shares(self._shape[0], own, nothing[:0])[0]
        return tokens

    def _turn_texts(self, places: list[Place]) -> list[str]:
        """Returns the texts of turns that have just ended."""
        if not places:
            return []
        rows = np.stack([self._tokens[place] for place in places])
        column = np.arange(rows.shape[1])
        first, end = (
            np.array([x[place] for place in places])[:, None] for x in (self._start, self._asked)
        )
        turn, p = (column >= first) & (column < end), self._problems
        return completion_texts(p.tokenizer, rows, turn, p.stops, p.hidden)

    def _key(self, place: Place) -> tuple[int, int, Int[np.ndarray, ' n']]:
        """Returns the arguments of `RecordedReplies.find` for the last turn of a completion."""
        read: Any = self._tokens[place][: self._asked[place]]
        return int(self._prompts.index[place[0]]), place[1], read

    def _number(self, place: Place) -> int:
        return place[0] * self._shape[1] + place[1]


def _fields(call: ToolCall) -> dict[str, Any]:
    """Returns a tool call as JSON types."""
    fields: dict[str, Any] = {'name': call.name, 'arguments': dict(call.arguments)}
    return fields | ({'error': call.error} if call.error else {})
