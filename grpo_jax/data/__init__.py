"""Data sets, prompts and tokenization: from rows of text to batches of token ids."""

from grpo_jax.data.batching import BatchSequence, batches, in_order
from grpo_jax.data.chat import turn_end
from grpo_jax.data.formats import FORMATS, Format, get_format
from grpo_jax.data.prompts import render_prompts
from grpo_jax.data.questions import question_key, without_leaks
from grpo_jax.data.rows import Rows, columns, load
from grpo_jax.data.stop_strings import stop_table
from grpo_jax.data.tables import (
    DemonstrationTable,
    PromptTable,
    tokenize_demonstrations,
    tokenize_prompts,
)
from grpo_jax.data.texts import char_to_token, completion_texts
from grpo_jax.data.tokenizers import Tokenizer, byte_tokenizer, eos_ids, load_tokenizer

__all__ = [
    'FORMATS',
    'BatchSequence',
    'DemonstrationTable',
    'Format',
    'PromptTable',
    'Rows',
    'Tokenizer',
    'batches',
    'byte_tokenizer',
    'char_to_token',
    'columns',
    'completion_texts',
    'eos_ids',
    'get_format',
    'in_order',
    'load',
    'load_tokenizer',
    'question_key',
    'render_prompts',
    'stop_table',
    'tokenize_demonstrations',
    'tokenize_prompts',
    'turn_end',
    'without_leaks',
]
