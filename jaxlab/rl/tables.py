"""Tables of the trajectory store, and the rows it hands out; see `jaxlab.rl.store`."""

from typing import NamedTuple

TABLES = """
CREATE TABLE IF NOT EXISTS task (
    task TEXT PRIMARY KEY, paused INTEGER NOT NULL DEFAULT 0,
    longest INTEGER, target INTEGER);
CREATE TABLE IF NOT EXISTS grouping (
    id AUTOKEY, task TEXT NOT NULL, seed INTEGER NOT NULL, size INTEGER NOT NULL,
    open INTEGER NOT NULL, state TEXT NOT NULL, version INTEGER NOT NULL,
    lease INTEGER, created REAL NOT NULL);
CREATE INDEX IF NOT EXISTS grouping_state ON grouping (state, id);
CREATE INDEX IF NOT EXISTS grouping_lease ON grouping (lease);
CREATE TABLE IF NOT EXISTS rollout (
    id AUTOKEY, grouping INTEGER NOT NULL, task TEXT NOT NULL, seed INTEGER NOT NULL,
    cap INTEGER NOT NULL, probe INTEGER NOT NULL, state TEXT NOT NULL,
    attempts INTEGER NOT NULL DEFAULT 0, slot TEXT, started REAL, finished REAL,
    error TEXT);
CREATE INDEX IF NOT EXISTS rollout_state ON rollout (state, id);
CREATE INDEX IF NOT EXISTS rollout_grouping ON rollout (grouping);
CREATE TABLE IF NOT EXISTS trajectory (
    rollout INTEGER PRIMARY KEY, grouping INTEGER NOT NULL, task TEXT NOT NULL,
    seed INTEGER NOT NULL, reward REAL NOT NULL, steps INTEGER NOT NULL,
    v_min INTEGER NOT NULL, v_max INTEGER NOT NULL, cap_truncated INTEGER NOT NULL,
    probe INTEGER NOT NULL, stale INTEGER NOT NULL DEFAULT 0, path TEXT,
    sha256 TEXT NOT NULL, created REAL NOT NULL);
CREATE INDEX IF NOT EXISTS trajectory_grouping ON trajectory (grouping);
CREATE INDEX IF NOT EXISTS trajectory_task ON trajectory (task, rollout);
CREATE TABLE IF NOT EXISTS step (
    rollout INTEGER NOT NULL, t INTEGER NOT NULL, version INTEGER NOT NULL,
    worker INTEGER NOT NULL, tokens INTEGER NOT NULL, logp REAL, entropy REAL,
    PRIMARY KEY (rollout, t));
CREATE TABLE IF NOT EXISTS experience (
    id AUTOKEY, task TEXT NOT NULL, source TEXT NOT NULL, version INTEGER NOT NULL,
    injected INTEGER NOT NULL DEFAULT 0, steps INTEGER NOT NULL, path TEXT NOT NULL,
    sha256 TEXT NOT NULL UNIQUE, created REAL NOT NULL);
CREATE INDEX IF NOT EXISTS experience_task ON experience (task, id);
CREATE TABLE IF NOT EXISTS lease (
    id AUTOKEY, consumer TEXT NOT NULL, version INTEGER NOT NULL, expires REAL NOT NULL,
    state TEXT NOT NULL, created REAL NOT NULL);
CREATE INDEX IF NOT EXISTS lease_state ON lease (state);
CREATE TABLE IF NOT EXISTS injection (
    lease INTEGER NOT NULL, grouping INTEGER NOT NULL, experience INTEGER NOT NULL);
CREATE TABLE IF NOT EXISTS checkpoint (
    version INTEGER PRIMARY KEY, step INTEGER NOT NULL, path TEXT NOT NULL,
    sha256 TEXT NOT NULL, saved INTEGER NOT NULL DEFAULT 0, created REAL NOT NULL);
CREATE TABLE IF NOT EXISTS event (
    id AUTOKEY, at REAL NOT NULL, kind TEXT NOT NULL, body TEXT NOT NULL)
"""


class Ticket(NamedTuple):
    """A rollout to be done."""

    rollout: int
    group: int
    task: str
    seed: int
    cap: int
    """steps at most"""
    probe: bool


class Member(NamedTuple):
    """A trajectory of a group, without its blob."""

    rollout: int
    reward: float
    steps: int
    path: str
    sha256: str


class Stored(NamedTuple):
    """A success in the experience pool."""

    id: int
    task: str
    source: str
    version: int
    injected: int
    steps: int
    path: str
    sha256: str


class Choice(NamedTuple):
    """What becomes of a ready group."""

    keep: bool
    inject: Stored | None = None
    """a success to add to it"""


class Lease(NamedTuple):
    """Groups that one learner may train."""

    id: int
    groups: tuple[tuple[Member | Stored, ...], ...]
    """of each group its trajectories, and what was injected"""


class Version(NamedTuple):
    """Published weights."""

    version: int
    step: int
    """updates that they have seen"""
    path: str
    sha256: str


class TaskStats(NamedTuple):
    """How a task has gone, newest rollouts last."""

    rewards: list[float]
    cap_truncated: list[bool]
    longest: int | None
    """steps of the longest success"""
