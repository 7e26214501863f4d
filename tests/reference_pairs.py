"""Wrong and right answers made from published references, and a small evaluator that tells them.

The evaluator reads the plain part of LaTeX (numbers, letters, fractions, roots, powers, products,
brackets with elements) and shares nothing with the package. References that it cannot read are
rewritten only in ways that change no content, and are not used for wrong answers.
"""

import random
import re

import mpmath

_TOKEN = re.compile(r'\\[A-Za-z]+|[0-9]+(?:\.[0-9]+)?|\.[0-9]+|.')
_CLOSING = {'(': ')', '[': ']', '{': '}'}


class Unreadable(ValueError):
    """A text outside the plain part of LaTeX."""


class _Reader:
    """A recursive descent over the tokens of one value."""

    def __init__(self, text):
        self.tokens = _TOKEN.findall(re.sub(r'\s', '', text))
        self.position = 0

    def peek(self):
        return self.tokens[self.position] if self.position < len(self.tokens) else ''

    def take(self, expected=None):
        token = self.peek()
        if not token or (expected and token != expected):
            raise Unreadable(token)
        self.position += 1
        return token

    def sum(self):
        sign = -1 if self.peek() == '-' else 1
        if self.peek() in ('+', '-'):
            self.take()
        total = sign * self.product()
        while self.peek() in ('+', '-'):
            sign = -1 if self.take() == '-' else 1
            total += sign * self.product()
        return total

    def product(self):
        result = self.power()
        while self.peek() and self.peek() not in ('+', '-', ')', '}', ']', '|'):
            if self.peek() == '/':
                self.take()
                result /= self.power()
                continue
            if self.peek() in (r'\cdot', r'\times', '*'):
                self.take()
            elif self.peek()[0].isdigit():
                raise Unreadable('a number after a factor')
            result *= self.power()
        return result

    def power(self):
        base = self.atom()
        if self.peek() == '^':
            self.take()
            base = base ** (self.group() if self.peek() == '{' else self.atom())
        return base

    def group(self):
        self.take('{')
        result = self.sum()
        self.take('}')
        return result

    def argument(self):
        return self.group() if self.peek() == '{' else mpmath.mpf(self.take_digit())

    def take_digit(self):
        token = self.take()
        if not token.isdigit():
            raise Unreadable(token)
        if len(token) > 1:
            self.tokens[self.position - 1 : self.position] = [token[0], token[1:]]
        return token[0]

    def atom(self):
        token = self.take()
        if token[0].isdigit() or (token[0] == '.' and len(token) > 1):
            if self.peek() in (r'\frac', r'\dfrac', r'\tfrac'):
                raise Unreadable('a mixed fraction')
            return mpmath.mpf(token)
        if token in (r'\frac', r'\dfrac', r'\tfrac'):
            top = self.argument()
            return top / self.argument()
        if token == r'\sqrt':
            degree = 2
            if self.peek() == '[':
                self.take('[')
                degree = self.sum()
                self.take(']')
            return self.argument() ** (mpmath.mpf(1) / degree)
        if token == r'\pi':
            return +mpmath.pi
        if token == '(':
            result = self.sum()
            self.take(')')
            return result
        if token == 'e':
            return +mpmath.e
        if token == 'i':
            return mpmath.mpc(0, 1)
        if len(token) == 1 and token.isalpha():
            return mpmath.mpf(ord(token)) / 37 + mpmath.mpf(1) / (ord(token) - 40)
        raise Unreadable(token)


def _scalar(text):
    reader = _Reader(text)
    try:
        result = reader.sum()
    except (ZeroDivisionError, OverflowError) as error:
        raise Unreadable(text) from error
    if reader.peek():
        raise Unreadable(reader.peek())
    return result


def _split(text):
    pieces, depth = [''], 0
    for character in text:
        depth += (character in '([{') - (character in ')]}')
        if character == ',' and not depth:
            pieces.append('')
        else:
            pieces[-1] += character
    return pieces


def read(text):
    """Return (kind, values) of a reference; raise `Unreadable`."""
    if re.search(r'[0-9]\s+[0-9]', text):
        raise Unreadable('two numbers')
    text = re.sub(r'\\left|\\right|(?<!\\)\\[, !]', '', text).strip()
    matrix = re.fullmatch(r'\\begin\{pmatrix\}(.*)\\end\{pmatrix\}', text, re.DOTALL)
    if matrix:
        rows = [row.split('&') for row in matrix[1].split('\\\\')]
        return f'matrix {[len(row) for row in rows]}', [_scalar(c) for row in rows for c in row]
    pieces = _split(text)
    if len(pieces) > 1:
        return 'list', [read(piece) for piece in pieces]
    if text[:1] in ('(', '[') and text[-1:] in (')', ']') and len(_split(text[1:-1])) > 1:
        ends = [_scalar(e) for e in _split(text[1:-1].replace(r'\infty', 'Q'))]
        return text[0] + text[-1], ends
    return 'value', [_scalar(text)]


def _same(a, b):
    if isinstance(a, tuple):
        same_kind = a[0] == b[0] and len(a[1]) == len(b[1])
        if a[0] == 'list' and same_kind:
            rest = list(b[1])
            for element in a[1]:
                equal = next((other for other in rest if _same(element, other)), None)
                if equal is None:
                    return False
                rest.remove(equal)
            return True
        return same_kind and all(_same(x, y) for x, y in zip(a[1], b[1], strict=True))
    return abs(a - b) <= mpmath.mpf(10) ** -30 * max(abs(a), abs(b))


def _changed(rng, text):
    """Return the text with a digit, sign, letter, bracket or order changed."""
    digits = [m for m in re.finditer('[0-9]', text)]
    way = rng.randrange(6)
    if way in (0, 1) and digits:
        k = rng.choice(digits).start()
        digit = (int(text[k]) + (rng.choice((1, 9)) if way else rng.randrange(1, 10))) % 10
        return f'{text[:k]}{digit}{text[k + 1 :]}'
    if way == 2:
        signs = [m.start() for m in re.finditer('[-+]', text)]
        if signs and rng.random() < 0.7:
            k = rng.choice(signs)
            return text[:k] + ('+' if text[k] == '-' else '-') + text[k + 1 :]
        return text[1:] if text.startswith('-') else f'-{text}'
    if way == 3:
        letters = re.findall(r'(?<![\\A-Za-z])[a-z](?![A-Za-z])', text)
        if letters:
            return re.sub(rf'(?<![\\A-Za-z]){rng.choice(letters)}(?![A-Za-z])', 'w', text, count=1)
    inner = re.fullmatch(r'(\\left)?([(\[])(.*?)(\\right)?([)\]])', text)
    if inner and len(_split(inner[3])) > 1:
        if way == 4:
            pieces = _split(inner[3])
            rng.shuffle(pieces)
            return f'{inner[2]}{",".join(pieces)}{inner[5]}'
        other = {'(': '[', '[': '(', ')': ']', ']': ')'}
        return f'{other[inner[2]]}{inner[3]}{inner[5]}'
    powers = [m.start(1) for m in re.finditer(r'\^\{?([0-9])', text)]
    if powers:
        k = rng.choice(powers)
        return f'{text[:k]}{(int(text[k]) + 1) % 10}{text[k + 1 :]}'
    return re.sub('([0-9])([0-9])', r'\2\1', text, count=1)


def wrong_pairs(references, count, seed=0):
    """Return `count` different pairs of a reference and an answer of another value."""
    rng = random.Random(seed)
    pairs = {}
    readable = {}
    for text in dict.fromkeys(references):
        try:
            with mpmath.workdps(50):
                readable[text] = read(text)
        except Unreadable:
            continue
    texts = list(readable)
    while len(pairs) < count:
        reference = rng.choice(texts)
        answer = _changed(rng, reference)
        try:
            with mpmath.workdps(50):
                if not _same(readable[reference], read(answer)):
                    pairs[reference, answer] = None
        except Unreadable:
            continue
    return list(pairs)


def _is_scalar(text):
    try:
        return read(text)[0] == 'value'
    except Unreadable:
        return False


def _respelled(rng, text):
    """Return other LaTeX for the same content."""
    spaced = re.sub(r'(?<![\\A-Za-z\s]) ?([-+]) ?(?=[0-9A-Za-z\\])', r' \1 ', text)
    plain_power = re.sub(r'\^\{([0-9])\}', r'^\1', text)
    options = [
        text.replace(r'\frac', r'\dfrac'),
        re.sub(r'\\[dt]frac', r'\\frac', text),
        re.sub(r'(?<![\\A-Za-z]) ', '', text),
        spaced if text[:1] not in '-+' else text + ' ',
        plain_power if plain_power != text else re.sub(r'\^([0-9])(?![0-9])', r'^{\1}', text),
        f'${text}$',
        f'{text}.',
        f'{{{text}}}',
        rf'\displaystyle {text}',
        rf'\boxed{{{text}}}',
        rf'\ {text}\ ',
        text.replace('pmatrix', 'bmatrix'),
        text.replace(',', ', ') if not re.search(r'[0-9],(\\!|[0-9]{3})', text) else text,
        re.sub(r'\\sqrt\{([0-9])\}', r'\\sqrt\1', text),
        text.replace(r'\cup', r'\,\cup\,'),
        text.replace(r'\pi', r'\pi '),
        text.replace(r'\text', r'\mbox'),
    ]
    if not re.search(r'\\(?:left|right|begin)', text) and text.count('(') == text.count(')'):
        options.append(text.replace('(', r'\left(').replace(')', r'\right)'))
    options.append(re.sub(r'\\left|\\right', '', text))
    if _is_scalar(text):
        options += [f'x={text}', f'A = {text}', rf'\left({text}\right)', rf'{text}\text{{ units}}']
        if re.fullmatch('[0-9]+', text):
            options += [
                f'{int(text):,}',
                f'{text}.0',
                rf'{text}^\circ',
                rf'\$ {text}',
                f'{text} cm',
            ]
            options.append(f'{int(text):,}'.replace(',', r',\!'))
        fraction = re.fullmatch(r'(-?)\\[dt]?frac\{([0-9]+)\}\{([0-9]+)\}', text)
        if fraction:
            sign, top, bottom = fraction.groups()
            options += [f'{sign}{top}/{bottom}', rf'\frac{{{sign}{top}}}{{{bottom}}}']
            if int(top) > int(bottom):
                whole, rest = divmod(int(top), int(bottom))
                options.append(rf'{sign}{whole}\frac{{{rest}}}{{{bottom}}}')
            if 10**4 % int(bottom) == 0:
                options.append(f'{sign}{int(top) / int(bottom)}')
    pieces = _split(text)
    grouped = re.search(r'[0-9], *(\\!|[0-9]{3})', text)
    if len(pieces) > 1 and not grouped and all(_is_scalar(piece) for piece in pieces):
        rng.shuffle(pieces)
        options += [', '.join(pieces), ','.join(pieces[:-1]) + r'\text{ and }' + pieces[-1]]
    return rng.choice(options)


def right_pairs(references, count, seed=0):
    """Return `count` different pairs of a reference and the same answer in another spelling."""
    rng = random.Random(seed)
    pairs = {}
    texts = list(dict.fromkeys(references))
    while len(pairs) < count:
        reference = rng.choice(texts)
        answer = _respelled(rng, reference)
        if rng.random() < 0.5:
            again = _respelled(rng, answer)
            # Not what only ends or wraps an answer in the middle of another such.
            answer = (
                again if not re.search(r'[$.]|boxed|displaystyle|=|units|cm', answer) else answer
            )
        if answer != reference:
            pairs[reference, answer] = None
    return list(pairs)
