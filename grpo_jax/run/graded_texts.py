"""Decodes completions and grades their texts by reward functions."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple, overload

import jax
import numpy as np
from jaxtyping import Bool, Int

from grpo_jax import data, rewards
from grpo_jax.data import completion_texts
from grpo_jax.run import hosts
from grpo_jax.run.problems import Problems
from grpo_jax.types import Rollout

START = rewards.TrainerState()  # before the first step


class GradedTexts(NamedTuple):
    """The texts of N = B * G completions, group by group, with their rewards by functions."""

    prompts: list[str]
    completions: Sequence[str]
    scores: rewards.Scores

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

    Raises:
      rewards.RewardError: see `rewards.score`.
    """
    index, group_size = np.asarray(rollout.prompts.index), rollout.tokens.shape[1]
    columns = data.columns(problems.rows, index, group_size)
    questions, completions = decode(rollout, problems)
    tokens, mask = flat_tokens(rollout)
    if not functions:
        nothing = np.zeros(len(completions), np.float32)
        return GradedTexts(questions, completions, rewards.Scores(nothing, {}, 0))
    scores = rewards.score(
        functions,
        weights,
        prompts=questions,
        completions=completions,
        columns=columns,
        completion_ids=[ids[used].tolist() for ids, used in zip(tokens, mask, strict=True)],
        conversations=_conversations(problems, index, group_size),
        trainer_state=trainer_state,
        calls=calls,
        group_size=group_size,
        most_failed=most_failed,
    )
    return GradedTexts(questions, completions, scores)


def decode(rollout: Rollout, problems: Problems) -> tuple[list[str], list[str]]:
    """Return the texts of the prompts, one for each completion, and those of the completions."""
    tokens, mask = flat_tokens(rollout)
    completions = completion_texts(
        problems.tokenizer, tokens, mask, problems.stops, problems.hidden
    )
    return decode_prompts(rollout, problems), completions


def decode_prompts(rollout: Rollout, problems: Problems) -> list[str]:
    """Return the text of the prompt of each completion."""
    prompts = rollout.prompts
    asked, length = np.asarray(prompts.tokens), np.asarray(prompts.length)
    used = np.arange(asked.shape[1]) < length[:, None]
    questions = completion_texts(problems.tokenizer, asked, used, hidden=problems.hidden)
    return [text for text in questions for _ in range(rollout.tokens.shape[1])]


class DecodedWhenRead(Sequence[str]):
    """The texts of the completions of a rollout, each of them decoded when it is read first.

    Of several processes each grades its own groups. The texts of the others are read by the process
    that writes them down, and where completions are compared with each other.

    Args:
      rollout: [B, G, T] arrays on the host.
      problems: the data set that the prompts are from.
    """

    def __init__(self, rollout: Rollout, problems: Problems) -> None:
        self._tokens, self._mask = flat_tokens(rollout)
        self._problems, self._decoded = problems, dict[int, str]()

    def __len__(self) -> int:
        return len(self._tokens)

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> list[str]: ...
    def __getitem__(self, index: int | slice) -> str | list[str]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        i = range(len(self))[index]
        if i not in self._decoded:
            p, row = self._problems, slice(i, i + 1)
            (self._decoded[i],) = completion_texts(
                p.tokenizer, self._tokens[row], self._mask[row], p.stops, p.hidden
            )
        return self._decoded[i]


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
    return GradedTexts(prompts, [text for part in parts for text in part.completions], joined)


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
