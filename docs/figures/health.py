"""Draws the faults that C4 tells apart, as timelines of four ranks.

    python docs/figures/health.py

Writes docs/figures/health.svg. The steps are made up; what is said above each panel
is what `jaxlab.health` says of them.
"""

from pathlib import Path

import matplotlib
import numpy as np

matplotlib.use("svg")
matplotlib.rcParams["svg.hashsalt"] = "jaxlab"
from matplotlib import pyplot as plt  # noqa: E402

from jaxlab.health import (  # noqa: E402
    Board,
    Diagnosis,
    Phase,
    RankSample,
    align,
    detect_stall,
    init_baseline,
    init_slow,
    update_baseline,
    update_slow,
)

ROOT = Path(__file__).parents[2]
WORK, COMM, END = 0.5, 0.15, 3.6  # seconds
VICTIM, FAULT = 2, 2  # the rank, and the step, at which it begins
NEVER = np.inf
BEFORE = 60  # steps from which the detector has learned


def steps(name: str, first: int, last: int):
    """Arrivals [n] and end of each step: begin, enter_n, exit."""
    begin, rng = 0.0, np.random.default_rng(0)
    for step in range(first, last):
        work, comm = WORK * rng.uniform(0.9, 1.0, 4), COMM
        if step >= FAULT:
            if name in ("own work hangs", "stopped by a signal", "killed"):
                work[VICTIM] = NEVER
            work[VICTIM] += 0.6 * (name == "own work is slow")
            comm += 0.6 * (name == "communication is slow")
            comm = NEVER if name == "communication hangs" else comm
        enter = begin + work
        end = enter.max() + comm
        yield step, begin, enter, end
        begin = end
        if not np.isfinite(end):
            return


def said(name: str) -> Diagnosis:
    """What jaxlab.health says, of the steps until then or of the board at the end."""
    baseline, state = init_baseline(), init_slow(4)
    found = Diagnosis("healthy")
    for step, begin, enter, end in steps(name, -BEFORE, 40):
        if not np.isfinite(end):
            return detect_stall(board(name, enter), 100.0, baseline)
        logs = {r: [RankSample(step + BEFORE, begin, enter[r], end)] for r in range(4)}
        window = align(logs)
        state, found = update_slow(state, window, baseline)
        baseline = update_baseline(baseline, window, found)
        if found.kind not in ("healthy", "unknown"):
            break
    return found


def board(name: str, enter: np.ndarray) -> Board:
    """The ranks' boards, 20 seconds after nothing has moved any more."""
    there = np.isfinite(enter)
    lost = ~there
    return Board(
        alive=~(lost & (name == "killed")),
        stopped=lost & (name == "stopped by a signal"),
        heartbeat=np.where(lost & (name != "own work hangs"), 80.0, 100.0),
        progress=np.full(4, 80.0),
        enter_seq=np.where(there, 9, 8),
        exit_seq=np.full(4, 8),
        phase=np.full(4, Phase.STEP),
        step=np.full(4, 8),
    )


def main() -> None:
    """Draws and writes."""
    names = (
        "healthy",
        "own work is slow",
        "communication is slow",
        "own work hangs",
        "communication hangs",
        "stopped by a signal",
        "killed",
    )
    figure, panels = plt.subplots(
        len(names), 1, figsize=(8, 8.4), sharex=True, layout="constrained"
    )
    for axes, name in zip(panels, names, strict=True):
        for step, begin, enter, end in steps(name, 0, 10):
            if begin > END:
                break
            gone = step >= FAULT and name in ("killed", "stopped by a signal")
            for rank in range(4):
                out = gone and rank == VICTIM
                arrive = min(enter[rank], begin + 0.25 if out else END)
                leave = min(end, END)
                color = "C3" if step >= FAULT and rank == VICTIM else "C0"
                work = axes.barh(rank, arrive - begin, left=begin, color="C0")
                if np.isinf(enter[rank]) or (
                    name == "own work is slow" and color == "C3"
                ):
                    work[0].set_color("C3")
                if arrive < leave and not out:
                    slow = step >= FAULT and name.startswith("communication")
                    own = axes.barh(rank, leave - arrive, left=arrive, color="0.85")
                    if slow:
                        last = enter.max()
                        own[0].set_width(max(last - arrive, 0))
                        axes.barh(rank, leave - last, left=last, color="C1")
                if out:
                    axes.plot(arrive, rank, "x", color="C3", ms=7, mew=2)
        diagnosis = said(name)
        head = diagnosis.kind.upper()
        head += f" rank {diagnosis.ranks[0]}" if diagnosis.ranks else ""
        axes.set_title(f"{name}:  {head}", loc="left", fontsize=9)
        axes.set(yticks=range(4), ylim=(3.6, -0.6), xlim=(0, END))
        axes.tick_params(labelsize=7)
    panels[-1].set_xlabel("seconds; rows are ranks")
    handles = [
        plt.Rectangle((0, 0), 1, 1, color=color) for color in ("C0", "0.85", "C3", "C1")
    ]
    labels = "own work", "in the collective", "the culprit's work", "what takes longer"
    figure.legend(handles, labels, loc="outside lower center", ncols=4, fontsize=8)
    figure.savefig(ROOT / "docs/figures/health.svg", metadata={"Date": None})


if __name__ == "__main__":
    main()
