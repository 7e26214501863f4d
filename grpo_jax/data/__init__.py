"""Data sets, prompts and tokenization: from rows of text to batches of token ids."""

from grpo_jax.data.batching import BatchSequence, batches, check_batch_size, in_order
from grpo_jax.data.chat import turn_end
from grpo_jax.data.conversations import Conversation
from grpo_jax.data.formats import FORMATS, Format, get_format
from grpo_jax.data.prompts import prompt_conversations, prompt_messages, render_prompts
from grpo_jax.data.questions import question_key, without_leaks
from grpo_jax.data.rows import MissingSplitError, OptionError, Rows, columns, load
from grpo_jax.data.special_tokens import hidden_ids, stop_ids
from grpo_jax.data.stop_strings import stop_table
from grpo_jax.data.tables import (
    DemonstrationTable,
    PromptTable,
    render_demonstration,
    tokenize_demonstrations,
    tokenize_prompts,
)
from grpo_jax.data.template_variables import (
    bind_template,
    template_texts,
    template_uses_date,
)
from grpo_jax.data.texts import char_to_token, completion_texts
from grpo_jax.data.tokenizers import (
    Tokenizer,
    byte_tokenizer,
    check_token_ids,
    eos_ids,
    load_tokenizer,
    token_ids,
    token_ranges,
)

__all__ = [
    'FORMATS',
    'BatchSequence',
    'Conversation',
    'DemonstrationTable',
    'Format',
    'MissingSplitError',
    'OptionError',
    'PromptTable',
    'Rows',
    'Tokenizer',
    'batches',
    'bind_template',
    'byte_tokenizer',
    'char_to_token',
    'check_batch_size',
    'check_token_ids',
    'columns',
    'completion_texts',
    'eos_ids',
    'get_format',
    'hidden_ids',
    'in_order',
    'load',
    'load_tokenizer',
    'prompt_conversations',
    'prompt_messages',
    'question_key',
    'render_demonstration',
    'render_prompts',
    'stop_ids',
    'stop_table',
    'template_texts',
    'template_uses_date',
    'token_ids',
    'token_ranges',
    'tokenize_demonstrations',
    'tokenize_prompts',
    'turn_end',
    'without_leaks',
]
