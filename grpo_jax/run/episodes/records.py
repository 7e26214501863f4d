"""Episodes in JSON lines and as metrics."""

import logging
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
from jaxtyping import Int

from grpo_jax.environments import OUTCOMES
from grpo_jax.run.episodes.outcomes import replies_of
from grpo_jax.run.episodes.recorded import RecordedReplies, Reply
from grpo_jax.run.episodes.turns import Turn
from grpo_jax.run.shared_grading import in_shares
from grpo_jax.types import Rollout

log = logging.getLogger('grpo_jax')

_AS_INTENDED = ('reply', 'end', 'turn_limit')
_FAILURES = (*(name for name in OUTCOMES if name not in _AS_INTENDED), 'no_room')


def turn_records(
    rollout: Rollout, turns: Iterable[Sequence[Turn]], books: Sequence[RecordedReplies]
) -> Iterator[dict[str, Any]]:
    """Yields for each completion, as JSON, its `turns` and the seconds of the replies to them.

    Args:
      rollout: [B, G, T] arrays on the host.
      turns: of its completions.
      books: the replies of the batches that it is from, in this process. Of others only what the
        policy read is known.
    """
    for i, of_one in enumerate(turns):
        replies = replies_of(rollout, *divmod(i, rollout.ended.shape[1]), books)
        yield {
            'turns': [_turn_record(*pair) for pair in zip(of_one, replies, strict=True)],
            'timing/replies': [reply and reply.seconds for reply in replies],
        }


def report_failures(what: str, rollout: Rollout, books: Sequence[RecordedReplies]) -> None:
    """Warns of turns that failed in this process, with the first error.

    Args:
      what: begins the message.
      rollout: [B, G, T] arrays on the host.
      books: the replies of the batches that it is from, in this process.
    """
    failed = [
        reply
        for group, completion in np.ndindex(*rollout.ended.shape)
        for reply in replies_of(rollout, group, completion, books)
        if reply is not None and reply.outcome in _FAILURES
    ]
    if failed:
        log.warning(
            '%s: the environment failed on %d turns; the first: %s: %s',
            what, len(failed), failed[0].outcome, failed[0].detail,
        )  # fmt: skip


def _turn_record(turn: Turn, reply: Reply | None) -> dict[str, Any]:
    record: dict[str, Any] = {'text': turn.text, 'reply': turn.reply}
    if reply is not None:
        fields = ('calls', 'outcome', 'detail', 'cut', 'reward')
        record |= {name: getattr(reply, name) for name in fields}
    return record


def metrics(rollout: Rollout, books: Sequence[RecordedReplies]) -> dict[str, float]:
    """Returns means over completions, or over turns that the environment was asked about.

    `environment/turns` of the policy, `environment/calls` of tools and `environment/reply_tokens`
    are for one completion, and `timing/reply` is the seconds of one turn's. `environment/cut` and
    `environment/failed/<outcome>` count turns; without any they have no entry.

    Args:
      rollout: [B, G, T] arrays on the host.
      books: the replies of the batches that the rollout is from, in this process.
    """

    def count(share: Int[np.ndarray, ' M']) -> tuple[Any, str]:
        sums: Any = np.zeros((len(share), 5 + len(_FAILURES)))
        for i, group in enumerate(share):
            for completion in range(rollout.ended.shape[1]):
                for reply in replies_of(rollout, int(group), completion, books):
                    if reply is None:
                        sums[i, 0] += 1
                        continue
                    sums[i, :5] += 1, 1, len(reply.calls), reply.seconds, reply.cut
                    if reply.outcome in _FAILURES:
                        sums[i, 5 + _FAILURES.index(reply.outcome)] += 1
        return sums, ''

    table, _ = in_shares(len(rollout.ended), count, np.zeros((0, 5 + len(_FAILURES))))
    turns, asked, calls, seconds, cut, *failed = table.sum(0).tolist()
    completions = rollout.ended.size
    replied = int(np.asarray(rollout.mask).sum() - np.asarray(rollout.policy_mask).sum())
    values = {
        'environment/turns': turns / completions,
        'environment/calls': calls / completions,
        'environment/reply_tokens': replied / completions,
        'timing/reply': seconds / max(asked, 1),
    }
    counts = {'cut': cut} | {f'failed/{k}': v for k, v in zip(_FAILURES, failed, strict=True)}
    return values | {f'environment/{name}': n for name, n in counts.items() if n}
