r"""Equivalence of answers, such as `\frac{1}{2}` and 0.5 or `(1, 2]` and `\left(1,2\right]`.

Most pairs are decided by equal text or exact numbers (`numbers.same_number`). Tuples, intervals,
matrices, sets and lists are compared element by element, sets and lists in any order and with the
same multiplicities, and values with names by name (see `comparison`). The remaining pairs are
expressions and sets of real numbers, which SymPy compares in another process (see `pool`): exactly
where values are rational, and otherwise to 60 digits after the leading ones. Only a decimal alone
may be a rounded value. What the parser cannot read is equal only to the same text.
"""

from collections.abc import Sequence

from grpo_jax.rewards.verify import pool
from grpo_jax.rewards.verify.comparison import Tree, compare, self_comparison
from grpo_jax.rewards.verify.normal_form import normal_form

SECONDS = 3.0  # for one comparison; the slowest of MATH's takes a third of it on one slow core


def equivalent(a: str, b: str, *, seconds: float = SECONDS) -> bool:
    """Return whether two answers are equivalent; False if that takes more than `seconds`."""
    return bool(equivalent_pairs([(a, b)], seconds=seconds)[0])


def equivalent_pairs(
    pairs: Sequence[tuple[str, str]], *, seconds: float = SECONDS
) -> list[bool | None]:
    """Compare pairs of answers in parallel, equal pairs once.

    Args:
        pairs: N pairs of answers.
        seconds: the deadline of each comparison.

    Returns:
        For each pair whether its answers are equivalent, None if the deadline passed.
    """
    forms = {text: normal_form(text) for text in {text for pair in pairs for text in pair}}
    return _compare_forms([(forms[a], forms[b]) for a, b in pairs], seconds)


def equivalence_classes(
    answers: Sequence[str | None], *, seconds: float = SECONDS
) -> list[int | None]:
    """Group answers into classes of equivalent ones, for a majority vote.

    An answer belongs to the first class whose first member it is equivalent to, so a vote is
    `Counter(classes).most_common(1)`, where the answer that appears first wins a tie.

    Args:
        answers: N answers, None where there is none.
        seconds: the deadline of each comparison.

    Returns:
        The class of each answer, counted from 0 in order of appearance; None for None.
    """
    forms = [None if answer is None else normal_form(answer) for answer in answers]
    unassigned = list(dict.fromkeys(form for form in forms if form is not None))
    comparable = _comparable(unassigned, seconds)
    classes: dict[str, int] = {}  # normal form -> class
    count = 0
    while unassigned:
        # Compare the first form with all others: the comparisons of one round run in parallel.
        first, *rest = unassigned
        others = [form for form in rest if {first, form} <= comparable]
        same = _compare_forms([(first, form) for form in others], seconds)
        classes[first] = count
        classes.update((form, count) for form, equal in zip(others, same, strict=True) if equal)
        unassigned = [form for form in rest if form not in classes]
        count += 1
    # Each round starts from the form that appears first, so classes are numbered in that order.
    return [None if form is None else classes[form] for form in forms]


def _comparable(forms: Sequence[str], seconds: float) -> set[str]:
    """Return the forms that can be compared with themselves within `seconds`.

    A vote compares each answer with many others. With this test, an answer that cannot be parsed
    costs its deadline once instead of once for each comparison.
    """
    trees = {form: self_comparison(form) for form in forms} if len(forms) > 1 else {}
    uncertain = [form for form, tree in trees.items() if tree is not True]
    results = (
        pool.shared().evaluate([trees[form] for form in uncertain], seconds=seconds)
        if uncertain
        else []
    )
    undecided = {form for form, same in zip(uncertain, results, strict=True) if same is None}
    return set(forms) - undecided


def _compare_forms(pairs: Sequence[tuple[str, str]], seconds: float) -> list[bool | None]:
    """Compare pairs of normal forms; None at the deadline."""
    results: dict[tuple[str, str], bool | None] = {}
    trees: dict[tuple[str, str], Tree] = {}
    for pair in dict.fromkeys(pairs):
        tree = compare(*pair)
        if isinstance(tree, bool):
            results[pair] = tree
        else:
            trees[pair] = tree
    if trees:
        evaluated = pool.shared().evaluate(list(trees.values()), seconds=seconds)
        results.update(zip(trees, evaluated, strict=True))
    return [results[pair] for pair in pairs]
