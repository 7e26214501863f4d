"""Generated pairs of answers whose right verdict is known by construction.

Expressions are small trees that this module writes in LaTeX and evaluates with mpmath, so neither
side uses the package. A wrong pair is kept only if the two values differ at some point.
"""

import itertools
import random
import re
from fractions import Fraction

import mpmath

VARIABLES = 'abkmnrtxyz'
POINTS = (
    dict(
        zip(
            VARIABLES,
            (mpmath.mpf(p) / 7 for p in (9, 13, 5, 16, 11, 19, 23, 8, 17, 29)),
            strict=True,
        )
    ),
    dict(
        zip(
            VARIABLES,
            (mpmath.mpf(p) / 11 for p in (31, 6, 17, 9, 13, 4, 27, 20, 35, 15)),
            strict=True,
        )
    ),
    dict(
        zip(
            VARIABLES,
            (mpmath.mpf(p) / 13 for p in (7, 30, 11, 25, 18, 34, 5, 22, 9, 41)),
            strict=True,
        )
    ),
)


# Expressions: ('num', Fraction), ('var', name), ('pi',), ('add', terms), ('mul', factors),
# ('pow', base, whole exponent), ('div', top, bottom), ('sqrt', e), ('fun', name, e)


def value(tree, point):
    """Evaluate a tree to 80 digits."""
    kind, *rest = tree
    if kind == 'num':
        return mpmath.mpf(rest[0].numerator) / rest[0].denominator
    if kind == 'var':
        return point[rest[0]]
    if kind == 'pi':
        return +mpmath.pi
    if kind == 'fun':
        return getattr(mpmath, rest[0])(value(rest[1], point))
    if kind == 'pow':
        return value(rest[0], point) ** rest[1]
    if kind == 'sqrt':
        return mpmath.sqrt(value(rest[0], point))
    if kind == 'div':
        return value(rest[0], point) / value(rest[1], point)
    values = [value(each, point) for each in rest[0]]
    return mpmath.fsum(values) if kind == 'add' else mpmath.fprod(values)


def differ(a, b):
    """Return whether two trees have different values at some point."""
    with mpmath.workdps(80):
        for point in POINTS:
            try:
                p, q = value(a, point), value(b, point)
            except ZeroDivisionError:
                return False
            if abs(p - q) > mpmath.mpf(10) ** -60 * max(abs(p), abs(q)):
                return True
    return False


def random_tree(rng, depth=2):
    """Return a random expression in up to three variables."""
    return _tree(rng, rng.sample(VARIABLES, 3), depth)


def _tree(rng, names, depth):
    kind = (
        rng.choice(('add', 'mul', 'pow', 'div', 'sqrt', 'fun', 'add', 'mul')) if depth else 'leaf'
    )
    below = depth - 1
    if kind in ('add', 'mul'):
        count = rng.choice((2, 2, 3))
        parts = [_tree(rng, names, below) for _ in range(count)]
        if kind == 'mul' and rng.random() < 0.5:
            parts[0] = ('num', Fraction(rng.randrange(2, 13)))
        return (kind, parts)
    if kind == 'pow':
        return ('pow', _tree(rng, names, below), rng.choice((2, 2, 3, 3, 4, 5, 10, 100)))
    if kind == 'div':
        return ('div', _tree(rng, names, below), _tree(rng, names, below))
    if kind == 'sqrt':
        return ('sqrt', _tree(rng, names, below))
    if kind == 'fun':
        return ('fun', rng.choice(('sin', 'cos', 'ln')), ('var', rng.choice(names)))
    if rng.random() < 0.6:
        return ('var', rng.choice(names))
    return ('pi',) if rng.random() < 0.15 else ('num', Fraction(rng.randrange(1, 20)))


class Writer:
    """Writes trees in LaTeX in one of many styles."""

    def __init__(self, rng=None):
        self.rng = rng  # None: the plain style

    def pick(self, *options):
        return self.rng.choice(options) if self.rng else options[0]

    def space(self):
        return self.pick('', '', ' ')

    def brackets(self, text):
        opening, closing = self.pick(('(', ')'), (r'\left(', r'\right)'), ('( ', ' )'))
        return f'{opening}{text}{closing}'

    def write(self, tree):
        kind, *rest = tree
        if kind == 'num':
            return self.number(rest[0])
        if kind == 'var':
            return rest[0]
        if kind == 'pi':
            return r'\pi '
        if kind == 'fun':
            return rf'\{rest[0]}' + self.brackets(self.write(rest[1]))
        if kind == 'sqrt':
            return rf'\sqrt{{{self.write(rest[0])}}}'
        if kind == 'pow':
            base = self.write(rest[0])
            exponent = f'{{{rest[1]}}}' if rest[1] > 9 else self.pick('{%d}', '%d') % rest[1]
            simple = rest[0][0] == 'var' or (rest[0][0] == 'num' and rest[0][1] >= 0)
            return f'{base if simple else self.brackets(base)}^{exponent}'
        if kind == 'div':
            top, bottom = self.write(rest[0]), self.write(rest[1])
            if self.pick(True, True, False):
                return '\\' + f'{self.pick("frac", "dfrac", "tfrac")}{{{top}}}{{{bottom}}}'
            return self.brackets(f'{self.factor(rest[0])}/{self.brackets(bottom)}')
        parts = list(rest[0])
        if self.rng:
            self.rng.shuffle(parts)
        if kind == 'add':
            sign = f'{self.space()}+{self.space()}'
            return sign.join(
                self.brackets(self.write(p)) if p[0] == 'add' else self.write(p) for p in parts
            ).replace(f'{sign}-', '-')
        product = self.pick(r'\cdot ', r' \times ', '*', r'\cdot ')
        return product.join(self.factor(part) for part in parts)

    def factor(self, tree):
        text = self.write(tree)
        plain = tree[0] in ('var', 'pi', 'sqrt', 'pow', 'fun') or (
            tree[0] == 'num' and tree[1].denominator == 1 and tree[1] >= 0
        )
        return text if plain else self.brackets(text)

    def number(self, number):
        if number.denominator > 1:
            return rf'\frac{{{number.numerator}}}{{{number.denominator}}}'
        return str(number.numerator)


def perturbed(rng, tree):
    """Return the tree with one change: an exponent, sign, name, coefficient or function."""
    kind, *rest = tree
    if kind == 'num':
        return ('num', rest[0] + rng.choice((-1, 1)))
    if kind == 'var':
        return ('var', rng.choice([name for name in VARIABLES if name != rest[0]]))
    if kind == 'pi':
        return ('num', Fraction(3))
    if kind == 'pow' and rng.random() < 0.5:
        return ('pow', rest[0], rest[1] + rng.choice((-1, 1)))
    if kind == 'pow':
        return ('pow', perturbed(rng, rest[0]), rest[1])
    if kind == 'fun' and rng.random() < 0.5:
        return ('fun', rng.choice([n for n in ('sin', 'cos', 'ln') if n != rest[0]]), rest[1])
    if kind == 'fun':
        return ('fun', rest[0], perturbed(rng, rest[1]))
    if kind == 'sqrt':
        return ('sqrt', perturbed(rng, rest[0]))
    if kind == 'div':
        if rng.random() < 0.3:
            return ('div', rest[1], rest[0])
        k = rng.randrange(2)
        return ('div', *(perturbed(rng, e) if i == k else e for i, e in enumerate(rest)))
    parts = list(rest[0])
    k = rng.randrange(len(parts))
    if kind == 'add' and rng.random() < 0.3:
        parts[k] = ('mul', [('num', Fraction(-1)), parts[k]])
    else:
        parts[k] = perturbed(rng, parts[k])
    return (kind, parts)


def rewritten(rng, tree):
    """Return an equal tree: powers as products, squares of sums expanded, fractions split."""
    kind, *rest = tree
    if kind in ('num', 'var', 'pi'):
        return tree
    if kind == 'pow':
        base = rewritten(rng, rest[0])
        if rest[1] <= 3 and rng.random() < 0.5:
            return ('mul', [base] * rest[1])
        if rest[1] == 2 and base[0] == 'add' and len(base[1]) == 2:
            p, q = base[1]
            middle = ('mul', [('num', Fraction(2)), p, q])
            return ('add', [('pow', p, 2), middle, ('pow', q, 2)])
        return ('pow', base, rest[1])
    if kind == 'fun':
        return tree
    if kind == 'sqrt':
        return ('sqrt', rewritten(rng, rest[0]))
    if kind == 'div':
        top, bottom = (rewritten(rng, each) for each in rest)
        if top[0] == 'add' and rng.random() < 0.5:
            return ('add', [('div', term, bottom) for term in top[1]])
        return ('div', top, bottom)
    parts = [rewritten(rng, each) for each in rest[0]]
    sums = [part for part in parts if part[0] == 'add']
    if kind == 'mul' and sums and rng.random() < 0.5:
        others = list(parts)
        others.remove(sums[0])
        return ('add', [('mul', [term, *others]) for term in sums[0][1]])
    return (kind, parts)


plain_number = Writer().number


# Pairs of each kind: (kind, reference, answer)


def expression_pair(rng, right):
    tree = random_tree(rng, rng.choice((1, 2, 2)))
    other = rewritten(rng, tree) if right else perturbed(rng, tree)
    if not right and not differ(tree, other):
        return None
    if right and differ(tree, other):
        raise AssertionError('a rewriting changed the value')
    return 'expression', Writer().write(tree), Writer(rng).write(other)


def number(rng):
    """Return a rational number and its plain LaTeX."""
    kind = rng.randrange(4)
    if kind == 0:
        n = Fraction(rng.randrange(-50, 1000))
    elif kind == 1:
        n = Fraction(rng.randrange(1000, 10**7))
    elif kind == 2:
        n = Fraction(rng.randrange(-99, 100), rng.choice((2, 4, 5, 8, 10, 20, 25)))
    else:
        n = Fraction(rng.randrange(-40, 41), rng.randrange(2, 40))
    return n, Writer().number(n)


def spelled(rng, n):
    """Return another spelling of a rational number."""
    options = []
    sign = '-' if n < 0 else ''
    top, bottom = abs(n.numerator), n.denominator
    if bottom == 1:
        grouped = f'{top:,}'
        options += [
            sign + grouped,
            sign + grouped.replace(',', '{,}'),
            sign + grouped.replace(',', r',\!'),
            sign + grouped.replace(',', r'\,'),
            f'{sign}{top}.0',
            f'+{top}' if not sign else f'- {top}',
            rf'{sign}\$' + grouped,
            rf'{sign}{top}\text{{ units}}',
            rf'{sign}{top}^\circ',
            rf'{sign}{top}^{{\circ}}',
            rf'\mathbf{{{sign}{top}}}',
            rf'\boxed{{{sign}{top}}}',
            f'x = {sign}{top}',
            rf'{sign}\frac{{{2 * top}}}{{2}}',
            f'{sign}{top}.',
        ]
    else:
        options += [
            rf'{sign}\dfrac{{{top}}}{{{bottom}}}',
            rf'\tfrac{{{sign}{top}}}{{{bottom}}}',
            rf'{sign}\frac{{{3 * top}}}{{{3 * bottom}}}',
            f'{sign}{top}/{bottom}',
            f'{sign}{top} / {bottom}',
            rf'\frac{{{top}}}{{{sign}{bottom}}}',
            f'y={sign}{top}/{bottom}',
        ]
        if top > bottom:
            options.append(rf'{sign}{top // bottom}\frac{{{top % bottom}}}{{{bottom}}}')
        if 10**6 % bottom == 0:
            decimal = f'{float(n):.7f}'.rstrip('0')
            options += [decimal, decimal.replace('0.', '.') if abs(n) < 1 else decimal]
    return rng.choice(options)


def number_pair(rng, right):
    n, text = number(rng)
    if right:
        return 'number', text, spelled(rng, n)
    way = rng.randrange(4)
    digits = str(abs(n.numerator))
    if way == 0 and len(digits) > 1:
        k = rng.randrange(len(digits) - 1)
        digits = digits[:k] + digits[k + 1] + digits[k] + digits[k + 2 :]
        m = Fraction(int(digits) * (-1 if n < 0 else 1), n.denominator)
    elif way == 1:
        m = -n
    elif way == 2:
        m = 1 / n if n else n
    else:
        m = n + rng.choice((1, -1)) * Fraction(1, n.denominator)
    # A decimal that is the rounded value of a fraction is right, so write fractions.
    return ('number', text, Writer().number(m)) if m != n else None


def elements(rng, count):
    """Return different values as trees with their LaTeX."""
    chosen = {}
    while len(chosen) < count:
        if rng.random() < 0.6:
            n, text = number(rng)
            if abs(n) < 1000:
                chosen[text] = ('num', n)
        else:
            root = ('sqrt', ('num', Fraction(rng.choice((2, 3, 5, 6, 7)))))
            tree = ('mul', [('num', Fraction(rng.randrange(2, 9))), rng.choice((root, ('pi',)))])
            chosen[Writer().write(tree)] = tree
    return chosen


def restyled(rng, tree):
    return spelled_value(rng, tree[1]) if tree[0] == 'num' else Writer(rng).write(tree)


def spelled_value(rng, n):
    """Return a spelling without name, unit and comma."""
    while True:
        text = spelled(rng, n)
        if not re.search(r'[=,]|\\text|\\boxed|\\,|\\\$|\.$', text):
            return text


def changed_element(rng, texts):
    texts = list(texts)
    k = rng.randrange(len(texts))
    texts[k] = rng.choice((f'{texts[k]}+1', f'({texts[k]})-2', rf'\frac{{1}}{{2}}+{texts[k]}'))
    return texts


def tuple_pair(rng, right):
    values = elements(rng, rng.choice((2, 3, 4)))
    texts = list(values)
    reference = f'({",".join(texts)})'
    if right:
        inside = rng.choice((', ', ',', r',\ ', ' , ')).join(
            restyled(rng, values[t]) for t in texts
        )
        form = rng.choice(('({})', r'\left({}\right)', r'\left( {} \right)', r'\langle {} \rangle'))
        return 'tuple', reference, form.format(inside)
    other = changed_element(rng, texts) if rng.random() < 0.4 else swapped(rng, texts)
    return 'tuple', reference, f'({rng.choice((",", ", ")).join(other)})'


def swapped(rng, texts):
    texts = list(texts)
    i, j = rng.sample(range(len(texts)), 2)
    texts[i], texts[j] = texts[j], texts[i]
    return texts


def list_pair(rng, right):
    values = elements(rng, rng.choice((2, 3, 4)))
    texts = list(values)
    opening, closing = rng.choice((('', ''), (r'\{', r'\}')))
    repeated = [*texts, texts[0]] if not opening else texts
    reference = opening + ', '.join(repeated) + closing
    if right:
        spelled_texts = [restyled(rng, values[t]) for t in repeated]
        rng.shuffle(spelled_texts)
        separator = rng.choice((', ', ' , ', r',\ ', '; '))
        inside = separator.join(spelled_texts)
        if rng.random() < 0.3:
            last = rng.choice((' and ', r'\text{ and }', ', and ', r',\text{ and }', ' or '))
            inside = separator.join(spelled_texts[:-1]) + last + spelled_texts[-1]
        form = rng.choice(('{}', r'\{{{}\}}', r'\left\{{{}\right\}}')) if opening else '{}'
        return 'list', reference, form.format(inside)
    other = changed_element(rng, texts) if rng.random() < 0.5 or opening else None
    # The same values with other multiplicities.
    other = [*other, other[0]] if other and not opening else other or [*texts, texts[1]]
    rng.shuffle(other)
    return 'list', reference, opening + ', '.join(other) + closing


def bounds(rng):
    low = Fraction(rng.randrange(-60, 60), rng.choice((1, 1, 1, 2, 3)))
    return low, low + Fraction(rng.randrange(1, 50), rng.choice((1, 1, 2, 3)))


def interval_pair(rng, right):
    low, high = bounds(rng)
    open_low, open_high = rng.random() < 0.5, rng.random() < 0.5
    infinite = rng.choice((None, None, 'low', 'high'))

    def interval(low, high, open_low, open_high, spell=plain_number, spaced=False):
        left = r'-\infty' if infinite == 'low' else spell(low)
        right_ = r'\infty' if infinite == 'high' else spell(high)
        opening = '(' if open_low or infinite == 'low' else '['
        closing = ')' if open_high or infinite == 'high' else ']'
        return f'{opening}{left},{" " if spaced else ""}{right_}{closing}'

    def relation(low, high, open_low, open_high, spell=plain_number, name='x'):
        sign_low = rng.choice(('<', r'\lt ')) if open_low else rng.choice((r'\le ', r'\leq ', '<='))
        sign_high = '<' if open_high else rng.choice((r'\le ', r'\leqslant '))
        if infinite == 'low':
            back = rng.choice(('>', r'\gt ')) if open_high else rng.choice((r'\ge ', '>='))
            return rng.choice((f'{name}{sign_high}{spell(high)}', f'{spell(high)}{back}{name}'))
        if infinite == 'high':
            back = '>' if open_low else rng.choice((r'\ge ', r'\geqslant ', '>='))
            return rng.choice((f'{spell(low)}{sign_low}{name}', f'{name}{back}{spell(low)}'))
        return f'{spell(low)}{sign_low}{name}{sign_high}{spell(high)}'

    exact = (low, high, open_low, open_high)
    reference = rng.choice((interval, relation))(*exact)
    if right:
        spell = lambda n: spelled_value(rng, n)  # noqa: E731
        form = rng.choice(
            ('{}', r'x\in {}', r'\left.{}\right.', r'\{{x\mid {}\}}', r'\{{x : {}\}}')
        )
        if form.startswith('x') or 'left' in form:
            return 'interval', reference, form.format(interval(*exact, spell, True))
        text = relation(*exact, spell)
        return 'interval', reference, form.format(text)
    ways = []
    if infinite != 'low':
        ways += [(low - 1, high, open_low, open_high), (low, high, not open_low, open_high)]
    if infinite != 'high':
        ways += [(low, high + 1, open_low, open_high), (low, high, open_low, not open_high)]
    other = rng.choice((interval, relation))(*rng.choice(ways))
    if reference.startswith(('(', '[')) or rng.random() < 0.8:
        return 'interval', reference, other
    return 'interval', reference, relation(*exact, name='y')


def union_pair(rng, right):
    points = sorted(rng.sample(range(-50, 50), 4))
    kinds = [rng.random() < 0.5 for _ in range(4)]

    def union(points, kinds, order=(0, 1)):
        pieces = [
            f'{"(" if kinds[k] else "["}{points[k]},{points[k + 1]}{")" if kinds[k + 1] else "]"}'
            for k in (0, 2)
        ]
        return rng.choice((r'\cup ', r' \cup ', r'\,\cup\,')).join(pieces[k] for k in order)

    reference = union(points, kinds)
    if right:
        if rng.random() < 0.5:
            return 'union', reference, union(points, kinds, (1, 0))
        signs = ['<' if kind else '\\le ' for kind in kinds]
        parts = [f'{points[k]}{signs[k]}x{signs[k + 1]}{points[k + 1]}' for k in (0, 2)]
        return 'union', reference, rng.choice((' or ', r'\text{ or }', r'\lor ')).join(parts)
    k = rng.randrange(4)
    if rng.random() < 0.5:
        kinds[k] = not kinds[k]
    else:
        points[k] += (-1) ** k if k in (0, 3) else 0.5 * (-1) ** k
    return 'union', reference, union(points, kinds)


def named_pair(rng, right):
    names = rng.choice((('x', 'y'), ('a', 'b'), ('m', 'n'), ('x', 'y', 'z'), ('p', 'q')))
    values = elements(rng, len(names))
    texts = list(values)
    reference = ', '.join(f'{n}={t}' for n, t in zip(names, texts, strict=True))
    if right:
        pairs = [(n, restyled(rng, values[t])) for n, t in zip(names, texts, strict=True)]
        if rng.random() < 0.3:
            return 'named', reference, f'({",".join(t for _, t in pairs)})'
        if rng.random() < 0.3:
            inside = ', '.join(t for _, t in pairs)
            return 'named', reference, f'({",".join(names)}) = ({inside})'
        rng.shuffle(pairs)
        return (
            'named',
            reference,
            rng.choice((', ', r'\text{ and }', ' and ', '; ')).join(f'{n} = {t}' for n, t in pairs),
        )
    other = swapped(rng, texts)
    if rng.random() < 0.5:
        return 'named', reference, ', '.join(f'{n}={t}' for n, t in zip(names, other, strict=True))
    return 'named', reference, f'({",".join(other)})'


NAMES = ('S_{10}', 'AB', 'f(3)', 'P(X=3)', 'a_5', r'\angle ABC', 'x', r'\theta', 'T_n', 'r')


def value_name_pair(rng, right):
    n, text = number(rng)
    name, other = rng.sample(NAMES, 2)
    if right:
        return 'name', text, f'{name}{rng.choice(("=", " = "))}{spelled_value(rng, n)}'
    if rng.random() < 0.5:
        return 'name', f'{name}={text}', f'{other}={text}'
    return 'name', text, f'{name}={Writer().number(n + 1)}'


def index_pair(rng, right):
    letter = rng.choice('aSxTu')
    k = rng.randrange(1, 40)
    n = rng.choice((f'n+{k % 9 + 1}', str(k)))
    text = f'{letter}_{{{n}}}'
    c = rng.randrange(2, 9)
    reference = f'{c}{text}+{c + 1}'
    if right:
        return 'index', reference, f'{c + 1} + {c}{rng.choice((" ", ""))}{text}'
    other = f'n+{k % 9 + 2}' if 'n' in n else str(k + 1)
    return 'index', reference, f'{c}{letter}_{{{other}}}+{c + 1}'


WORDS = re.findall(
    '[A-Za-z]+',
    'red blue green white black east west north south even odd prime circle square line Monday '
    'Friday Alice Bob cat dog heads tails true false yes no increasing decreasing',
)


def word_pair(rng, right):
    first, second = rng.sample(WORDS, 2)
    way = rng.randrange(3)
    if way == 0:
        if right:
            form = rng.choice((r'\text{{{}}}', r'\textbf{{{}}}', r'\mathrm{{{}}}', '{}.', '{}'))
            return 'word', rf'\text{{{first}}}', form.format(rng.choice((first, first.title())))
        letters = list(first)
        rng.shuffle(letters)
        anagram = ''.join(letters)
        other = second if anagram.lower() == first.lower() else anagram
        return 'word', rf'\text{{{first}}}', rf'\text{{{other}}}'
    i, j = rng.sample(range(1, 20), 2)
    reference = rf'\text{{{i} {first} and {j} {second}}}'
    if right:
        return (
            'word',
            reference,
            rng.choice(
                (rf'\text{{{j} {second} and {i} {first}}}', f'{i} {first} and {j} {second}')
            ),
        )
    return 'word', reference, rf'\text{{{j} {first} and {i} {second}}}'


def choice_pair(rng, right):
    letter, other = rng.sample('ABCDE', 2)
    n, text = number(rng)
    forms = (
        r'\textbf{{({0})}}\ {1}', r'\text{{({0}) }}{1}', '({0}) {1}', r'\text{{{0}: }}{1}',
        r'\mathrm{{({0})}}\ {1}',
    )  # fmt: skip
    form = rng.choice(forms)
    if right:
        plain = rng.choice((r'\text{{{}}}', '({})', '{}', r'\text{{({})}}', r'\textbf{{({})}}'))
        reference = plain.format(letter) if rng.random() < 0.7 else text
        return 'choice', reference, form.format(letter, text)
    if rng.random() < 0.5:
        return 'choice', rf'\text{{{letter}}}', form.format(other, text)
    return 'choice', form.format(letter, text), form.format(letter, Writer().number(n + 1))


def extreme_pair(rng, right):
    base, k = rng.randrange(2, 12), rng.randrange(30, 400)
    way = rng.randrange(5)
    if right:
        return 'extreme', *(
            (f'{base}^{{{k}}}-1', f'-1+{base}\\cdot {base}^{{{k - 1}}}'),
            (f'10^{{-{k}}}', rf'\frac{{1}}{{10^{{{k}}}}}'),
            (f'{k}!', f'{k}\\cdot {k - 1}!'),
            (f'x^{{{k}}}-1', f'x\\cdot x^{{{k - 1}}}-1'),
            (rf'{base}^{{{k}}}\pi+1', rf'1+\pi\cdot {base}^{{{k}}}'),
        )[way]
    return 'extreme', *(
        (f'{base}^{{{k}}}-1', rng.choice((f'{base}^{{{k}}}', f'{base}^{{{k}}}+1'))),
        (f'10^{{-{k}}}', rng.choice(('0', f'10^{{-{k + 1}}}'))),
        (rf'\frac{{1}}{{{k}!}}', rng.choice(('0', rf'\frac{{1}}{{{k + 1}!}}'))),
        (f'x^{{{k}}}-1', rng.choice((f'x^{{{k}}}+1', f'x^{{{k}}}', f'x^{{{k + 1}}}-1'))),
        (rf'{base}^{{{k}}}\pi+1', rf'{base}^{{{k}}}\pi'),
    )[way]


def matrix_pair(rng, right):
    rows, columns = rng.choice(((2, 1), (2, 2), (3, 1), (2, 3)))
    values = elements(rng, rows * columns)
    texts = list(values)

    def matrix(texts, form):
        lines = [' & '.join(texts[r * columns : (r + 1) * columns]) for r in range(rows)]
        inside = r' \\ '.join(lines)
        if form.startswith('array'):
            opening, closing = ('(', ')') if form == 'array(' else ('[', ']')
            return (
                rf'\left{opening}\begin{{array}}{{{"c" * columns}}}{inside}'
                rf'\end{{array}}\right{closing}'
            )
        return rf'\begin{{{form}}}{inside}\end{{{form}}}'

    reference = matrix(texts, 'pmatrix')
    form = rng.choice(('pmatrix', 'bmatrix', 'array(', 'array['))
    if right:
        return 'matrix', reference, matrix([restyled(rng, values[t]) for t in texts], form)
    other = changed_element(rng, texts) if rng.random() < 0.3 else swapped(rng, texts)
    return 'matrix', reference, matrix(other, form)


def equation_pair(rng, right):
    a, b, c = (rng.randrange(1, 15) for _ in range(3))
    reference = f'y={a}x+{b}' if rng.random() < 0.5 else f'{a}x+{b}y+{c}z={a * b + 1}'
    factor = rng.choice((-3, -2, 2, 3, 5))
    if reference.startswith('y'):
        if right:
            return 'equation', reference, rng.choice(
                (f'y={b}+{a}x', f'{factor}y={factor * a}x+{factor * b}'.replace('+-', '-'),
                 f'{a}x-y+{b}=0', f'f(x)={a}x+{b}')
            )  # fmt: skip
        return (
            'equation',
            reference,
            rng.choice(
                (f'y={a}x-{b}', f'y={a + 1}x+{b}', f'x={a}y+{b}', f'{a}x+y+{b}=0', f'y={a}x^2+{b}')
            ),
        )
    if right:
        left = f'{factor * a}x+{factor * b}y+{factor * c}z={factor * (a * b + 1)}'
        return 'equation', reference, left.replace('+-', '-')
    return 'equation', reference, rng.choice(
        (f'{a}x+{b}y-{c}z={a * b + 1}', f'{a}x+{b}y+{c}z={a * b}', f'{a}x+{b}y+{c}={a * b + 1}',
         f'{a}x+{b}y+{c + 1}z={a * b + 1}')
    )  # fmt: skip


KINDS = (
    (expression_pair, 6), (number_pair, 3), (tuple_pair, 2), (list_pair, 2), (interval_pair, 2),
    (union_pair, 1), (named_pair, 1), (value_name_pair, 1), (index_pair, 1), (word_pair, 1),
    (choice_pair, 1), (extreme_pair, 2), (matrix_pair, 1), (equation_pair, 1),
)  # fmt: skip


def generated_pairs(count, *, right, seed=0):
    """Return different pairs (kind, reference, answer), all right or all wrong."""
    rng = random.Random(f'{seed} {right}')
    makers, weights = zip(*KINDS, strict=True)
    pairs = {}
    for _ in itertools.repeat(None):
        if len(pairs) == count:
            return list(pairs)
        pair = rng.choices(makers, weights)[0](rng, right)
        if pair and pair[1] != pair[2]:
            pairs[pair] = None
