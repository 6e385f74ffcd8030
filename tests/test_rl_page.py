"""The web page of a run: a real run, its server, and Chromium before it."""

import json
import os
import re
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest

from jaxlab.rl.config import Envs, RLRun
from jaxlab.rl.envs import adapters
from jaxlab.rl.page_app import read_wish
from jaxlab.rl.store import Store
from tests.test_rl_evaluate import missing

ROOT = Path(__file__).parent.parent
SLOW = 240.0
"""seconds: the processes of a run, and a browser, start on a machine that is busy"""
CONFIG = """
from jaxlab.rl.config import *

def config():
    return RLRun(
        out={out!r}, steps=100000, groups=1, page=0,
        envs=Envs(tasks=("click", "check"), hosts=1, slots=2, max_steps=6),
        rollout=Rollout(workers=1, buckets=(1,)),
        curation=Curation(n_max=2, dynamic_rollouts=False, dynamic_length=False),
    )
"""


def test_wishes_are_checked():
    run = RLRun(envs=Envs(tasks=("click",)))
    assert read_wish({"do": "take", "slot": "host0/1", "x": 1}, run, ()) == {
        "do": "take",
        "slot": "host0/1",
    }
    act = {
        "do": "act",
        "slot": "host0/0",
        "rollout": 7,
        "t": 2,
        "action": {"kind": 0, "xy": [2, 0.5]},
    }
    wish = read_wish(act, run, ())
    assert wish["action"].xy == (1.0, 0.5) and (wish["rollout"], wish["t"]) == (7, 2)
    for bad in (
        [],
        {"do": "rm", "slot": "x"},
        {"do": "take", "slot": 3},
        {"do": "pause", "task": "other", "paused": True},
        {"do": "pause", "task": "click", "paused": 1},
        {"do": "act", "slot": "x", "rollout": 7, "t": 0, "action": {"kind": 99}},
        {"do": "act", "slot": "x", "t": 0, "action": {"kind": 0, "xy": [0, 0]}},
    ):
        with pytest.raises((KeyError, ValueError)):
            read_wish(bad, run, ())


@pytest.fixture(scope="module")
def run_page(tmp_path_factory):
    """A run with a page: its address, token and all; its folder."""
    folder = tmp_path_factory.mktemp("page")
    (folder / "config.py").write_text(CONFIG.format(out=str(folder / "run")))
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONUNBUFFERED": "1"}
    said = folder / "said"  # a pipe that nobody reads would stop it once it is full
    with open(said, "w") as output:
        program = subprocess.Popen(
            [sys.executable, "scripts/train.py", str(folder / "config.py")],
            cwd=ROOT,
            env=environment,
            stdout=output,
            stderr=subprocess.STDOUT,
        )
    try:
        page = re.compile(r"page: (http://127\.0\.0\.1:\d+/)\?token=(\S+)\n")
        while not (found := page.search(said.read_text())):
            if program.poll() is not None:
                pytest.fail("the run ended: " + said.read_text())
            time.sleep(0.05)
        yield found[1], found[2], folder / "run"
    finally:
        program.send_signal(signal.SIGTERM)
        try:
            program.wait(60)
        except subprocess.TimeoutExpired:
            program.kill()
            program.wait()


def status(url: str, data: bytes | None = None, **headers: str) -> int:
    request = urllib.request.Request(url, data, headers)
    try:
        with urllib.request.urlopen(request, timeout=SLOW) as answer:
            return answer.status
    except urllib.error.HTTPError as error:
        with error:
            return error.code


def test_only_who_knows_the_token_gets_in(run_page):
    address, token, _ = run_page
    bearer = {"Authorization": f"Bearer {token}"}
    for path in ("", "static/page.js", "events", "episodes", "frame/host0/0"):
        assert status(address + path) == 403
        assert status(address + path, Authorization="Bearer x") == 403
    assert status(address + "?token=wrong") == 403
    assert status(address + "static/page.js", **bearer) == 200
    assert status(address + "static/page.py", **bearer) == 404
    assert status(address + "static/..%2fpage.py", **bearer) == 404
    assert status(address, **bearer, Host="evil.example") == 400
    wish = json.dumps({"do": "pause", "task": "click", "paused": False}).encode()
    assert status(address + "wish", wish) == 403
    assert status(address + "wish", wish, **bearer, Origin="http://evil.example") == 403
    assert status(address + "wish", wish, **bearer) == 200
    assert status(address + "wish", b"{", **bearer) == 400
    request = urllib.request.Request(address, headers=bearer)
    with urllib.request.urlopen(request, timeout=SLOW) as answer:
        assert "default-src 'none'" in answer.headers["Content-Security-Policy"]
        assert "http" not in answer.read().decode().replace("http-equiv", "")


@pytest.mark.skipif(bool(missing()), reason=missing())
def test_a_person_watches_pauses_takes_over_and_replays(run_page):
    address, token, folder = run_page
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service
    from selenium.webdriver.common.by import By
    from selenium.webdriver.support.wait import WebDriverWait

    with adapters.selenium_paths():
        options = webdriver.ChromeOptions()
        options.binary_location = os.environ["MINIWOB_CHROME_BINARY"]
        driver_path = os.environ["MINIWOB_CHROMEDRIVER"]
        os.environ["CHROMIUM_FLAGS"] = "--no-first-run --disable-background-networking"
        for flag in ("headless", "no-sandbox", "disable-gpu", "window-size=1000,1200"):
            options.add_argument(flag)
        driver = webdriver.Chrome(options=options, service=Service(driver_path))
    try:
        wait = WebDriverWait(driver, SLOW)

        def shown(selector: str):
            return wait.until(lambda d: d.find_elements(By.CSS_SELECTOR, selector))

        driver.get(f"{address}?token={token}")
        assert token not in driver.current_url
        # live: both environments, with their pictures
        wait.until(
            lambda d: len(d.find_elements(By.CSS_SELECTOR, "#live article")) == 2
        )
        picture = "return document.querySelector('#live img').naturalWidth"
        wait.until(lambda d: d.execute_script(picture) == 64)
        assert driver.find_element(By.ID, "state").text == "live"

        # pause: the store says so, and the page
        pause = driver.find_elements(By.CSS_SELECTOR, "#tasks button")[1]
        assert pause.text == "check"
        pause.click()
        wait.until(lambda d: "check (paused)" in d.find_element(By.ID, "tasks").text)
        assert paused(folder) == [("check",)]

        # take over: act until it ends, by the expert's hand
        driver.find_element(By.CSS_SELECTOR, ".take").click()
        assert shown("#hand[open]")
        solved = by_hand(driver, wait, folder)
        assert solved["source"] == "human" and solved["task"] == "click"

        # replay it, out of the pool
        driver.execute_script("document.getElementById('hand').close()")
        driver.find_element(By.ID, "show-stored").click()
        row = shown(f"tr[data-episode='pool/{solved['id']}']")[0]
        row.click()
        wait.until(lambda d: "human" in d.find_element(By.ID, "replay-text").text)
        actions = driver.find_elements(By.CSS_SELECTOR, "#replay-actions li")
        assert len(actions) == solved["steps"] and "CLICK" in actions[-1].text
        picture = "return document.getElementById('replay-image').naturalWidth"
        wait.until(lambda d: d.execute_script(picture) == 64)
        problems = [e for e in driver.get_log("browser") if e["level"] == "SEVERE"]
        assert not [p for p in problems if "Security" in p["message"]]
    finally:
        driver.quit()


def paused(folder: Path) -> list:
    store = Store(folder)
    try:
        return store.database.query("SELECT task FROM task WHERE paused = 1")
    finally:
        store.close()


def by_hand(driver, wait, folder: Path) -> dict:
    """Clicks where the expert would, in the taken environment, until two successes.

    Two, since the second episode begins where the first one did: no action yet.
    """
    from selenium.common.exceptions import TimeoutException
    from selenium.webdriver.common.action_chains import ActionChains
    from selenium.webdriver.common.by import By

    from jaxlab.rl.envs.pix import advance, next_action, start

    def when_asked(then: str, *arguments):
        """The value of an expression of the slot `s`, once it is truthy."""
        script = (
            f"const s = hand && seen.slots[hand.slot]; return s && asked(s) && {then}"
        )
        try:
            return wait.until(lambda d: d.execute_script(script, *arguments))
        except TimeoutException:
            known = driver.execute_script("return JSON.stringify([hand, seen])")
            pytest.fail(f"never came to {then} of {arguments}: {known}")

    deadline = time.monotonic() + SLOW
    while time.monotonic() < deadline:
        task, seed, t = when_asked("[s.task, s.seed, s.t]")
        if t:  # the policy had begun
            driver.find_element(By.ID, "hand-done").click()
            continue
        episode, end = start(task, seed), False
        while not end and (action := next_action(episode)) is not None:
            when_asked("s.t === arguments[0]", episode.actions)
            image = driver.find_element(By.ID, "hand-image")
            if action.kind != 0:
                break  # the other tasks are done by the policy
            dx = (action.xy[0] - 0.5) * image.size["width"]
            dy = (action.xy[1] - 0.5) * image.size["height"]
            ActionChains(driver).move_to_element_with_offset(
                image, dx, dy
            ).click().perform()
            advance(episode, action)
            end = bool(episode.outcome)
        store = Store(folder)
        try:
            for _ in range(20):
                rows = store.database.query(
                    "SELECT id, task, source, steps FROM experience"
                    " WHERE source = 'human' AND task = 'click'"
                )
                if len(rows) > 1:
                    names = ("id", "task", "source", "steps")
                    return dict(zip(names, rows[0], strict=True))
                time.sleep(0.1)
        finally:
            store.close()
    raise AssertionError("no demonstration was stored")
