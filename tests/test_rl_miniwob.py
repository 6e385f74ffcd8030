"""MiniWoB++ in Chromium: the contract, the experts, and what pages must not do."""

import contextlib
import hashlib
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from random import Random

import gymnasium
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env

import jaxlab.rl.envs  # noqa: F401  (registers)
from jaxlab.errors import UserError
from jaxlab.rl.envs import browsers, cdp, miniwob, miniwob_tasks
from jaxlab.rl.envs.api import KEYS, UNKNOWN, Action, Crash, Kind, encode, quoted
from jaxlab.rl.envs.browsers import BROWSERS
from jaxlab.rl.envs.miniwob import MiniWoBEnv, decode, inputs
from jaxlab.rl.envs.miniwob_tasks import TASKS, VOCABULARY, instruction

ROOT = Path(__file__).parent.parent
SLOW = 60.0
"""seconds: this is no test of speed, and the machine may be busy"""
HELD_OUT = 1_000_000


def missing() -> str:
    """Why there is nothing to test with; empty: there is."""
    try:
        cdp.find_browser()
        miniwob_tasks.folder()
    except UserError as error:
        return str(error)
    return ""


needs_browser = pytest.mark.skipif(bool(missing()), reason=missing())


@pytest.fixture(scope="module")
def env():
    env = MiniWoBEnv(timeout=SLOW)
    yield env
    env.close()


@pytest.fixture
def pages(tmp_path):
    """Makes pages of one's own for a tab: `pages(html) -> tab` that shows it."""
    browser = cdp.Browser(timeout=SLOW)

    def show(html: str) -> cdp.Tab:
        (tmp_path / "page.html").write_text(f"<!doctype html><body>{html}")
        tab = browser.open(tmp_path.as_uri() + "/")
        tab.load(f"{tmp_path.as_uri()}/page.html", "document.body", SLOW)
        return tab

    yield show
    browser.close()


def processes(word: str) -> list[int]:
    """Whose command line has a word in it, children that linger as zombies excepted."""
    found = []
    for line in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            if word.encode() in line.read_bytes():
                found.append(int(line.parent.name))
    return found


def gone(word: str, seconds: float = SLOW) -> bool:
    deadline = time.monotonic() + seconds
    while processes(word) and time.monotonic() < deadline:
        time.sleep(0.05)
    return not processes(word)


def digest(image: np.ndarray) -> str:
    return hashlib.sha256(image.tobytes()).hexdigest()


def solve(env: MiniWoBEnv, task: str, seed: int, rng: Random | None = None) -> float:
    """Reward of the expert's episode."""
    env.reset(seed=seed, options={"task": task})
    reward = 0.0
    while not env.outcome and (action := env.oracle_action(rng)) is not None:
        reward = env.step(action)[1]
    return reward


# ------------------------------------------------------------- without a browser


def test_without_a_browser_the_error_says_what_to_install(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CHROMIUM", raising=False)
    with pytest.raises(UserError, match="apt-get install -y chromium"):
        cdp.find_browser()
    monkeypatch.setenv("CHROMIUM", "nobrowser")
    with pytest.raises(UserError, match="no browser 'nobrowser'"):
        cdp.find_browser()


def test_what_is_to_be_copied_is_quoted():
    said = instruction("enter-date", "Enter 10/12/2014  as the date\nand hit submit.")
    assert said == 'Enter "10/12/2014" as the date and hit submit.'
    said = "Search for crime movies directed by Lee from year 1987."
    assert quoted(instruction("multi-orderings", said)) == ("crime", "Lee", "1987")
    assert instruction("click-test", "Click\x00 ♥") == "Click? ?"
    assert instruction("click-test", {"not": "text"}) == ""
    assert len(instruction("click-test", "a" * 10**6)) == miniwob_tasks.CHARACTERS


def test_words_without_an_id_are_spelled():
    ids = {word: i for i, word in enumerate(VOCABULARY)}
    spell = [VOCABULARY[i] for i in encode("Select qX, Zzq vW.", ids, 12)]
    assert spell == ["Select", "q", "X", ",", "Z", "z", "q", " ", "v", "W", ".", ""]
    assert len(set(VOCABULARY)) == len(VOCABULARY)
    assert encode("ab", {"a": 2}, 1)[0] == UNKNOWN


def test_actions_become_input_events():
    def names(action, fields=()):
        return [
            (e["type"], e.get("x"), e.get("key")) for _, e in inputs(action, fields)
        ]

    click = inputs(Action(Kind.CLICK, (1.0, 1.0)), ())
    assert [e["type"] for _, e in click] == [
        "mouseMoved",
        "mousePressed",
        "mouseReleased",
    ]
    assert (click[1][1]["x"], click[1][1]["y"]) == (159.5, 209.5)  # inside the page
    double = inputs(Action(Kind.DOUBLE_CLICK), ())
    assert [e.get("clickCount") for _, e in double] == [None, 1, 1, 2, 2]
    drag = inputs(Action(Kind.DRAG, (0.25, 0.5), (0.75, 0.5)), ())
    assert [e["x"] for _, e in drag] == [40, 40, 60, 80, 100, 120, 120]
    typed = inputs(Action(Kind.TYPE_FIELD, field=1), ("no", "yes"))
    assert [e.get("text") for _, e in typed] == ["y", None, "e", None, "s", None]
    assert inputs(Action(Kind.TYPE_FIELD, field=3), ("no",)) == []
    assert inputs(Action(Kind.TYPE, token=UNKNOWN), ()) == []
    assert len({str(names(Action(Kind.KEY, key=k))) for k in range(len(KEYS))}) == 8


# ------------------------------------------------------------------ the contract


@needs_browser
def test_gymnasium_finds_no_fault():
    env = gymnasium.make("jaxlab/MiniWoB-v0", task="click-button", timeout=SLOW)
    try:
        check_env(env.unwrapped, skip_render_check=True)
        assert env.unwrapped.spec.id == "jaxlab/MiniWoB-v0"
    finally:
        env.close()


@needs_browser
def test_unknown_names_are_told_with_the_right_one(env):
    with pytest.raises(ValueError, match="did you mean 'click-dialog'"):
        MiniWoBEnv("click-dialogue")
    with pytest.raises(ValueError, match="no option 'tasks'"):
        env.reset(options={"tasks": "click-test"})
    with pytest.raises(ValueError, match="render_mode 'human'; give rgb_array"):
        MiniWoBEnv(render_mode="human")


@needs_browser
def test_an_episode_ends_as_the_page_says(env):
    observation, info = env.reset(seed=3, options={"task": "click-button"})
    assert observation["text"] == 'Click on the "no" button.'
    assert env.observation_space.contains(observation)
    assert info["outcome"] == "" and info["seed"] == 3
    _, reward, ended, cut, info = env.step(env.oracle_action())
    assert (reward, ended, cut, info["outcome"]) == (1.0, True, False, "solved")
    assert info["success"] and info["raw_reward"] == 1.0
    with pytest.raises(gymnasium.error.ResetNeeded, match="click-button/3 is over"):
        env.step(Action(Kind.WAIT).to_dict())

    env.reset(seed=3, options={"task": "click-test-2"})
    for _ in range(3):
        last = env.step(Action(Kind.CLICK, (0.99, 0.99)).to_dict())
    assert last[1:4] == (0.0, False, True) and last[4]["outcome"] == "limit"

    env.reset(seed=3, options={"task": "click-dialog-2"})
    assert env.step(Action(Kind.DONE).to_dict())[1:4] == (0.0, True, False)


@needs_browser
def test_a_wrong_answer_is_worth_nothing_though_the_page_says_less(env):
    env.reset(seed=1, options={"task": "click-test-2"})
    wrong = env._tab.evaluate(
        "(b => [b.x + b.width / 2, b.y + b.height / 2])"
        "(document.getElementById('subbtn2').getBoundingClientRect())",
        SLOW,
    )
    action = Action(Kind.CLICK, (wrong[0] / 160, wrong[1] / 210)).to_dict()
    _, reward, ended, _, info = env.step(action)
    assert (reward, ended, info["raw_reward"]) == (0.0, True, -1.0)
    assert info["outcome"] == "failed" and not info["success"]


@needs_browser
@pytest.mark.parametrize(
    "task", ["click-dialog", "login-user", "drag-box", "enter-date"]
)
def test_experts_solve_held_out_seeds(env, task):
    assert task in TASKS
    assert [solve(env, task, HELD_OUT + s, Random(s)) for s in range(3)] == [1.0] * 3


@needs_browser
def test_scrolling_and_keys_reach_the_page(env):
    assert solve(env, "scroll-text", HELD_OUT) == 1.0
    assert solve(env, "choose-list", HELD_OUT) == 1.0


@needs_browser
def test_every_expert_is_a_task_and_every_task_has_one(env):
    env.reset(seed=0, options={"task": "click-test"})
    known = env._tab.evaluate(f"Object.keys({miniwob.oracles()})", SLOW)
    assert sorted(known) == sorted(TASKS) and len(TASKS) >= 25


@needs_browser
def test_a_shuffled_instruction_is_another_seeds(env):
    plain = env.reset(seed=5, options={"task": "click-dialog-2"})[0]
    texts = {plain["text"]}
    for seed in range(8):
        shuffled, _ = env.reset(seed=seed, options={"shuffled": True})
        texts.add(shuffled["text"])
    assert len(texts) == 3  # Cancel, OK, x
    own, _ = env.reset(seed=5, options={"shuffled": False})
    assert digest(own["image"]) == digest(plain["image"])
    shuffled, _ = env.reset(seed=5, options={"shuffled": True})
    assert np.array_equal(own["image"][50:], shuffled["image"][50:])  # but the query
    env.reset(options={"shuffled": False})


@needs_browser
def test_seeds_give_the_same_picture_in_any_tab_and_process(env):
    def first_frames(env: MiniWoBEnv, order) -> dict:
        return {
            (task, seed): digest(
                env.reset(seed=seed, options={"task": task})[0]["image"]
            )
            for task, seed in order
        }

    order = [
        (t, s) for t in ("click-dialog", "enter-text", "click-shape") for s in (0, 9)
    ]
    with contextlib.closing(MiniWoBEnv(timeout=SLOW)) as other:
        mine, theirs = first_frames(env, order), first_frames(other, reversed(order))
    assert mine == theirs and len(set(mine.values())) == len(order)
    program = f"""
import hashlib
from jaxlab.rl.envs.miniwob import MiniWoBEnv
env = MiniWoBEnv("click-shape", timeout={SLOW})
print(hashlib.sha256(env.reset(seed=9)[0]["image"].tobytes()).hexdigest())
env.close()
"""
    output = subprocess.check_output([sys.executable, "-c", program], cwd=ROOT)
    assert output.decode().strip() == mine["click-shape", 9]


@needs_browser
def test_render_shows_where_was_pointed_at():
    with contextlib.closing(
        MiniWoBEnv("click-test-2", render_mode="rgb_array", timeout=SLOW)
    ) as env:
        env.reset(seed=0)
        before = env.render()
        env.step(Action(Kind.CLICK, (0.5, 0.9)).to_dict())
        changed = np.argwhere((env.render() != before).any(2)).mean(0)
    assert before.shape == (210, 160, 3)
    assert np.allclose(changed, (189, 80), atol=1)


# ----------------------------------------------------------- crashes and ends


@needs_browser
@pytest.mark.parametrize("what", ["renderer", "browser"])
def test_a_killed_process_loses_one_episode_and_no_more(what):
    with contextlib.closing(MiniWoBEnv("click-test", timeout=SLOW)) as env:
        env.reset(seed=0)
        browser = env._tab.browser
        for pid in cdp._group(browser.pid):
            line = Path(f"/proc/{pid}/cmdline").read_bytes()
            if (b"--type=renderer" in line) if what == "renderer" else True:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        begun = time.monotonic()
        with pytest.raises(Crash, match="crashed|gone"):
            while True:  # the first may still be answered
                env.step(Action(Kind.WAIT).to_dict())
                env.actions = 0
        assert time.monotonic() - begun < SLOW / 2  # told, not timed out
        with pytest.raises(gymnasium.error.ResetNeeded):
            env.step(Action(Kind.WAIT).to_dict())
        assert solve(env, "click-test", 1) == 1.0


@needs_browser
def test_another_thread_can_free_one_that_waits():
    with contextlib.closing(MiniWoBEnv("click-test", timeout=SLOW)) as env:
        env.reset(seed=0)
        env._tab.call(  # the page hangs from now on
            ("Runtime.evaluate", {"expression": "setTimeout(() => { for (;;); })"}),
            timeout=SLOW,
        )
        timer = threading.Timer(1.0, env.abort)
        timer.start()
        begun = time.monotonic()
        with pytest.raises(Crash, match="closed|crashed"):
            while True:
                env.step(Action(Kind.WAIT).to_dict())
                env.actions = 0
        assert time.monotonic() - begun < SLOW / 2
        timer.join()
        assert solve(env, "click-test", 1) == 1.0


@needs_browser
def test_closing_leaves_nothing_behind():
    env, other = (MiniWoBEnv("click-test", timeout=SLOW) for _ in range(2))
    env.reset(seed=0)
    other.reset(seed=0)
    profile = env._tab.browser._profile
    assert other._tab.browser is env._tab.browser
    assert processes(str(profile))
    env.close()
    assert solve(other, "click-test", 1) == 1.0
    other.close()
    other.close()
    assert gone(str(profile)) and not profile.exists()
    env.reset(seed=0)  # a closed one may begin again
    env.close()


@needs_browser
def test_a_killed_host_takes_its_browser_along():
    program = """
import sys, time
from jaxlab.rl.envs.miniwob import MiniWoBEnv
env = MiniWoBEnv("click-test", timeout=60)
env.reset(seed=0)
print(env._tab.browser._profile, flush=True)
time.sleep(600)
"""
    host = subprocess.Popen([sys.executable, "-c", program], stdout=-1, cwd=ROOT)
    profile = host.stdout.readline().decode().strip()
    assert processes(profile)
    host.kill()
    host.wait()
    host.stdout.close()
    assert gone(profile)
    cdp.Browser(timeout=SLOW).close()  # the next one sweeps
    assert not Path(profile).exists()


@needs_browser
def test_tabs_and_browsers_are_replaced_when_worn(monkeypatch):
    monkeypatch.setattr(miniwob, "TAB_EPISODES", 2)
    monkeypatch.setattr(browsers, "BROWSER_TABS", 2)
    with contextlib.closing(MiniWoBEnv("click-test", timeout=SLOW)) as env:
        tabs, used = [], []
        for seed in range(6):
            assert solve(env, "click-test", seed) == 1.0
            tabs.append(env._tab)
            used.append(env._tab.browser)
        assert [tabs.index(tab) // 2 for tab in tabs] == [0, 0, 1, 1, 2, 2]
        assert len(set(used)) >= 2
        assert all(b.dead for b in set(used) - {env._tab.browser})
    assert not BROWSERS._users or env._tab is None


@needs_browser
def test_threads_act_at_once():
    envs = [MiniWoBEnv("click-button", timeout=SLOW) for _ in range(3)]
    rewards: list[float] = []

    def work(number: int) -> None:
        for seed in range(3):
            rewards.append(solve(envs[number], "click-button", 10 * number + seed))

    threads = [threading.Thread(target=work, args=(n,)) for n in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for env in envs:
        env.close()
    assert rewards == [1.0] * 9


# -------------------------------------------------------------- hostile pages


@needs_browser
def test_dialogs_windows_and_downloads_come_to_nothing(pages, tmp_path):
    tab = pages("<a id=a href='data:application/zip,x' download='x.zip'>x</a>")
    assert tab.evaluate("[alert(1), confirm('?'), prompt('?')]", SLOW) == [
        None,
        False,
        None,
    ]
    tab.evaluate(
        "document.getElementById('a').click(); !window.open('page.html')", SLOW
    )
    deadline = time.monotonic() + SLOW
    while time.monotonic() < deadline:
        targets = tab.browser.call(("Target.getTargets", {}))[0]["targetInfos"]
        if not any("openerId" in t for t in targets):
            break
    assert not any("openerId" in t for t in targets)
    assert [p.name for p in tmp_path.iterdir()] == ["page.html"]


@needs_browser
@pytest.mark.parametrize(
    "script",
    ["while (true) alert(1)", "while (true);", "onbeforeunload = () => 1; for(;;);"],
)
def test_a_page_that_hangs_costs_its_tab_alone(pages, script):
    other = pages("fine")
    tab = pages("stuck")
    with pytest.raises(Crash, match="no answer to Runtime.evaluate in time"):
        tab.evaluate(script, 1.0)
    with pytest.raises(Crash):
        tab.evaluate("1", SLOW)
    tab.close()
    assert other.evaluate("document.body.textContent", SLOW) == "fine"


@needs_browser
def test_a_page_sees_its_folder_and_no_network(pages):
    served = []
    import http.server

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            served.append(self.path)
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_):
            pass

    server = http.server.HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        address = f"http://127.0.0.1:{server.server_port}"
        tab = pages(
            f"<img src='{address}/image'><script src='{address}/x.js'></script>"
        )
        asked = (
            "Runtime.evaluate",
            {
                "expression": f"fetch('{address}/f').then(() => 'in', () => 'refused')",
                "awaitPromise": True,
                "returnByValue": True,
            },
        )
        assert tab.call(asked, timeout=SLOW)[0]["result"]["value"] == "refused"
        tab.evaluate("location.href = 'file:///etc/passwd'", SLOW)
        time.sleep(0.3)
        try:
            seen = tab.evaluate("document.body.innerText", SLOW)
        except ValueError:  # between two pages there is no body
            seen = ""
        assert "root:" not in seen
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
    assert served == []


@needs_browser
def test_a_huge_page_gives_a_picture_of_the_same_size(pages):
    tab = pages("<div style='width:90000px;height:90000px;background:red'></div>")
    image = decode(tab.screenshot(160, 210, timeout=SLOW))
    assert image.shape == (210, 160, 3)


@needs_browser
def test_leaving_the_page_ends_the_episode(env):
    env.reset(seed=0, options={"task": "click-test"})
    env._tab.evaluate("location.href = 'file:///etc/passwd'", SLOW)
    time.sleep(0.3)
    _, reward, ended, _, info = env.step(Action(Kind.WAIT).to_dict())
    assert (reward, ended, info["outcome"]) == (0.0, True, "failed")
    assert solve(env, "click-test", 1) == 1.0
