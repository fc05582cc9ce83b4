"""The live page: what it shows of a run that goes on, to whom, and in a real browser."""

from __future__ import annotations

import re
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from debian import install
from starlette.testclient import TestClient
from test_record import HOSTILE, Page, episode, full_run, logged, run

from spell_megatron.config import load_config
from spell_megatron.run.record import Journal, RunFolder
from spell_megatron.run.record.newest import KEPT, Newest
from spell_megatron.run.record.watch import Watched, application, names_of

pytestmark = pytest.mark.unit

__all__ = ["run"]  # the fixture


def played(run: RunFolder, step: int, *texts: str, **changes: object) -> None:
    journal = Journal(run, step)
    for index, text in enumerate(texts):
        journal.append(episode(step, index, "doc_mc" if index % 2 else "doc_general_qa", text, **changes))
    journal.close()


def until(true: Callable[[], bool], seconds: float = 200) -> None:
    """Wait for what another thread does."""
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end
        time.sleep(0.5)


def client(run: RunFolder) -> TestClient:
    watched = Watched(run, load_config("toy"))
    return TestClient(application(watched, "secret", ["testserver"]), raise_server_exceptions=False)


def test_episodes_are_read_on_as_they_are_written(run: RunFolder) -> None:
    newest = Newest(run)
    newest.read()
    assert not newest.episodes
    played(run, 1, "one", "two")
    newest.read()
    whole = run.rollouts(1).read_bytes()
    cut = whole.index(b"\n") + 100
    run.rollouts(2).write_bytes(whole[:cut])
    newest.read()
    assert newest.outcomes(2).total() == 1, "a line that is not whole is waited for"
    run.rollouts(2).write_bytes(whole)
    newest.read()
    assert newest.outcomes(2) == {"kept": 2}
    assert [e.question.text for e in newest.episodes if e.question] == ["one", "two"] * 2
    assert not any(r.tokens or r.logprobs for e in newest.episodes for _, r in e.rollouts())


def test_a_step_that_is_made_again_is_read_again(run: RunFolder) -> None:
    newest = Newest(run)
    played(run, 1, "one", "two")
    newest.read()
    run.rollouts(1).unlink()
    played(run, 1, "three")
    newest.read()
    assert [e.question.text for e in newest.episodes if e.question] == ["three"]
    assert newest.outcomes(1).total() == 1


def test_what_is_remembered_is_bounded(run: RunFolder) -> None:
    newest = Newest(run)
    played(run, 1, *map(str, range(KEPT + 5)))
    newest.read()
    assert len(newest.episodes) == KEPT
    assert newest.outcomes(1).total() == KEPT + 5


@pytest.mark.long
def test_the_page_shows_progress_curves_and_episodes(run: RunFolder) -> None:
    page = client(run).get("/secret/")
    assert page.status_code == 200 and "None yet." in page.text
    full_run(run, 3)
    played(run, 4, "first", "second")
    ask = client(run).get
    text = ask("/secret/").text
    assert "Step 4</b> of 10: 2 of 24 questions kept, 2 asked" in text
    until(lambda: "Held-out accuracy over the run" in ask("/secret/").text)
    assert text.index("I ask second") < text.index("I ask first"), "the newest first"
    assert "reasoning first" in text and "verdict first" in text and "I ask first" in text


def test_episodes_are_chosen_by_role_task_and_outcome(run: RunFolder) -> None:
    played(run, 1, "first", "second")
    journal = Journal(run, 1)
    journal.append(replace(episode(1, 7, text="bad"), question=None, responses=(), outcome="bad_format"))
    journal.close()
    ask = client(run).get

    def shown(query: str) -> list[str]:
        return re.findall(r"I ask (\w+)", ask(f"/secret/?{query}").text)

    assert shown("") == ["bad", "second", "first"]
    assert shown("outcome=bad_format") == ["bad"]
    assert shown("task=doc_mc") == ["second"]
    assert shown("task=doc_mc&outcome=bad_format") == shown("role=responder") == []
    only = ask("/secret/?role=responder").text
    assert "reasoning second" in only and "reasoning first" in only
    assert "verdict second" not in only and "I ask second" not in only


def test_who_does_not_know_the_secret_is_shown_nothing(run: RunFolder) -> None:
    played(run, 1, "first")
    asked = client(run)
    for path in ("/", "/watch.js", "/secretly/", "/secret/../", "/secret/config.yaml"):
        assert "first" not in asked.get(path).text
        assert asked.get(path).status_code == 404
    assert asked.get("/secret/", headers={"host": "evil.example"}).status_code == 400
    for method in ("POST", "PUT", "DELETE"):
        assert asked.request(method, "/secret/").status_code == 405


@pytest.mark.parametrize(
    ("bound", "asked"), [("0.0.0.0", socket.gethostname()), ("::", socket.getfqdn()), ("::1", "[::1]")]
)
def test_the_page_answers_by_the_names_of_the_address_that_it_listens_on(
    run: RunFolder, bound: str, asked: str
) -> None:
    pages = TestClient(application(Watched(run, load_config("toy")), "secret", names_of(bound)))
    for host, code in ((asked, 200), (f"{asked}:8000", 200), ("evil.example", 400), ("0.0.0.0", 400)):
        assert pages.get("/secret/", headers={"host": host}).status_code == code


def test_hostile_output_stays_text(run: RunFolder) -> None:
    played(run, 1, HOSTILE, HOSTILE, outcome=f"dropped:{HOSTILE}")
    answer = client(run).get("/secret/", params={"outcome": HOSTILE, "task": HOSTILE})
    answer = client(run).get("/secret/")
    page = Page(answer.text)
    assert page.tags.count("script") == 1 and ("src", "watch.js") in page.attributes
    assert not any(name.startswith("on") for name, _ in page.attributes)
    assert "<script>alert('x')</script>" in page.text
    policy = dict(part.split(maxsplit=1) for part in answer.headers["content-security-policy"].split("; "))
    assert policy["default-src"] == "'none'" and policy["script-src"] == policy["connect-src"] == "'self'"


BROWSERS = ("chromium-headless-shell", "chromium", "google-chrome")


@pytest.fixture
def browser() -> str:
    """A Chromium of this machine."""

    def found() -> list[str]:
        return [name for name in map(shutil.which, BROWSERS) if name]

    if reason := install(["chromium-headless-shell"], lambda: [] if found() else ["Chromium"]):
        pytest.skip(reason)
    return found()[0]


@pytest.fixture
def address(run: RunFolder) -> Iterator[str]:
    """Of `spell-megatron watch`, a process of its own."""
    command = [sys.executable, "-m", "spell_megatron.tools.cli", "watch", str(run.path)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stderr
            yield process.stderr.readline().split()[0]
        finally:
            process.terminate()


@pytest.mark.long
def test_a_browser_sees_the_step_advance_and_an_episode_open(
    run: RunFolder, address: str, browser: str, tmp_path: Path
) -> None:
    from playwright.sync_api import expect, sync_playwright

    full_run(run, 3)
    played(run, 4, "first", HOSTILE)
    with sync_playwright() as playwright:
        page = playwright.chromium.launch(executable_path=browser, args=["--no-sandbox"]).new_page()
        said: list[str] = []
        page.on("console", lambda message: said.append(message.text))
        page.on("dialog", lambda dialog: said.append(dialog.message))
        page.on("pageerror", lambda error: said.append(error.message))
        page.on(
            "request", lambda request: None if request.url.startswith(address) else said.append(request.url)
        )
        page.set_default_timeout(60_000)
        expect.set_options(timeout=30_000)
        page.goto(address)
        expect(page.locator("#progress")).to_contain_text("Step 4")
        article = page.locator("article", has_text="first").last
        expect(article.locator("details.responder pre").first).to_be_hidden()
        article.locator("details.responder summary").click()
        expect(article.locator("details.responder pre").first).to_be_visible()

        logged(run, {4: {"responder/reward": 0.5}})  # the run goes on
        played(run, 5, "later")
        expect(page.locator("#progress")).to_contain_text("Step 5")
        expect(page.locator("article").first).to_contain_text("later")
        expect(article.locator("details.responder pre").first).to_be_visible()  # what was open stays open
        page.locator("select[name=task]").select_option("doc_mc")
        expect(page.locator("article")).to_have_count(1)
        assert not [text for text in said if "favicon" not in text]
