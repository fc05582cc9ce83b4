"""Whatever a file is called or a model has written: nothing of it acts on a terminal, a log or a page."""

from __future__ import annotations

import errno
import io
import logging
import os
import re
from pathlib import Path
from xml.etree import ElementTree

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from rich.panel import Panel
from rich.table import Table
from rich.text import Text
from typer.testing import CliRunner

from eval.markdown import table
from eval.plot import plot
from eval.results import Result
from eval.statistics import Figure
from spell_megatron.base.terminal import Lines, Terminal, label, line, say, tidy
from spell_megatron.run.record import Console, RunFolder, logging_to, plots
from spell_megatron.run.record.report import page_environment
from spell_megatron.tools.cli import app

pytestmark = pytest.mark.unit

FORGED = "a.txt\n2026-01-01 00:00:00,000 ERROR spell_megatron: all is lost"
HOSTILE = (
    "[/x][bold]\x1b[2J\x1b]0;title\x07\x9b31m\r\b\x00\u202egpj.exe\u2028\ud800 {{ 7*7 }} :skull: " + FORGED
)
ACTING = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
ANYTHING = st.text(st.characters(exclude_categories=[]), max_size=60)


def printed(*what: object) -> str:
    output = io.StringIO()
    terminal = Terminal(file=output, width=400, force_terminal=True)  # so that styles are escapes
    for one in what:
        terminal.print(one)
    return output.getvalue()


@given(ANYTHING)
@example(HOSTILE)
def test_what_is_printed_is_text(hostile: str) -> None:
    grid = Table("name", title=hostile, title_style="", header_style="", style="", show_header=False)
    grid.add_row(hostile)
    shown = printed(hostile, Text(hostile), Panel(hostile, title=Text(hostile)))
    assert not ACTING.search(shown)
    assert "\x1b[2J" not in printed(grid)


@given(ANYTHING)
@example(HOSTILE)
def test_a_line_is_one_line_and_nothing_readable_is_lost(text: str) -> None:
    assert not ACTING.search(tidy(text)) and "\n" not in line(text)
    assert len(tidy(text)) == len(text)
    readable = "Ünïcode, 漢字, emoji 🙂, a\ttab\nand a line"
    assert tidy(readable) == readable


def test_a_style_is_the_terminals_own() -> None:
    assert "\x1b[1;31merror\x1b[0m" in printed(Text.assemble(("error", "bold red"), " \x1b[31mx"))
    assert "\x1b[31m" not in printed(Text.assemble(("error", "bold red"), " \x1b[31mx"))


def test_no_record_of_a_log_is_forged(tmp_path: Path) -> None:
    run = RunFolder.create(tmp_path, "run")
    shown = io.StringIO()
    with logging_to(run, Terminal(file=shown, width=400)):
        log = logging.getLogger("spell_megatron.test")
        log.warning("skipped %s", HOSTILE)
        try:
            raise ValueError(HOSTILE)
        except ValueError:
            log.exception("and")
    lines = run.log.read_text(encoding="utf-8").split("\n")[:-1]
    records = [text for text in lines if not text.startswith("    ")]
    assert [text.split(": ")[1].split(" ")[0] for text in records] == ["skipped", "and"]
    assert not any(map(ACTING.search, lines)) and not ACTING.search(shown.getvalue())
    assert "\n    2026-01-01" in Lines("%(levelname)s %(message)s").format(
        logging.LogRecord("a", logging.ERROR, "", 0, FORGED, (), None)
    )


@pytest.mark.parametrize("fault", [errno.EPIPE, errno.EIO, errno.ENOSPC])
def test_who_prints_goes_on_where_nobody_can_read_it(fault: int, capsys: pytest.CaptureFixture[str]) -> None:
    """A pipe that is closed, a terminal that is gone, a log on a full disk."""

    class Gone(io.StringIO):
        broken = True

        def write(self, text: str) -> int:
            if self.broken:
                raise OSError(fault, os.strerror(fault))
            return super().write(text)

    output = Gone()
    with Console(3, Terminal(file=output, force_terminal=True)) as live:
        live.begin(1, 3)
        live.note("one")
        output.broken = False
        live.note("two")
    assert "two" in output.getvalue()
    say("standard output is another matter")
    assert "another matter" in capsys.readouterr().out


def test_an_error_of_the_command_line_is_text(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    done = CliRunner().invoke(app, ["report", str(tmp_path / "[/x]\x1b[2J\x9b")])
    assert done.exit_code == 1 and "[/x]" in done.output
    assert not ACTING.search(done.output)
    say(HOSTILE)
    assert not ACTING.search(capsys.readouterr().out)
    assert all(len(row.split("\n")) == 1 for row in table(["a"], [[HOSTILE]]))


def test_whatever_a_page_says_is_text() -> None:
    page = page_environment().from_string("{{ a }}|{{ a | bounded }}|{{ b }}|{{ svg | safe }}")
    said = page.render(a=HOSTILE + "<script>", b=7, svg="<svg/>")
    assert not ACTING.search(said) and "<script>" not in said
    assert said.endswith("|7|<svg/>")


@pytest.mark.parametrize("name", ["a\nb", "a\x1b[2J", "", "..", "a/b"])
def test_a_run_is_not_called_what_a_terminal_obeys(tmp_path: Path, name: str) -> None:
    with pytest.raises(Exception, match="cannot name a folder"):
        RunFolder.create(tmp_path, name)


def test_names_in_a_picture_are_text(tmp_path: Path) -> None:
    names = ("a$\\frac$b", "$a_$", "$$", "\ud800", "\x1b[2J\x00\x08", "two\nlines", "x" * 5000, "<b>&")
    rows = [{"step": step, "outcome/kept": 0.5} | {f"outcome/{n}": 0.05 for n in names} for step in range(3)]
    for draw, spaced in ((plots.each("outcome"), False), (plots.stack("outcome", {}, share=True), True)):
        figure = draw(rows)
        assert figure is not None
        shown = ElementTree.fromstring(figure.replace("<svg ", '<svg xmlns:xlink="x" ', 1))
        for name in names:
            assert label(name.replace("_", " ") if spaced else name) in "".join(shown.itertext()), name
    half = Figure(0.5, 0.4, 0.6, 10)
    results = {
        name: [
            Result(
                *("b", name, None, "rule", half, half, (0.4, 0.6), {1: 0.5}, {1: 0.5}, {}, {}, {}),
                *({"asked": 2, "scored": 2}, {}, {}, {}),
            )
        ]
        for name in (*names, "other")
    }
    plot(results, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size
