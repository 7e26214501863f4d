"""An environment without texts: random reply tokens, some of which come late."""

import numpy as np
import tiny

from grpo_jax.engine.episodes import Replies


class ScriptedReplies:
    """Replies to the first turns of each completion with tokens that depend on it and the turn.

    Args:
      turns: of an episode, at most.
      longest: tokens of a reply, at most; the lengths differ.
      delay: a reply comes after up to so many calls.
      max_tokens: T.
      first: number of the first group.

    Attributes:
      asked: lengths [B, G] and ends [B, G] of each call.
      replies: {(group, completion, turn): tokens} of those that were given.
    """

    def __init__(self, turns=4, longest=5, delay=0, max_tokens=40, first=0):
        self.turns, self.longest, self.delay = turns, longest, delay
        self.max_tokens, self.first = max_tokens, first
        self.asked, self.replies = [], {}
        self._due, self._count, self._over = {}, {}, None

    def reply(self, place, turn):
        rng = np.random.default_rng([self.first + place[0], place[1], turn])
        return rng.integers(0, tiny.VOCAB, rng.integers(1, self.longest + 1), np.int32)

    def __call__(self, turns, idle):
        if self._over is None:
            self._over = np.zeros(turns.ended.shape, bool)
        self.asked.append((turns.length.copy(), turns.ended.copy()))
        tokens = np.zeros((*turns.ended.shape, self.longest), np.int32)
        length = np.zeros(turns.ended.shape, np.int32)
        ready = []
        for place in map(tuple, np.argwhere(turns.ended & ~self._over)):
            turn = self._count.get(place, 0)
            if place not in self._due:
                rng = np.random.default_rng([*place, turn, self.delay])
                self._due[place] = rng.integers(0, self.delay + 1)
            else:
                self._due[place] -= 1
            ready.append((self._due[place], place, turn))
        soonest = min((due for due, *_ in ready), default=0) if idle else 0
        for due, place, turn in ready:
            if due > soonest:
                continue
            del self._due[place]
            reply = self.reply(place, turn)
            room = self.max_tokens - turns.length[place]
            if turn + 1 == self.turns or len(reply) >= room:
                self._over[place] = True
                continue
            self._count[place] = turn + 1
            tokens[place][: len(reply)], length[place] = reply, len(reply)
            self.replies[(*place, turn)] = reply
        full = turns.length == self.max_tokens
        return Replies(tokens, length, self._over | full)
