r"""Other spellings of LaTeX commands, symbols and numbers, each rewritten in one way.

`plain_characters` replaces single characters. After it, `one_spelling` makes these passes in turn,
each in the file of its name, as a table of rewrites with an example each:

1. `wording`: what stands around an answer, such as `about 5` or `**5**`, is dropped.
2. `amounts`: digits are joined (`70\,000`), currencies become signs (`\$5` becomes `＄5`).
3. `layout`: fonts, sizes, colors and spaces are dropped. What follows can ignore them.
4. `functions`: their names become commands (`sin x` and `\operatorname{sin}x` become `\sin x`).
5. `commands`: each command, environment, relation and bracket has one name (`\dfrac`, `\leqslant`).
6. `sets`: sets of numbers, intervals and points are written alike (`]0,1[` becomes `(0,1)`).
7. `arguments`: every argument has braces (`\frac12` becomes `\frac{1}{2}`); `$` and degrees go.

The rewrites of a pass run in the order of its table, each on the whole text.
"""

import re

from grpo_jax.rewards.verify.spelling import (
    amounts,
    arguments,
    commands,
    functions,
    layout,
    sets,
    wording,
)
from grpo_jax.rewards.verify.spelling.characters import plain_characters

__all__ = ['PASSES', 'one_spelling', 'plain_characters']

PASSES = {
    'wording': wording.REWRITES,
    'amounts': amounts.REWRITES,
    'layout': layout.REWRITES,
    'functions': functions.REWRITES,
    'commands': commands.REWRITES,
    'sets': sets.REWRITES,
    'arguments': arguments.REWRITES,
}
_LINE_BREAK = re.compile(r'(?<=[^\\])\\\\(?! *$)(?: *\[[0-9.]+ *[a-z]{2}\])?')


def one_spelling(text: str) -> str:
    """Rewrite synonymous commands, notations and numbers in one spelling."""
    if '\\begin' not in text:
        text = _LINE_BREAK.sub(', ', text)
    for rewrites in PASSES.values():
        for rewrite in rewrites:
            text = rewrite(text)
    return text
