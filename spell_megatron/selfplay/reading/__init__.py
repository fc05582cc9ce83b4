"""How texts of a model are read: one small grammar for answers, one for JSON objects.

    statements   where a text states an answer: sentences, boxes, tags, brackets
    latex        the dress of a statement: LaTeX and inline HTML, taken off
    notation     numbers in one spelling, for the grammar of `selfplay.numbers`
    letters      what a statement says as a letter of a choice
    texts        ... as words
    objects      JSON objects as models write them
    thoughts     where the reasoning ends

A kind of answer has several readers. `stated` takes what a statement is: "(42)", "B because …". `mentioned` takes what
it at least contains, where nothing was stated anywhere: "an increase of 42". `remarked` takes that of remarks, where
nothing else holds one: "found in table 3: it is 42". All of it is hostile text: each reader takes any string,
reads a bounded part of it in linear time, evaluates nothing and never raises.
"""

FILLERS = "\u115f\u1160\u2800\u3164\uffa0"
"""Letters and symbols, to Unicode, that show nothing."""


def words(text: str) -> frozenset[str]:
    """A closed list of words, written in one go."""
    return frozenset(text.split())
