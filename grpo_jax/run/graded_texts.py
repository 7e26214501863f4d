"""Decodes completions and grades their texts by reward functions."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar, overload

import jax
import numpy as np
from jaxtyping import Bool, Int

from grpo_jax import data, rewards
from grpo_jax.data import completion_texts
from grpo_jax.run import hosts
from grpo_jax.run.episodes.outcomes import environment_rewards
from grpo_jax.run.episodes.recorded import RecordedReplies
from grpo_jax.run.episodes.turns import Turn, columns_of, conversations, policy_text, turns_of
from grpo_jax.run.problems import Problems
from grpo_jax.types import Prompts, Rollout

T = TypeVar('T')
START = rewards.TrainerState()  # before the first step


class GradedTexts(NamedTuple):
    """The texts of N = B * G completions, group by group, with their rewards by functions."""

    prompts: list[str]
    completions: Sequence[str]  # with an environment, what the policy wrote: see `policy_text`
    scores: rewards.Scores
    turns: Sequence[list[Turn]] | None = None  # with an environment

    def select(self, completions: Int[np.ndarray, ' M']) -> 'GradedTexts':
        """Return the entries of these completions, in this order."""
        parts = {name: part[completions] for name, part in self.scores.parts.items()}
        return GradedTexts(
            [self.prompts[i] for i in completions],
            [self.completions[i] for i in completions],
            self.scores._replace(
                total=self.scores.total[completions],
                parts=parts,
                logs=self.scores.logs.select(completions.tolist()),
            ),
            None if self.turns is None else [self.turns[i] for i in completions],
        )


def grade_texts(
    rollout: Rollout,
    problems: Problems,
    functions: Mapping[str, rewards.RewardFunction],
    weights: Mapping[str, float],
    trainer_state: rewards.TrainerState = START,
    *,
    calls: Mapping[str, rewards.CallOptions] | None = None,
    most_failed: int | None = None,
    books: Sequence[RecordedReplies] = (),
) -> GradedTexts:
    """Decode the tokens of a rollout and call the reward functions on the texts.

    Args:
      rollout: [B, G, T] arrays on the host.
      problems: the data set that the prompts are from.
      functions: reward functions by name; without any, all rewards are 0.
      weights: their weights by the same names.
      trainer_state: for functions that name it.
      calls: how they are called.
      most_failed: the largest number of completions on which a function may fail.
      books: with an environment, the replies of the batches that the rollout is from.

    Raises:
      rewards.RewardError: see `rewards.score`.
    """
    index, group_size = np.asarray(rollout.prompts.index), rollout.tokens.shape[1]
    columns = data.columns(problems.rows, index, group_size)
    questions, completions, turns = decode(rollout, problems)
    tokens, mask = flat_tokens(rollout._replace(mask=rollout.policy_mask))
    if not functions:
        nothing = np.zeros(len(completions), np.float32)
        return GradedTexts(questions, completions, rewards.Scores(nothing, {}, 0), turns)
    messages = _conversations(problems, index, group_size)
    answers = None
    if turns is not None:
        columns['turns'] = columns_of(turns)
        given = environment_rewards(rollout, books).tolist()
        columns['environment_reward'] = [None if math.isnan(x) else x for x in given]
        answers = None if messages is None else conversations(turns)
    scores = rewards.score(
        functions,
        weights,
        prompts=questions,
        completions=completions,
        columns=columns,
        completion_ids=[ids[used].tolist() for ids, used in zip(tokens, mask, strict=True)],
        conversations=messages,
        answers=answers,
        trainer_state=trainer_state,
        calls=calls,
        group_size=group_size,
        most_failed=most_failed,
    )
    return GradedTexts(questions, completions, scores, turns)


def decode(
    rollout: Rollout, problems: Problems
) -> tuple[list[str], list[str], list[list[Turn]] | None]:
    """Return the texts of prompts and completions, one each for a completion, and the turns."""
    prompts = decode_prompts(rollout.prompts, rollout.tokens.shape[1], problems)
    if rollout.trained is not None:
        turns = turns_of(rollout, problems)
        return prompts, [policy_text(of_one) for of_one in turns], turns
    tokens, mask = flat_tokens(rollout)
    completions = completion_texts(
        problems.tokenizer, tokens, mask, problems.stops, problems.hidden
    )
    return prompts, completions, None


def decode_prompts(prompts: Prompts, group_size: int, problems: Problems) -> list[str]:
    """Return the text of the prompt of each completion."""
    asked, length = np.asarray(prompts.tokens), np.asarray(prompts.length)
    used = np.arange(asked.shape[1]) < length[:, None]
    questions = completion_texts(problems.tokenizer, asked, used, hidden=problems.hidden)
    return [text for text in questions for _ in range(group_size)]


class DecodedWhenRead(Sequence[T]):
    """Texts of the completions of a rollout, each of them decoded when it is read first.

    Of several processes each grades its own groups. The texts of the others are read by the process
    that writes them down, and where completions are compared with each other.

    Args:
      decode: returns those of the completion with a number.
      count: of the completions.
    """

    def __init__(self, decode: Callable[[int], T], count: int) -> None:
        self._decode, self._range, self._decoded = decode, range(count), dict[int, T]()

    def __len__(self) -> int:
        return len(self._range)

    @overload
    def __getitem__(self, index: int) -> T: ...
    @overload
    def __getitem__(self, index: slice) -> list[T]: ...
    def __getitem__(self, index: int | slice) -> T | list[T]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        i = self._range[index]
        if i not in self._decoded:
            self._decoded[i] = self._decode(i)
        return self._decoded[i]


def texts_when_read(
    rollout: Rollout, problems: Problems
) -> tuple[Any, Any]:  # types of sequences would be checked by reading one of their entries
    """Return the completions and turns of a rollout on the host, see `DecodedWhenRead`.

    Returns:
      Sequences of texts and of lists of turns; None without an environment.
    """
    size = rollout.tokens.shape[1]

    def decoded(i: int) -> tuple[str, list[Turn] | None]:
        b, g = divmod(i, size)
        absent: Any = None
        part = rollout._replace(prompts=absent, kept=None)
        one = jax.tree.map(lambda x: x[b : b + 1, g : g + 1], part)
        if one.trained is not None:
            (turns,) = turns_of(one, problems)
            return policy_text(turns), turns
        p = problems
        (text,) = completion_texts(p.tokenizer, *flat_tokens(one), p.stops, p.hidden)
        return text, None

    both = DecodedWhenRead(decoded, rollout.ended.size)
    completions = DecodedWhenRead(lambda i: both[i][0], len(both))
    if rollout.trained is None:
        return completions, None
    return completions, DecodedWhenRead(lambda i: both[i][1] or [], len(both))


def _conversations(
    problems: Problems, index: Int[np.ndarray, ' B'], group_size: int
) -> list[data.Conversation] | None:
    """Return the prompt of each completion as messages, where the data set holds conversations."""
    if problems.conversations is None:
        return None
    selected = [problems.conversations[int(row)] for row in index]
    return [messages for messages in selected for _ in range(group_size)]


def concatenate_texts(parts: Sequence[GradedTexts]) -> GradedTexts:
    """Join the texts and rewards of several batches."""
    scores = [part.scores for part in parts]
    joined = rewards.Scores(
        total=np.concatenate([s.total for s in scores]),
        parts={name: np.concatenate([s.parts[name] for s in scores]) for name in scores[0].parts},
        timeouts=sum(s.timeouts for s in scores),
        logs=rewards.join_logs([(s.logs, len(s.total)) for s in scores]),
        failures=rewards.join_failures([s.failures for s in scores]),
    )
    prompts = [text for part in parts for text in part.prompts]
    completions = [text for part in parts for text in part.completions]
    turns = None
    if parts[0].turns is not None:
        turns = [of_one for part in parts for of_one in part.turns or ()]
    return GradedTexts(prompts, completions, joined, turns)


def on_host(rollout: Rollout, groups: int | None = None) -> Rollout:
    """Copy the first groups of a rollout to the host; all if `groups` is None.

    Every process gets all of it.
    """
    return jax.tree.map(lambda x: x[:groups], hosts.fetch(without_records(rollout)))


def without_records(rollout: Rollout) -> Rollout:
    """Return a rollout without what the sampler recorded for the update.

    Grading does not read it, and `support` alone would be thousands of bytes for each token.
    """
    prompts = rollout.prompts._replace(routing=None)
    return rollout._replace(prompts=prompts, support=None, routing=None)


def flat_tokens(rollout: Rollout) -> tuple[Int[np.ndarray, 'N T'], Bool[np.ndarray, 'N T']]:
    """Return the tokens and the mask of all completions."""
    length = rollout.tokens.shape[2]
    return np.reshape(rollout.tokens, (-1, length)), np.reshape(rollout.mask, (-1, length))
