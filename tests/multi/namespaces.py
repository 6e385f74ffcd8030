"""What tests of benchmarks in network namespaces share."""

import os
import re
import shutil
import subprocess
from pathlib import Path


def namespaces():
    listing = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True)
    return {line.split()[0] for line in listing.stdout.splitlines() if line.strip()}


def missing():
    """Why this machine cannot shape links; "" if it can."""
    for tool in ("ip", "tc", "unshare"):
        if shutil.which(tool) is None:
            return f"{tool} is not installed"
    if os.geteuid():
        return "network namespaces need root"
    name = f"jaxlab-probe-{os.getpid()}"
    tbf = ("root", "tbf", "rate", "1mbit", "burst", "16kb", "limit", "1mb")
    try:
        for words in (
            ("ip", "netns", "add", name),
            ("tc", "-n", name, "qdisc", "add", "dev", "lo", *tbf),
            ("ip", "netns", "exec", name, "unshare", "--uts", "true"),
        ):
            done = subprocess.run(words, capture_output=True, text=True)
            if done.returncode:
                return f"{' '.join(words)}: {done.stderr.strip()}"
    finally:
        subprocess.run(["ip", "netns", "del", name], capture_output=True)
    return ""


def left_behind(names):
    """Those of `names` whose processes are gone; others are another worker's."""
    pids = {n: re.search(r"^jaxlab-(?:probe-)?(\d+)", n) for n in names}
    return [n for n, m in pids.items() if m and not Path(f"/proc/{m[1]}").exists()]


def interrupt(command, number, said):
    """Stops a run once it has `said` something; nothing of it must be left."""
    run = subprocess.Popen(
        command,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        assert said in run.stderr.readline()
        mine = [n for n in namespaces() if f"-{run.pid}-" in n]
        assert len(mine) == 3
        inside = subprocess.run(
            ["ip", "netns", "pids", sorted(mine)[-1]], capture_output=True, text=True
        )
        assert inside.stdout.split()
        run.send_signal(number)
        assert run.wait(60) == 130
    finally:
        run.kill()
        run.stderr.close()
    assert not [n for n in namespaces() if f"-{run.pid}-" in n]
    for pid in inside.stdout.split():
        assert not Path(f"/proc/{pid}").exists()
