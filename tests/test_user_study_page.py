# SPDX-License-Identifier: Apache-2.0
"""The page of user_study.py: in a real browser, and as a Space. tests/faults.py kills its server while raters vote."""

import json
import multiprocessing
import os
import re
import runpy
import shutil
import signal
import sys
import threading
import time
from collections import Counter
from contextlib import contextmanager
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import pytest
import yaml
from conftest import free_port
from test_user_study import HARD, left, main, make_study, vote

import user_study


gradio = pytest.importorskip("gradio", reason="gradio is not installed: make test installs requirements-test.txt")
import raters  # noqa: E402


CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
CHROMIUM_FLAGS = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
CHROMIUM_FLAGS += "--disable-component-update --disable-sync"
LEFT = '[data-answer="left"]'


@contextmanager
def served(study, port: int):
    """The page, in a thread of this process."""
    server, listening = user_study.page_server(study, "127.0.0.1", port)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
    thread.start()
    yield
    server.should_exit = True
    thread.join(10)
    listening.close()


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is missing: see requirements-test.txt")
    if CHROMIUM is None:
        pytest.skip("no Chromium here: apt-get install chromium (.ci/run does it where it may)")
    options = {"executable_path": CHROMIUM, "args": CHROMIUM_FLAGS.split(), "viewport": {"width": 1200, "height": 800}}
    with playwright.sync_playwright() as driver:
        context = driver.chromium.launch_persistent_context(tmp_path_factory.mktemp("profile"), **options)
        context.set_default_timeout(30_000)
        yield context
        context.close()


def wait_for_task(page, place: str = "") -> None:
    """Until the page takes an answer, at "comparison/question". Asks at every frame, not every half second."""
    page.wait_for_function(
        """place => {
            const text = name => parseInt(document.querySelector(`[data-part=${name}]`)?.textContent);
            const button = document.querySelector('[data-answer=left]');
            const there = !place || `${text("count")}/${text("question")}` === place;
            return there && button && !button.disabled && button.offsetParent;
        }""",
        arg=place,
    )


# Two clicks, of which the second one comes when the next question is drawn.
DOUBLE_CLICK = """() => new Promise(done => {
    const button = document.querySelector('[data-answer="right"]');
    const text = document.querySelector('[data-part="question"]');
    new MutationObserver(() => setTimeout(() => { button.click(); done(); }, 20)).observe(
        text, {childList: true, characterData: true, subtree: true});
    button.click();
})"""


def test_a_rater_goes_through_four_comparisons(browser, tmp_path):
    """By keyboard and mouse, with a reload in the middle, a step back, a restart of the server, at phone width, too."""
    flags = ["--allow_ties", "--questions", "overall", "appeal", "--consent", "My own consent."]
    study = make_study(tmp_path, *flags, "--comparisons_per_rater", 4, models=("tuned", "base"))
    page, port, requests, dialogs = browser.new_page(), free_port(), [], []
    page.on("request", lambda request: requests.append(request.url))
    page.on("dialog", lambda dialog: (dialogs.append(dialog.message), dialog.dismiss()))

    def answer(act, expected: str):
        wait_for_task(page)
        assert not re.search(r"tuned|\bbase\b|noise", page.inner_text("body"))
        assert not re.search(r"tuned|noise|[\"'/]base[\"'/]", page.inner_html("#study"))
        if "alert" in (prompt := page.inner_text('[data-part="prompt"]')):
            assert prompt == HARD and page.get_attribute('[data-part="prompt"]', "dir") == "auto"
        act()
        wait_for_task(page, expected)
        assert page.is_visible('[data-part="prompt"]') == expected.endswith("/1")  # "appeal" hides it

    with served(study, port):
        page.goto(f"http://127.0.0.1:{port}/?rater=ann")
        page.wait_for_selector('[data-part="start"]:visible')
        assert "My own consent." == page.inner_text('[data-part="consent"]')
        page.click('[data-part="start"]')
        answer(lambda: page.keyboard.press("ArrowLeft"), "1/2")
        answer(lambda: page.keyboard.press("2"), "2/1")
        answer(lambda: page.keyboard.press("t"), "2/2")
        answer(lambda: page.evaluate(DOUBLE_CLICK), "3/1")
        page.dispatch_event(LEFT, "click", {"detail": 2})
        page.wait_for_timeout(100)
        page.reload()
        wait_for_task(page, "3/1")
        assert "rater=ann" in page.url
        page.keyboard.press("Backspace")
        page.wait_for_selector('[data-answer="tie"].chosen')
        answer(lambda: page.keyboard.press("1"), "2/2")
        answer(lambda: page.keyboard.press("2"), "3/1")
        page.click('[data-part="left"]')
        assert page.is_visible('[data-part="zoom"]')
        page.keyboard.press("ArrowRight")  # the other picture, and no vote
        assert page.inner_text('[data-part="zoom"] span') == "right"
        page.keyboard.press("Escape")
        assert not page.is_visible('[data-part="zoom"]')
        answer(lambda: page.click(LEFT), "3/2")

    # The server is gone: the page keeps the answer, and goes on by itself.
    page.keyboard.press("1")
    page.wait_for_selector('[data-part="notice"]:visible')
    assert "The server does not answer" in page.inner_text('[data-part="notice"]')
    again = user_study.Study(tmp_path / "study")
    gradio.context.Context.id = 0  # a new process counts its components from 0
    with served(again, port):
        wait_for_task(page, "4/1")
        page.set_viewport_size({"width": 390, "height": 800})
        assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
        for name in ("left", "right", "tie"):
            box = page.locator(f'[data-answer="{name}"]').bounding_box()
            assert box["x"] >= 0 and box["x"] + box["width"] <= 390 and box["y"] + box["height"] < 800
        page.route("**/component_server/**", lambda route: route.fulfill(status=500))
        page.click(LEFT)
        page.wait_for_selector('[data-part="notice"]:visible')
        page.unroute("**/component_server/**")
        wait_for_task(page, "4/2")
        page.click(LEFT)
        page.wait_for_selector('[data-part="end"]:visible')
        assert "4 comparisons" in page.inner_text('[data-part="answered"]')

    lines = user_study.read_votes(tmp_path / "study")
    given = [line["answer"] for line in lines if "answer" in line]
    assert given == ["left", "right", "tie", "right", *["left"] * 5]
    assert len(user_study.final_votes(lines)) == 8 and {line["rater"] for line in lines} == {"ann"}
    assert not dialogs and not any(re.search("tuned|base", url) for url in requests)


def test_answers_and_headers_of_the_server_name_no_model(tmp_path):
    flags = ["--attention_checks", 1, "--comparisons_per_rater", 12]
    study, port = make_study(tmp_path, *flags), free_port()
    with served(study, port):
        rater = raters.Rater(f"http://127.0.0.1:{port}", "r", 0.0, 0)
        state, count = rater.ask("look"), 0
        seen = rater.fetch("config").decode() + rater.fetch("").decode()
        assert not re.search(r"tuned|noise|" + re.escape(str(tmp_path)), seen)
        while not state["finished"]:
            pictures = [urlopen(f"{rater.url}/picture/{name}") for name in state["pictures"]]
            left, right = ({**picture.headers, "date": ""} for picture in pictures)
            assert left == right and not {"last-modified", "etag", "content-disposition"} & set(map(str.lower, left))
            assert len(pictures[0].read()) == len(pictures[1].read())
            state, count = rater.answer(state, "left"), count + 1
        assert count == 3 * 13
        form = {"Content-Type": "multipart/form-data; boundary=x"}
        head = b'--x\r\nContent-Disposition: form-data; name="files"; filename="a"\r\n\r\n'
        upload = Request(f"{rater.url}/gradio_api/upload", head + b"a" * 99 + b"\r\n--x--\r\n", form)
        for status, request in (("404", f"{rater.url}/picture/study.json"), ("413", upload)):
            with pytest.raises(HTTPError, match=status):
                urlopen(request)
    assert list(study.shown) == ["r"]


def test_the_space_serves_and_sends_its_votes(tmp_path, online):
    """The Space's folder by itself, as the Hub starts it: the study comes from the private dataset, votes go there."""
    study = make_study(tmp_path, "--questions", "overall", models=("tuned", "base"))
    vote(study, "early", left, limit=3)
    flags = ["--study_dir", tmp_path / "study", "--output_dir", tmp_path / "space", "--push_to_hub"]
    main("space", *flags, "--hub_space_id", "user/study", "--hub_dataset_id", "user/votes")
    files = online.files("spaces", "user/study")
    assert {"app.py", "user_study.py", "requirements.txt", "README.md"} <= files.keys() and "study.json" not in files
    assert sum(name.startswith("pictures/") for name in files) == 24
    packages = files["requirements.txt"].decode().splitlines()
    assert "gradio>=6.31,<7" in packages and not {"torch", "transformers", "trl", "datasets"} & set(packages)
    card = yaml.safe_load(files["README.md"].decode().split("---\n")[1])
    assert card["sdk"] == "gradio" and card["python_version"] == "3.11" and card["title"] == "User study"
    assert card["sdk_version"] == "6.31.0"  # one that requirements.txt allows
    assert online.repos["datasets", "user/votes"].private
    secret = json.loads(online.files("datasets", "user/votes")["study.json"])["secret"].encode()
    assert not any(secret in content for content in files.values())

    port, log = free_port(), tmp_path / "log"
    files["app.py"] = files["app.py"].replace(b"7860", str(port).encode())
    for name, content in files.items():
        (tmp_path / "hf" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "hf" / name).write_bytes(content)

    def app():
        os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT), 1)
        os.dup2(1, 2)
        sys.stdout = sys.stderr = open(1, "w", buffering=1)
        os.chdir(tmp_path / "hf")
        sys.path.insert(0, os.getcwd())
        del sys.modules["user_study"]  # the Space has its own
        runpy.run_path("app.py", run_name="__main__")

    # A fork, so that nothing is imported again.
    process = multiprocessing.get_context("fork").Process(target=app, daemon=True)
    process.start()
    while not (log.exists() and "the page is at" in log.read_text()):
        assert process.is_alive(), log.read_text()
        time.sleep(0.02)
    person = raters.Rater(f"http://127.0.0.1:{port}", "ann", 0.0, 0)
    person.judge = lambda state: "left"
    assert person.work() == 12
    # Another server, about to end when this one began, sends the votes of its last minute into its own log.
    old = {name: content for name, content in online.files("datasets", "user/votes").items() if "votes/" in name}
    (name,) = [name for name, content in old.items() if b'"early"' in content]
    online.commit("datasets", "user/votes", {name: old[name] + old[name].replace(b'"early"', b'"bob"')})
    process.terminate()
    process.join(60)
    assert process.exitcode == 128 + signal.SIGTERM
    files = online.files("datasets", "user/votes")
    logs = [content.decode().splitlines() for name, content in files.items() if name.startswith("votes/")]
    lines = [line for log in logs for line in log]
    answers = Counter(json.loads(line)["rater"] for line in lines if '"answer"' in line)
    assert answers == {"early": 3, "ann": 12, "bob": 3} and len(set(lines)) == len(lines)
