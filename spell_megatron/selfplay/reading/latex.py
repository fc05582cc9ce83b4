"""LaTeX and inline HTML as plain characters: `\\mathbf{B}` is B, `\\frac{1}{2}` ((1)/(2)), `1{,}234` 1,234.

One pass with a stack of open groups. Only the dress is known: what is no dress, space or arithmetic
stays as it was written (`\\alpha`).
"""

from __future__ import annotations

import re
from typing import NamedTuple

from spell_megatron.selfplay.reading import words

_TOKEN = re.compile(
    r"\\sqrt[ \t]?\[([^\[\]\\{}]{0,8})\]|\\([A-Za-z]+)\*?[ \t]?|\\(.)|([{}])|([^\\{}]+)", re.DOTALL
)
_DRESS = words(
    "text textbf textit textrm textsf texttt textsc textup textnormal emph mbox hbox mathbf mathrm mathit"
    " mathsf mathtt mathcal mathbb mathfrak boldsymbol bm pmb operatorname underline overline boxed fbox"
    " framebox displaystyle textstyle scriptstyle left right big Big bigg Bigg bigl bigr Bigl Bigr middle"
    " rm bf it sf tt bfseries itshape num qty SI ensuremath mathop mathord mathopen mathclose centering"
    " large Large LARGE huge limits nolimits strut protect"
)
_SPACES = words("quad qquad enspace enskip thinspace medspace thickspace space newline nobreakspace")
_FRACTIONS = words("frac dfrac tfrac cfrac sfrac nicefrac")
_DROPPED = words("hspace vspace color phantom hphantom label begin end tag textcolor fontsize")
"""Commands whose first argument is no text."""
_SYMBOLS = {
    **dict.fromkeys(("times", "cdot", "ast"), "\u00d7"),
    **dict.fromkeys(("approx", "simeq", "sim", "thickapprox", "doteq"), "\u2248"),
    **dict.fromkeys(("le", "leq"), "\u2264"),
    **dict.fromkeys(("ge", "geq"), "\u2265"),
    **dict.fromkeys(("circ", "degree"), "\u00b0"),
    **{"div": "/", "pm": "\u00b1", "percent": "%", "dollar": "$", "pounds": "\u00a3", "euro": "\u20ac"},
    **{"negthinspace": "", "lbrace": "{", "rbrace": "}", "colon": ":", "textdollar": "$", "textendash": "-"},
    **{"lparen": "(", "rparen": ")", "lbrack": "[", "rbrack": "]", "backslash": "\\", "infty": "\u221e"},
}
_CHARACTERS = {
    **dict.fromkeys(",;: \\~>\n", " "),
    **dict.fromkeys("!()[]", ""),
    **{character: character for character in "$%&#_{}'\"-*`|.@/"},
}
_HTML = re.compile(
    r"<(/?)(sup|br|(?-i:b)|(?<=/)b|(?-i:[acd])(?=\s?/?>)|i|u|em|strong|mark|span|sub|code|p|div|center|font|small|big)\b[^<>]{0,80}>",
    re.IGNORECASE,
)
_BOLD = re.compile(r"<B>((?:[^<]|<(?!/?B>))*+)</B>")
"""A lone `<B>` is the letter, as `<A>` is; `<b>` is none, nor is `<a>`."""


class _Group(NamedTuple):
    """What stands before and behind an argument; `kept` is False where the argument is no text."""

    before: str = ""
    behind: str = ""
    kept: bool = True


def plain(text: str) -> str:
    """The text without its dress. Lone braces go, and so do the delimiters `\\(`, `\\[`; dollars stay."""
    if "<" in text:
        text = _HTML.sub(_tag, _BOLD.sub(r"\1", text))
    if not ("\\" in text or "{" in text or "}" in text):
        return text
    out: list[str] = []
    stack: list[tuple[_Group, list[_Group], int]] = []
    awaited: list[_Group] = []  # arguments that a command still waits for
    for root, command, character, brace, run in (match.groups() for match in _TOKEN.finditer(text)):
        if root is not None:
            awaited = [_Group("((", f")^(1/({root})))"), *awaited]
        elif command:
            shown, awaited = _command(command, awaited)
            out.append(shown)
        elif character:
            out.append(_CHARACTERS.get(character, f"\\{character}"))
        elif brace == "{":
            power = out and out[-1].endswith("^")
            group = awaited.pop(0) if awaited else _Group("(", ")") if power else _Group()
            stack.append((group, awaited, len(out)))
            out.append(group.before)
            awaited = []
        elif brace:
            if stack:
                group, awaited, start = stack.pop()
                if not group.kept:
                    del out[start:]
                out.append(group.behind)
        else:
            while awaited and run.strip():  # \frac12: an argument may be one character without braces
                group, run = awaited.pop(0), run.lstrip()
                if group.kept:
                    out.append(f"{group.before}{run[0]}{group.behind}")
                    run = run[1:]
            out.append(run)
    return "".join(out)


def _command(name: str, awaited: list[_Group]) -> tuple[str, list[_Group]]:
    """What a command shows, and the arguments that are waited for after it."""
    if name in _FRACTIONS:
        return "", [_Group("((", ")"), _Group("/(", "))"), *awaited]
    if name == "sqrt":
        return "sqrt", [_Group("(", ")"), *awaited]
    if name in _DROPPED:
        return "", [_Group(kept=False), *awaited]
    if name in _DRESS:
        return "", awaited
    if name in _SPACES:
        return " ", awaited
    return _SYMBOLS.get(name, f"\\{name} "), awaited


def _tag(match: re.Match[str]) -> str:
    closing, name = match[1], match[2].lower()
    if name == "sup":
        return ")" if closing else "^("
    return " " if name in ("br", "p", "div") else ""
