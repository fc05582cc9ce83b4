"""Numbers in one spelling: ASCII digits and signs, no separators of thousands, no units, no dates.

What is left is for the grammar of `selfplay.numbers`. Groups of digits may stand apart by commas, blanks of any
width, apostrophes, underscores or points (two and more, or with a decimal comma behind them); a lone comma that
groups nothing is a decimal one. Words of scale leave so much that both the bare figure and the number written out are
within a factor that numeric equality allows (`tasks.number.SCALES`): 5 million is 5, 5 trillion 5e3, and 5万, fifty
thousand, 5e2.
"""

from __future__ import annotations

import re
import unicodedata

from spell_megatron.selfplay.reading.latex import plain

_LONGEST = 800
"""Characters that are kept: some are longer in their compatibility form."""

_LOOKALIKES = str.maketrans(
    {
        **dict.fromkeys("\u2010\u2011\u2012\u2013\u2014\u2015\u2212\ufe58\ufe63\uff0d", "-"),
        **dict.fromkeys("\u2018\u2019\u02bc\u2032\u00b4`", "'"),
        **dict.fromkeys("\u2248\u2243\u2245\u223c", "="),
        **dict.fromkeys("\u00d7\u00b7\u22c5\u2217\u2219", "*"),
        **dict.fromkeys("\u2044\u2215\u00f7", "/"),
        **{"\u066b": ".", "\u066c": ",", "\u221a": "sqrt"},
    }
)
_RAISED = re.compile("[\u207b\u207a]?[\u2070\u00b9\u00b2\u00b3\u2074-\u2079]+")
_VULGAR = re.compile("[\u00bc-\u00be\u2150-\u215e\u2189]")
_HTML_SPACES = re.compile(r"&(?:nbsp|thinsp|ensp|emsp|#160|#8239);")
_WORDS = re.compile(
    r"(?<![a-z])(?:approximately|approx\.?|about|around|roughly|nearly|almost|circa|ca\.|exactly|equal to|equals"
    r"|thousands?|millions?|billions?|trillions?|lakhs?|crores?|per ?cent|percentage points?"
    r"|us\$|hk\$|ca?\$|au?\$|usd|eur|gbp|rmb|cny|jpy|chf|inr|krw|cad|aud|hkd|sgd|rs\.?|us"
    r"|dollars?|euros?|pounds?|yuan|yen|rupees?|cents?|and(?= \d{1,4} ?/ ?\d))(?![a-z])",
    re.IGNORECASE,
)
ZEROS = {
    **{"thousand": 3, "million": 6, "billion": 9, "trillion": 12, "lakh crore": 12, "lakh": 5, "crore": 7},
    **{"万亿": 12, "万": 4, "萬": 4, "亿": 8, "億": 8},
}
"""Of the powers of ten that words of scale stand for."""
_LEFT = {12: 3, 8: 2, 5: 2, 4: 2}
"""Zeros that stay in the number; none of 7, which is no product of two factors: the bare figure counts."""
_SCALES = rf"(?ai:{'|'.join(ZEROS)})"
SCALE = rf"(?P<scale>{_SCALES})s?(?![a-z])"
_SCALED = re.compile(
    r"(?P<sign>(?:(?<=\d)|(?<=\d ))/ ?|[\^*] ?)?(?<![\d.e])(?P<number>\d+(?:\.\d+)?|\.\d+)"
    rf"(?P<close>[\s~)\]}}$*_-]{{0,8}}){SCALE}"
    rf"(?P<another>\s*[$£€¥]?(?=\d[\d.,]*\s*(?:{_SCALES}|\W*$)))?",
    re.IGNORECASE,
)
_SIGNS = re.compile(r"[$£€¥₹₩₽%‰°~{}\[\]\"\u201c\u201d\u00ab\u00bb]|\\")
_GROUPS = re.compile(
    r"(?<![\d.,'])(?<!\d[ _])(?:\d{1,3}(?:,\d{3})+(?!,\d)|\d{1,2}(?:,\d\d)+,\d{3}(?!,\d)"  # 1,234,567 and 12,34,567
    r"|\d{1,3}(?: \d{3})+|\d{1,3}(?:'\d{3})+|\d{1,3}(?:_\d{3})+"
    r"|\d{1,3}(?:\.\d{3}){2,}|\d{1,3}(?:\.\d{3})+(?=,\d))(?!['_]?\d)(?![, ]\d{3}(?!\d))(?!\.\d+[.,]\d)"
)
_COMMA = re.compile(r"(?<![\d.,])(\d+),(\d+)(?![\d.,]*\d)")
_TIMES = re.compile(r"(?<=[\d)]) ?[xX] ?(?=[\d(])")
_MIXED = re.compile(r"(?<![\d.])(\d+) ?\(\((\d+)\)/\((\d+)\)\)")
_LOOSE_SIGN = re.compile(r"([-+])\s+(?=[\d.])")

# --- What has digits and is no number.

_MONTH = (
    r"(?:Jan(?:uary)?|Feb(?:ruary)?|Mar(?:ch)?|Apr(?:il)?|May|June?|July?|Aug(?:ust)?|Sept?(?:ember)?|Oct(?:ober)?"
    r"|Nov(?:ember)?|Dec(?:ember)?)\b\.?"
)
_DATES = re.compile(
    r"(?<![\d.])\d{4}([-/.])\d{1,2}\1\d{1,2}(?![\d])"  # 2019-03-05
    r"|(?<![\d.])\d{1,2}([-/.])\d{1,2}\2(?:\d{4}|\d\d)(?!\d)"  # 05.03.2019
    rf"|(?:\b\d{{1,2}}(?:st|nd|rd|th)? (?:of )?)?\b{_MONTH}(?:[ -]\d{{1,2}}(?:st|nd|rd|th)?\b,?)?(?:,?[ -]\d{{2,4}}\b)?"
    r"|\b(?:[QqHh][1-4]|[1-4][QqH]|FY|CY)[ -]?'?(?:\d{4}|\d\d)?\b"  # Q3, 2H 2020, FY19
    r"|\b[1-4]h[ -]?(?:\d{4}|'\d\d)\b|(?<=\b\d{4}[ -])[1-4]h\b"  # 2h 2020, and not the 2h of a day
    r"|\b\d{1,3} ?h ?\d{1,2}(?!\d)"  # 2h30, 3h 20m
    r"|\b(?:quarter|half|year|years)(?: of)?(?: fiscal)?(?: year)? \d{4}\b"
    r"|\b\d+(?:st|nd|rd|th)\b"
    r"|(?<![\d.])(?!(?:1[5-9]|2[01])\d\d : )\d+(?:\.\d+)?(?:(?::| : )\d+(?:\.\d+)?)+"  # 12:30, 3.5 : 1
    r"|(?<![\d.-])\d+(?:-\d+){2,}(?![\d.])"  # 555-12-34
)
DATE = "\u00a7"
"""Stands for one of them: neither a number nor nothing."""
_DEGREES = re.compile(r"\^ ?(?:\( ?\u00b0[^()\d]{0,8}\)|\u00b0)")
_FUNCTIONS = re.compile(
    r"(?<![a-z])(?:log|ln|lg|exp|sin|cos|tan)(?: ?_ ?\d++|\d++)?+(?=\s*[(\d])", re.IGNORECASE
)
"""Whose value is not that of what they are of."""


def tidy(text: str) -> str:
    """ASCII digits and signs, no separators, no units, one sign in the place of a date."""
    text = _DEGREES.sub("\u00b0", plain(_HTML_SPACES.sub(" ", text)))
    text = _VULGAR.sub(lambda match: f" {unicodedata.normalize('NFKC', match[0])}", text)
    text = _RAISED.sub(_raised, text)
    text = unicodedata.normalize("NFKC", text.translate(_LOOKALIKES)).translate(_LOOKALIKES)[:_LONGEST]
    text = re.sub(r"(?<=\d)[\s~](?=\d)", " ", text).strip(" \t\r\n*").rstrip(" .*;,!")
    text = _DATES.sub(_dated, text)
    text = _GROUPS.sub(lambda match: re.sub(r"[^\d]", "", match[0]), text)
    text = _SCALED.sub(_scaled, _COMMA.sub(r"\1.\2", text))
    text = _FUNCTIONS.sub(f" {DATE}*", text)
    text = _SIGNS.sub(" ", _WORDS.sub(" ", text))
    text = _MIXED.sub(r"\1 \2/\3", _TIMES.sub("*", text))
    return _LOOSE_SIGN.sub(r"\1", text).strip()


def _scaled(match: re.Match[str]) -> str:
    """A number without its word of scale. One more behind it is another number, since "1 million 200" is neither."""
    sign, number, close = match["sign"] or "", match["number"], match["close"]
    if left := _LEFT.get(ZEROS[match["scale"].lower()]):
        close = ")" * close.count(")")
        close = f"{close}*1e{left}" if sign or close else f"e{left}"  # 1/2 trillion, 3-5 trillion
    return f"{sign}{number}{close}{' and ' if match['another'] is not None else ' '}"


def _raised(match: re.Match[str]) -> str:
    """An exponent behind a digit or bracket; that of a unit (m²) goes."""
    before = match.string[match.start() - 1 : match.start()]
    return f"^({unicodedata.normalize('NFKC', match[0])})" if before.isdigit() or before == ")" else ""


def _dated(match: re.Match[str]) -> str:
    """The sign of a date; a month's name without any digit is only a word."""
    return f" {DATE} " if any(map(str.isdigit, match[0])) or match[0][:2] in ("FY", "CY") else match[0]
