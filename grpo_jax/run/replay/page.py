"""A page in HTML, without a script and without a network, of what an update did with its tokens."""

import html
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from grpo_jax.algorithm.explanation import TokenTerms
from grpo_jax.run.replay.rerun import Replayed
from grpo_jax.run.replay.table import flags, heading
from grpo_jax.run.replay.tokens import Completion, completions_of, prompt_text

MOST_TOKENS = 40_000  # of a page; browsers are slow with more

_STYLE = """
:root { color-scheme: light dark; --up: 37, 99, 235; --down: 217, 119, 6; }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 70rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.3rem; } h2 { font-size: 1.05rem; margin: 2.2rem 0 .4rem; }
.prompt, .completion { font: 13px/1.75 ui-monospace, monospace; white-space: pre-wrap;
  overflow-wrap: anywhere; padding: .5rem .7rem; border: 1px solid #8884; border-radius: 6px; }
.prompt { background: #8881; } .about { margin: .9rem 0 .2rem; font-size: 13px; }
.completion span { border-radius: 3px; } .completion i { opacity: .4; font-style: normal; }
.u { background: rgba(var(--up), var(--c)); } .d { background: rgba(var(--down), var(--c)); }
.clipped { outline: 1px solid currentColor; } .untrained { text-decoration: line-through 1px #888; }
.legend span { padding: 0 .4em; margin-right: .3em; border-radius: 3px; }
table { border-collapse: collapse; font-size: 13px; } td { padding: 0 1rem 0 0; }
"""
_TERMS = {
    'logprobs': 'log-prob', 'old_logprobs': 'old log-prob', 'ref_logprobs': 'reference log-prob',
    'sampled_logprobs': 'log-prob of the sampler', 'ratio': 'ratio', 'advantages': 'advantage',
    'values': 'value', 'returns': 'return', 'kl': 'KL', 'entropy': 'entropy', 'weights': 'weight',
    'coefficients': 'coefficient',
}  # fmt: skip


def page(replayed: Replayed, group: int | None, remarks: Sequence[str]) -> str:
    """The page of a replayed step: its prompts, each with its completions by their rewards.

    A token's color says how the update changes its log-prob. All texts are escaped, and white space
    is visible.

    Args:
      replayed: a step of a policy's stage.
      group: number of the prompt to show; None: as many as a page holds.
      remarks: what is said about the step at the top.

    Raises:
      ValueError: the stage trains no policy.
    """
    terms = replayed.terms
    if terms is None:
        raise ValueError(f'{replayed.stage} trains no policy, so there is nothing to show')
    shown = [group] if group is not None else _groups_that_fit(replayed)
    total, name = len(replayed.rollout.tokens), f'{replayed.stage} step {replayed.step}'
    if len(shown) < total:
        remarks = [*remarks, f'{len(shown)} of {total} prompts are shown']
    limit = float(np.abs(terms.coefficients[shown]).max()) or 1.0
    parts = [
        f'<!DOCTYPE html><html lang="en"><head><meta charset="utf-8"><title>{_escaped(name)}'
        f'</title><style>{_STYLE}</style></head><body><h1>{_escaped(name)}</h1>',
        *(f'<p>{_escaped(text)}</p>' for text in remarks),
        _legend(limit),
        _metrics(replayed.metrics),
    ]
    for number in shown:
        parts += _group(replayed, terms, number, limit)
    return '\n'.join([*parts, '</body></html>\n'])


def _groups_that_fit(replayed: Replayed) -> list[int]:
    tokens = np.asarray(replayed.rollout.mask).sum((1, 2)).cumsum()
    return list(range(max(int((tokens <= MOST_TOKENS).sum()), 1)))


def _legend(limit: float) -> str:
    return (
        '<p class="legend"><span class="u" style="--c:.65">blue</span> the update raises the '
        'token’s log-prob <span class="d" style="--c:.65">orange</span> it lowers it '
        '<span class="clipped">framed</span> clipped <span class="untrained">struck out</span> '
        f'not trained. The darkest color is a coefficient d loss / d log-prob of ±{limit:.4g}, and '
        'the depth goes by its square root. · is a space. Point at a token to see its terms.</p>'
    )


def _metrics(metrics: dict[str, float | None]) -> str:
    cells = ''.join(
        f'<tr><td>{_escaped(name)}</td><td>{"none" if value is None else format(value, ".6g")}</td>'
        '</tr>'
        for name, value in sorted(metrics.items())
    )
    return f'<details><summary>Metrics of the step</summary><table>{cells}</table></details>'


def _group(replayed: Replayed, terms: TokenTerms, number: int, limit: float) -> Iterator[str]:
    index = int(np.asarray(replayed.rollout.prompts.index)[number])
    yield f'<h2>Prompt {number} (row {index} of the data)</h2>'
    yield f'<div class="prompt">{_spaced(prompt_text(replayed, number))}</div>'
    ranked = sorted(
        completions_of(replayed, number),
        key=lambda c: -np.inf if c.reward is None else c.reward,
        reverse=True,
    )
    for completion in ranked:
        yield f'<p class="about">{completion.number}: {_escaped(heading(terms, completion))}</p>'
        spans = ''.join(_spans(terms, completion, limit))
        yield f'<div class="completion">{spans}</div>'


def _spans(terms: TokenTerms, completion: Completion, limit: float) -> Iterator[str]:
    at = completion.group, completion.number
    arrays = {title: getattr(terms, name) for name, title in _TERMS.items()}
    values = {title: array[at] for title, array in arrays.items() if array is not None}
    for i, text in enumerate(completion.tokens):
        special = list(flags(terms, at, i))
        coefficient = float(values['coefficient'][i])
        classes = ['u' if coefficient < 0 else 'd'] if coefficient else []
        classes += ['untrained'] if 'not trained' in special else []
        classes += ['clipped'] if 'clipped' in special else []
        depth = 0.65 * (abs(coefficient) / limit) ** 0.5
        title = [repr(text), *special]
        title += [f'{name} {float(array[i]):.5g}' for name, array in values.items()]
        yield (
            f'<span class="{" ".join(classes)}" style="--c:{depth:.2f}" '
            f'title="{_escaped(chr(10).join(title))}">{_spaced(text)}</span>'
        )


def _spaced(text: str) -> str:
    """Escaped text whose white space and control characters are visible."""
    return ''.join(map(_character, text))


def _character(c: str) -> str:
    if c == ' ':
        return '<i>·</i><wbr>'
    if c == '\n':
        return '<i>↵</i>\n'
    if c == '\t':
        return '<i>⇥</i>'
    if not c.isprintable():
        return f'<i>{_escaped(repr(c)[1:-1])}</i>'
    return _escaped(c)


def _escaped(text: Any) -> str:
    return html.escape(str(text), quote=True)
