r"""Units after numbers and formulas: which words are units, and one spelling of those known.

A unit that is known is kept as `\unit{cm}`, so that 5 cm is not 5 m. Any other word after a number,
as in `18\text{ eggs}`, is dropped.
"""

import re

_SPELLINGS = {
    'mm': 'millimeter millimetre',
    'cm': 'centimeter centimetre 厘米',
    'm': 'meter metre 米',
    'km': 'kilometer kilometre 千米 公里',
    'in': 'inch',
    'ft': 'foot feet',
    'yd': 'yard',
    'mi': 'mile',
    'mg': 'milligram',
    'g': 'gram 克',
    'kg': 'kilogram 千克 公斤',
    'lb': '',
    'pound': '',
    'oz': 'ounce',
    'ml': 'milliliter millilitre 毫升',
    'L': 'liter litre l 升',
    's': 'second sec 秒',
    'min': 'minute 分钟',
    'h': 'hour hr 小时',
    'day': '天',
    'week': '周',
    'month': '月',
    'year': 'yr 年',
    'mph': '',
    'km/h': 'kmh kph',
    'm/s': '',
    'N': 'newton',
    'kN': '',
    'J': 'joule',
    'kJ': '',
    'W': 'watt',
    'kW': '',
    'V': 'volt',
    'Hz': '',
    'kHz': '',
    'Pa': '',
    'kPa': '',
    'mol': '',
    'ms': 'millisecond 毫秒',
    'thousand': '',
    'million': '',
    'billion': '',
    'trillion': '',
    'dozen': '',
    'dollar': '＄',
    'usd': 'us us＄ 美元',
    'hkd': 'hk hk＄ 港元 港币',
    'aud': 'au＄',
    'cad': 'ca＄',
    'nzd': 'nz＄',
    'twd': 'nt＄',
    'cent': '¢',
    'euro': 'eur € 欧元',
    'gbp': '£ sterling 英镑',
    '¥': '',
    'yuan': 'cny rmb 元 人民币',
    'yen': 'jpy 円 日元',
    'rupee': 'inr rs ₹',
    'won': 'krw ₩',
    'ruble': 'rub руб ₽',
    'chf': '',
    'rad': 'radian',
    'deg': 'degree',
    'kWh': '',
    'kB': '',
    'MB': '',
    'GB': '',
    'TB': '',
    '万': '万元',
    '亿': '亿元',
}
_KNOWN = {
    spelling: unit for unit, others in _SPELLINGS.items() for spelling in [unit, *others.split()]
}
_MEANINGS = {  # of units with more than one
    'dollar': {'dollar', 'usd', 'hkd', 'aud', 'cad', 'nzd', 'twd'},
    'pound': {'pound', 'lb', 'gbp'},
    '¥': {'¥', 'yuan', 'yen'},
}
# Words that tell values apart like units: 6 km north is not 6 km south.
_DISTINCT = re.compile(
    r'\b(?:(?:north|south)(?:east|west)?|east|west|up|down|left|right|(?:counter)?clockwise'
    r'|red|blue|green|yellow|black|white|(?:mon|tues|wednes|thurs|fri|satur|sun)day'
    r'|january|february|march|april|may|june|july|august|september|october|november|december'
    r'|increase|decrease|profit|loss|am|pm|bc|ad|heads|tails)\b'
)
_POWERS = {'square': '2', 'sq': '2', 'cubic': '3', 'cu': '3'}
_POWER = re.compile(r'(.+?)(?: *\^ *\{? *([23]) *\}?)')

TEXT = (
    r'\\(?:text(?:bf|it|rm|sf|normal)?|mbox|math(?:rm|bf|it|sf)|operatorname|bm|boldsymbol)'
    r' *\{([^{}]*)\}'
)
_UPRIGHT = r'\\(?:text(?:bf|it|rm|sf|normal)?|mbox|mathrm(?! *\{ *[eidT] *\})) *\{[^{}]*\}'
_TEXT_UNIT = re.compile(
    rf'(?<=[0-9}})A-Za-z%])[ ]*(?P<unit>(?:{_UPRIGHT}(?:\^[ ]*\{{?-?[0-9]\}}?)?'
    r'(?:[ ./]|\\cdot(?![a-z]))*)+)$'
)
# A unit in plain letters after a number or a closing brace. Other short words may be variables.
_PLAIN_UNIT = re.compile(
    r'(?<=[0-9}%])(?: +(?=[A-Za-z])|(?=[cmk]m$|k[gm]$|ml$))(?P<unit>'
    r'(?:(?!and|not)[a-z]{3}(?= [A-Za-z]{4})|[A-Za-z\u00c0-\u017f]{4,}'
    r'|[ckm]?m|[mk]?g|ml|lbs?|oz|ft|in|mi|yd|sq|cu|hrs?|min|sec|mph|deg|per'
    r'|m?s|h|L|V|k?[NJW]|k?Hz|k?Pa|mol'
    r'|USD|EUR|GBP|CHF|CNY|RMB|JPY|yen|Rs|kr|zł|rad|kWh|[kMGT]B)'
    r'(?:[ /]+[A-Za-z]+)*(?: *\^ *\{?[23]\}?)?)\.?$'
)
_DOLLARS = '(?:(?:US|HK|AU|CA|NZ|NT) ?)?＄'
_CURRENCY = rf'[€£¥₹₩₽¢]|{_DOLLARS}'
_SIGN_UNIT = re.compile(
    rf'(?<=[0-9}}%]) *(?P<unit>{_CURRENCY}|[\u0400-\u04ff\u3040-\u9fff\uac00-\ud7af]+)\.?$'
)
_SIGN_BEFORE = re.compile(
    rf'^(?P<before>(?:[^=]*=)? *-?) *(?P<sign>{_CURRENCY}'
    r'|Rs\.?|USD?|EUR|GBP|CHF|CNY|RMB|JPY|INR|HK|人民币) *(?=-?[0-9.\\])'
)
_SIGN_IN_FORM = re.compile(r'(-?)([€£¥₹₩₽])(?=[0-9.][0-9.,]*$)')
_VARIABLE = re.compile(r'(?<![\\A-Za-z])[A-Za-z]')
_WRAPPED = re.compile(TEXT)
_COMMAND = re.compile(r'\\[A-Za-z]+')
_WORD = re.compile(r'[A-Za-z]{3,}|(?<=[0-9] )[A-Za-z]{2,}|[\u3040-\u9fff]')
_SEPARATOR = re.compile(r'[,;](?![0-9]{3}(?![0-9]))')
_UNIT = re.compile(r'\\unit\{([^{}]*)\}$')


def strip_units(text: str) -> str:
    r"""Remove the units in a LaTeX text: of one value, or of all values in a list.

    The unit is kept as a suffix, such as `\unit{cm}`, if it is known; `＄5` becomes
    `5\unit{dollar}`. Units are kept as they are where they tell values apart, as in
    `3\text{ red}, 2\text{ blue}`.
    """
    return _strip_units(text).replace('＄', '')


def _strip_units(text: str) -> str:
    elements = _SEPARATOR.split(text)
    if len(elements) > 1 and any(
        element.count(o) != element.count(c) for element in elements for o, c in ('()', '[]', '{}')
    ):
        elements = [text]  # a bracket: its unit follows it
    values, units = zip(*map(_split_unit, elements), strict=True)
    named = {unit for unit in units if unit}
    # Values with and without words, as in 3 red, 2 blue: the words tell the values apart.
    if any(_has_words(value) for value, unit in zip(values, units, strict=True) if not unit):
        return text
    if not named or len(named) > 1 or (len(named) == 1 and not units[-1]):
        return text
    unit = _canonical(units[-1])
    return ', '.join(values) + (f'\\unit{{{unit}}}' if unit else '')


def same_unit(a: str, b: str) -> bool:
    """Return whether two known units can be the same: £ and pound, but not £ and €."""
    return not _MEANINGS.get(a, {a}).isdisjoint(_MEANINGS.get(b, {b}))


def split_known_unit(form: str) -> tuple[str, str]:
    r"""Return a normal form without its unit, and the unit, '' if there is none.

    The unit is a suffix `\unit{…}`, or a sign before an element of a tuple, as in `(£5,€6)`.
    """
    if match := _UNIT.search(form):
        return form[: match.start()], match[1]
    sign = _SIGN_IN_FORM.match(form)
    return (sign[1] + form[sign.end() :], _canonical(sign[2])) if sign else (form, '')


def _split_unit(text: str) -> tuple[str, str]:
    """Return a value and its unit as written; the unit is '' if there is none."""
    text = text.rstrip()
    if sign := _SIGN_BEFORE.match(text):
        rest = text[sign.end() :].replace(sign['sign'], '')  # €5 - €3
        value, unit = _split_unit(sign['before'].lstrip() + rest)
        return value, unit if _canonical(unit) else sign['sign']
    if match := _TEXT_UNIT.search(text):
        value, unit = text[: match.start()], _WRAPPED.sub(r'\1', match['unit']).strip(' .')
        if unit.startswith('-'):  # x-axis
            return text, ''
    else:
        unwrapped = _WRAPPED.sub(r'\1', text)
        match = _PLAIN_UNIT.search(unwrapped) or _SIGN_UNIT.search(unwrapped)
        if not match or text.lstrip().startswith('\\begin'):
            return text, ''
        value, unit = unwrapped[: match.start()], match['unit']
        if len(unit) == 1 and _VARIABLE.search(_without_names(value)):  # x^2 m
            return text, ''
    # Another word before the unit, as in 3 hours 20 minutes: the unit is one of several.
    return (text, '') if _has_words(_without_names(value)) else (value, unit)


def _has_words(text: str) -> bool:
    return _WORD.search(_COMMAND.sub(' ', text)) is not None


def _without_names(value: str) -> str:
    """Remove what comes before the last equals sign: the name of the value."""
    return value.rpartition('=')[2]


def _canonical(unit: str) -> str:
    """Return the one spelling of a known unit, with its power; '' if it is not known."""
    words = unit.replace('.', ' ').replace(' ＄', '＄').split()
    if distinct := _DISTINCT.findall(unit.replace('.', '').lower()):
        return ' '.join(distinct)
    power = _POWERS.get(words[0].lower(), '') if len(words) > 1 else ''
    name = ' '.join(words[1:] if power else words)
    if match := _POWER.fullmatch(name):
        name, power = match.groups()
    lower = name.lower()
    stems = (name, lower, lower.removesuffix('s'), lower.removesuffix('es'))
    known = next((_KNOWN[stem] for stem in stems if stem in _KNOWN), '')
    return f'{known}^{power}' if known and power else known
