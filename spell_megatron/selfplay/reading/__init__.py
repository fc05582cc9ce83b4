"""How texts of a model are read: one small grammar for answers, one for JSON objects.

    statements   where a text states an answer: sentences, boxes, tags, brackets
    latex        the dress of a statement: LaTeX and inline HTML, taken off
    notation     numbers in one spelling, for the grammar of `selfplay.numbers`
    letters      what a statement says as a letter of a choice
    texts        ... as words
    objects      JSON objects as models write them
    thoughts     where the reasoning ends

A kind of answer has two readers. `stated` takes what a statement is: "(42)", "B because …". `mentioned` takes what
it at least contains, where nothing was stated anywhere: "found in table 3: it is 42". All of it is hostile text: each
reader takes any string, reads a bounded part of it in linear time, evaluates nothing and never raises.
"""


def words(text: str) -> frozenset[str]:
    """A closed list of words, written in one go."""
    return frozenset(text.split())
