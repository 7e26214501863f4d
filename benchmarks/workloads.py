"""Model shapes, workloads, prompts and the reward that our step and its peers share.

Needs NumPy alone, so that the peers' own environments can import it.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

PAD, EOS = 0, 1
NEVER = 10**6  # an end token outside of every vocabulary: all rows run to their full length
_FIRST_END = 2000  # where a workload's further end tokens begin
_MARKS = ('<pad>', '<eos>', '<unk>', '+', '-', '*', '=', ';')

LEARNING_RATE = 1e-6
BETA = 0.04
CLIP_NORM = 1.0
SPREAD = 0.02  # standard deviation of the random matrices


@dataclasses.dataclass(frozen=True)
class Shape:
    """Sizes of a Qwen2 decoder, under the names of `grpo_jax.models.ModelConfig`."""

    vocab_size: int = 4096
    width: int = 256
    layers: int = 4
    heads: int = 8
    kv_heads: int = 2
    head_dim: int = 32
    mlp_width: int = 1024
    tied_head: bool = True
    rope_theta: float = 10_000.0
    norm_eps: float = 1e-6
    dtype: str = 'float32'


QWEN_1_5B = Shape(
    vocab_size=151_936, width=1536, layers=28, heads=12, kv_heads=2, head_dim=128,
    mlp_width=8960, rope_theta=1e6, dtype='bfloat16',
)  # fmt: skip
QWEN_7B = Shape(
    vocab_size=152_064, width=3584, layers=28, heads=28, kv_heads=4, head_dim=128,
    mlp_width=18_944, tied_head=False, rope_theta=1e6, dtype='bfloat16',
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Workload:
    """One GRPO step: B prompts, G completions of each."""

    groups: int  # B
    group_size: int  # G
    prompt: int  # P, all of them real tokens
    completion: int  # T, at most
    ends: int = 0  # how many tokens end a completion; 0: none, every row has T tokens
    shape: Shape = Shape()

    @property
    def rows(self) -> int:
        """Completions in a step."""
        return self.groups * self.group_size

    @property
    def eos_ids(self) -> list[int]:
        """Tokens that end a completion.

        A random model is close to uniform, so `ends` of V tokens give lengths that are close to
        geometric with mean V / ends, cut at T.
        """
        if not self.ends:
            return [NEVER]
        return [EOS, *range(_FIRST_END, _FIRST_END + self.ends)]


WORKLOADS = {
    'smoke': Workload(2, 2, 8, 8),
    'W1': Workload(8, 8, 64, 128),  # completions longer than the prompt
    'W2': Workload(8, 8, 512, 64),  # a long prompt
    'W3': Workload(8, 8, 64, 256, ends=85),  # ragged: mean length near 44
    'W4': Workload(8, 8, 128, 64, shape=Shape(vocab_size=32_768)),  # a larger vocabulary
    'qwen2.5-1.5b': Workload(4, 16, 512, 1024, shape=QWEN_1_5B),  # these two for accelerators
    'qwen2.5-7b': Workload(4, 16, 512, 1024, shape=QWEN_7B),
}


def words(size: int) -> list[str]:
    """The word of each token of a vocabulary: marks, then numbers from 0."""
    return [*_MARKS, *map(str, range(size - len(_MARKS)))]


def prompt_texts(count: int, length: int, seed: int = 0) -> list[str]:
    """Sums, cut to exactly `length` tokens each."""
    rng = np.random.default_rng(seed)
    texts = []
    for _ in range(count):
        found: list[str] = []
        while len(found) < length:
            a, b = rng.integers(0, 1000, 2)
            found += [str(a), '+', str(b), '=', str(a + b), ';']
        texts.append(' '.join(found[:length]))
    return texts


def encode(texts: list[str], ids: Mapping[str, int]) -> np.ndarray:
    """i32[texts, P] of texts that have the same number of words."""
    return np.asarray([[ids[word] for word in text.split()] for text in texts], np.int32)


def decode(tokens: np.ndarray, vocabulary: list[str]) -> str:
    """The text of one completion, without special tokens."""
    return ' '.join(vocabulary[i] for i in tokens if i > 2)


def reward(text: str) -> float:
    """A cheap reward that varies within a group: ten times the share of 7 among the characters."""
    return 10.0 * text.count('7') / max(1, len(text))


def hugging_face_tokenizer(size: int) -> Any:
    """The vocabulary as a fast tokenizer of `transformers`, which the peers ask for."""
    import tokenizers
    import transformers

    vocabulary = {word: i for i, word in enumerate(words(size))}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token='<unk>'))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token='<unk>',
        pad_token='<pad>',
        eos_token='<eos>',
        padding_side='left',
    )
