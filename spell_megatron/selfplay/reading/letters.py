"""Letters of choices in any dress: `(B)`, `**B.**`, `Option B`, `\\boxed{\\text{b}}`, `“B”`, `Ⓑ`.

Every rule holds for the four letters alike, because a reader that misses one of them more often pays
the policy for preferring the others. So a lone letter with a word behind it counts by that word: "A
because" and "B because" are choices, "A company" is an article and "B company" is not read either.
"""

from __future__ import annotations

import re
import unicodedata

from spell_megatron.selfplay.reading import words
from spell_megatron.selfplay.reading.latex import plain
from spell_megatron.selfplay.reading.statements import Statement, alone, denies, is_remark

_LONGEST = 400

_CIRCLED = {
    start + place: chr(ord("A") + place)
    for start in (0x1F150, 0x1F170, 0x1F1E6)  # negative circles, negative squares, regional indicators
    for place in range(4)
} | {0xFE0F: None, 0x20E3: None}

_OPEN = (
    r"[\s*_~\"'`$(\[{<\u00ab\u2039\u201c\u201d\u201e\u2018\u2019:|>#.,=\u2013\u2014\u2022"
    r"\u2190-\u21ff\u27a1-]{0,12}"
)
_CLOSE = r"[)\]}*_\"'`$>\u00bb\u203a\u201c\u201d\u2018\u2019.,:;!?|]"
_LEAD = (
    r"(?:(?:the|an|is|be|correct|right|final|single|indeed|clearly|definitely|certainly|therefore|thus|hence|surely"
    r"|obviously|evidently|most|very|probably|likely|simply|just|only|again|still|then|so|actually"
    r"|undoubtedly|listed as|none other than|choices?"
    rf"|options?|answers?|letters?|alternatives?|statements?|items?|number|given by|under|marked|labell?ed)\b{_OPEN})"
)
_LETTER = re.compile(rf"{_OPEN}(?P<lead>{_LEAD}{{0,6}})(?P<letter>[A-Da-d])(?![^\W_])", re.IGNORECASE)
_NOUN = re.compile(r"(?:choice|option|letter|alternative|answer|statement|item)s?\W*$", re.IGNORECASE)
_GLUED = re.compile(r"['\u2019.\u2010-\u2015&/+#@-]\w|\+|#|[_>][^\W_]")
_ANOTHER = r"\s{0,3}(?:(?:option|choice)\s)?[(\[*\"']{0,4}[A-H]\b(?!['\u2019]\w)"
_OTHER = re.compile(
    rf"(?:{_CLOSE}|\s){{0,8}}(?:(?:and|or|und|/|&|\+){_ANOTHER}"
    rf"|[,;.|)\]\s]{_ANOTHER}(?=\W{{0,8}}(?:$|(?:[A-H]|and|or|are)\b)))"
)
"""One more letter behind a letter. In "B. A is wrong" and "B: A new one" it begins something else."""
_SEVERAL = re.compile(rf"(?=\b([A-H]{_OTHER.pattern}))")
"""Two letters of a list, which marks none of them."""
_ENDED = re.compile(rf"(?:{_CLOSE}|\s*$|\s*[\u2013\u2014(\[:\n<-])")
_EQUATION = re.compile(r"\s*[=+^\u2264\u2265]|[*/<>]\w")
_WORD = re.compile(r"\s+([^\W\d_]+)")
_FOLLOWERS = words(
    "because since as and which that is was are were for from in on at by due given based with without"
    " not rather so hence while whereas if when where who whose per according it this these those we they"
    " he she i both all each every only also but though although however therefore thus after before"
    " considering following supported confirmed stated shown seen above below here among of to the out"
    " under indeed then into between being has had would will can should my our his her their its either"
    " neither alone instead too"
)
_MARKED = re.compile(
    r"[(\[]\s?([A-H])\s?[)\]]|\b(?:[Oo]ption|[Cc]hoice|[Ll]etter|[Aa]nswer|[Aa]lternative)\s+[\"'(\[*]{0,4}([A-H])\b"
    r"|[,:]\s[\"'(\[*]{0,4}([A-H])\W*$"
)


def stated(statement: Statement) -> str | None:
    """The letter A-D with which a statement begins, or that it gives behind its last colon."""
    text = _tidy(statement.text)
    return _first(text) or _first(text.rpartition(": ")[2])


def mentioned(statement: Statement) -> str | None:
    """The only letter that a statement marks as one, where it denies nothing and is no remark."""
    return None if is_remark(statement) else remarked(statement)


def remarked(statement: Statement) -> str | None:
    """The same of remarks, too, where nothing else holds one."""
    text = _tidy(alone(statement.text))
    marked = list(_MARKED.finditer(text))
    found: set[str] = {match[match.lastindex or 0] for match in marked}
    if len(found) != 1 or not found < set("ABCD") or denies(text):
        return None
    lists = [match.span(1) for match in _SEVERAL.finditer(text)]
    places = [match.start(match.lastindex or 0) for match in marked]
    return None if any(start <= place < end for place in places for start, end in lists) else found.pop()


def _first(text: str) -> str | None:
    match = _LETTER.match(text)
    if match is None:
        return None
    end = match.end()
    if _GLUED.match(text, end) or _EQUATION.match(text, end) or _OTHER.match(text, end):
        return None
    word = _WORD.match(text, end)
    is_choice = bool(
        _NOUN.search(match["lead"])
        or _ENDED.match(text, end)
        or (word and (word[1][0].isupper() or word[1] in _FOLLOWERS))
        or not word
    )
    return match["letter"].upper() if is_choice else None


def _tidy(text: str) -> str:
    text = plain(text[:_LONGEST]).translate(_CIRCLED)
    return unicodedata.normalize("NFKC", text)[: 2 * _LONGEST].strip()
