"""The trajectory store on SQLite and on a real PostgreSQL server."""

import collections
import importlib.util
import multiprocessing
import os
import signal
import time

import numpy as np
import pytest

from jaxlab.errors import UserError
from jaxlab.rl import figures
from jaxlab.rl.curation import Experience, PoolState, Source, pool_add
from jaxlab.rl.store import Store
from jaxlab.rl.tables import Choice
from jaxlab.rl.upkeep import prune, sweep
from tests.postgres import programs, server
from tests.test_rl_trajectory import example, same

SPAWN = multiprocessing.get_context("spawn")


@pytest.fixture(scope="module")
def postgres():
    if programs() is None:
        pytest.skip("no PostgreSQL server (apt-get install postgresql)")
    if importlib.util.find_spec("psycopg") is None:
        pytest.skip("psycopg not installed (extra `cluster`)")
    with server() as address:
        yield address


@pytest.fixture(params=["sqlite", "postgres"])
def address(request):
    return None if request.param == "sqlite" else request.getfixturevalue("postgres")


class Clock:
    now = 1000.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def store(address, tmp_path, clock):
    with Store(tmp_path / "run", address, clock) as store:
        yield store


def keep_all(group, task, rewards, pool):
    return Choice(True)


def lease(store, count=1, version=0, max_lag=2, choose=keep_all, consumer="a", **more):
    return store.lease(count, version, max_lag, choose, consumer=consumer, **more)


def add(store, task="click", seed=3, size=2, version=0):
    return store.add_group(task, seed, [(10, False)] * size, version)


def finish(store, ticket, reward=1.0, version=0, steps=2, **fields):
    one = example(steps, seed=ticket.rollout, id=ticket.rollout, task=ticket.task)
    one = one._replace(
        seed=ticket.seed,
        group=ticket.group,
        reward=reward,
        version=np.full(steps, version, np.int32),
        **fields,
    )
    return one, store.put(one)


def add_done(store, rewards=(1.0, 0.0), version=0, **more):
    tickets = add(store, size=len(rewards), **more)
    for ticket, reward in zip(tickets, rewards, strict=True):
        finish(store, ticket, reward, version)
    return tickets


def counts(store):
    return figures.group_counts(store.database)


def test_the_way_of_a_group(store):
    tickets = add(store)
    assert store.queued() == tickets
    store.start(tickets[0].rollout, "0/1")
    assert store.queued() == tickets[1:]
    stored = [finish(store, ticket)[0] for ticket in tickets]
    assert counts(store) == {"READY": 1}
    taken = lease(store)
    assert lease(store) is None and counts(store) == {"LEASED": 1}
    assert all(
        same(one, store.load(member))
        for one, member in zip(stored, taken.groups[0], strict=True)
    )
    store.publish(1, 1, "weights/1", "00", taken.id)
    assert counts(store) == {"TRAINED": 1}
    assert store.acknowledge(1, "a") == 1
    assert counts(store) == {"USED": 1}
    assert figures.latest(store.database).version == 1
    assert figures.largest_lag(store.database) == 0


def test_a_trajectory_handed_in_again_changes_nothing(store):
    tickets = add(store)
    one, new = finish(store, tickets[0])
    assert new and not store.put(one)
    assert not store.put(one._replace(reward=0.0))  # and the first one stays
    assert counts(store) == {"OPEN": 1}
    finish(store, tickets[1])
    assert [m.reward for m in lease(store).groups[0]] == [1.0, 1.0]
    assert sweep(store) == 0  # no blob of the refused one is left


def test_a_rollout_that_dies_runs_again_and_is_given_up(store):
    first, second = add(store)
    for again in (True, True, False):
        store.start(first.rollout, "0/0")
        assert store.fail(first.rollout, "renderer died", 3) == again
    assert not store.fail(first.rollout, "late", 3)
    finish(store, second)
    assert counts(store) == {"READY": 1}
    assert lease(store, smallest=1).groups[0][0].rollout == second.rollout
    rewards = store.database.query("SELECT reward FROM trajectory")
    assert rewards == [(1.0,)]  # a death is no reward of 0
    for ticket in add(store):
        for _ in range(3):
            store.start(ticket.rollout, "0/0")
            store.fail(ticket.rollout, "gone", 3)
    assert counts(store)["FAILED"] == 1


def test_what_ran_when_the_coordinator_died_is_queued_and_may_still_arrive(store):
    first, second = add(store)
    store.start(first.rollout, "0/0")
    assert store.requeue() == [first.rollout]
    assert store.queued() == [first, second]
    assert finish(store, first)[1]  # the spool of its host had it
    assert store.queued() == [second]


def test_fewer_groups_are_leased_where_they_will_do(store):
    for rewards in ((1.0, 1.0), (0.0, 1.0), (1.0, 1.0)):
        for ticket, reward in zip(add(store), rewards, strict=True):
            finish(store, ticket, reward=reward)

    def differ(group, task, rewards, pool):
        return Choice(len(set(rewards)) > 1)

    assert lease(store, 2, choose=differ) is None
    assert counts(store) == {"READY": 1, "REJECTED": 2}
    assert lease(store, 2, choose=differ, least=2) is None
    taken = lease(store, 2, choose=differ, least=1)
    assert [m.reward for m in taken.groups[0]] == [0.0, 1.0]
    assert lease(store, 2, choose=differ, least=1) is None


def test_old_steps_are_not_leased(store):
    add_done(store, version=3)
    mixed = add(store)
    finish(store, mixed[0], version=3)
    finish(store, mixed[1], version=5)
    add_done(store, version=5)
    taken = lease(store, version=6, max_lag=2, smallest=2)
    assert counts(store) == {"STALE": 2, "LEASED": 1}
    assert figures.largest_lag(store.database) == 1
    assert len(taken.groups[0]) == 2


def test_a_stale_member_leaves_its_group(store):
    tickets = add(store, size=3)
    for ticket, version in zip(tickets, (1, 4, 5), strict=True):
        finish(store, ticket, version=version)
    taken = lease(store, version=5, max_lag=1)
    assert [m.rollout for m in taken.groups[0]] == [t.rollout for t in tickets[1:]]
    assert figures.largest_lag(store.database) == 1


def test_all_groups_or_none(store):
    add_done(store)
    assert lease(store, 2) is None and counts(store) == {"READY": 1}
    add_done(store)
    assert len(lease(store, 2).groups) == 2


def test_what_is_not_worth_training_is_rejected(store):
    add_done(store, rewards=(1.0, 1.0))
    add_done(store, rewards=(1.0, 0.0))
    taken = lease(store, choose=lambda group, task, r, pool: Choice(min(r) < max(r)))
    assert [m.reward for m in taken.groups[0]] == [1.0, 0.0]
    assert counts(store) == {"REJECTED": 1, "LEASED": 1}


def test_a_learner_that_died_gives_back(store, clock):
    add_done(store)
    taken = lease(store, seconds=60.0)
    clock.now += 50
    store.renew("a", 60.0)
    clock.now += 50
    assert store.expire() == 0
    clock.now += 61
    again = lease(store, consumer="b")
    assert again.groups == taken.groups
    with pytest.raises(KeyError, match="expired"):
        store.publish(1, 1, "weights/1", "00", taken.id)
    assert figures.latest(store.database) is None  # all of it was undone


def test_what_was_learnt_and_not_saved_is_ready_again(store):
    add_done(store)
    add_done(store)
    store.publish(1, 1, "weights/1", "00", lease(store).id)
    store.acknowledge(1, "a")
    store.publish(2, 2, "weights/2", "00", lease(store, version=1).id)
    assert store.release("a") == 1
    assert counts(store) == {"USED": 1, "READY": 1}


def test_a_save_acknowledges_only_what_it_has_learnt_from(store):
    add_done(store)
    add_done(store)
    store.publish(1, 1, "weights/1", "00", lease(store, version=0).id)
    store.publish(2, 2, "weights/2", "00", lease(store, version=1).id)
    assert store.acknowledge(1, "a") == 1
    assert counts(store) == {"USED": 1, "TRAINED": 1}


def test_a_version_is_published_once(store):
    store.publish(1, 1, "weights/1", "00")
    with pytest.raises(Exception, match="(?i)unique|duplicate"):
        store.publish(1, 1, "weights/1", "00")


def test_the_pool_keeps_what_the_pure_function_keeps(store):
    rng, pool = np.random.default_rng(0), PoolState()
    for i in range(30):
        source = rng.choice(["self", "self", "oracle", "human"])
        version = -1 if source != "self" else int(rng.integers(0, 9))
        one = example(2, i, source=str(source), reward=1.0, task="click")
        one = one._replace(version=np.full(2, version, np.int32))
        assert store.add_experience(one, 5)
        pool = pool_add(pool, Experience("click", str(i), Source(source), version), 5)
        kept = [(x.source, x.version) for x in store.experience("click")]
        assert kept == [(x.source.value, x.version) for x in pool.items]
    assert same(store.load(store.experience("click")[-1]), one) or len(kept) == 5
    with pytest.raises(ValueError, match="no success"):
        store.add_experience(one._replace(reward=0.0))


def test_an_injected_success_is_counted_and_comes_with_its_group(store):
    demonstration = example(2, 5, source="oracle", reward=1.0, task="click")
    assert store.add_experience(demonstration)
    assert not store.add_experience(demonstration)  # it is there already
    add_done(store, rewards=(0.0, 0.0))
    taken = lease(store, choose=lambda group, task, r, pool: Choice(True, pool()[0]))
    *members, extra = taken.groups[0]
    assert len(members) == 2 and same(store.load(extra), demonstration)
    assert store.experience("click")[0].injected == 1
    assert figures.task_stats(store.database, "click").longest == 2


def test_successes_of_the_policy_go_to_the_pool(store):
    ticket, other = add(store)
    one, _ = finish(store, ticket)
    store.put(one, 4)  # again: no
    assert store.experience("click") == []
    one, _ = finish(store, add(store)[0], reward=0.0)
    ticket = add(store)[0]
    store.put(one._replace(id=ticket.rollout, reward=1.0), experience=4)
    assert [x.source for x in store.experience("click")] == ["self"]


def test_blobs_without_a_row_are_swept_away(store):
    add_done(store)
    orphan = store.folder / "blobs/00000/9-beef.trajectory"
    orphan.write_bytes(b"half")
    (store.folder / "blobs/.x.tmp").write_bytes(b"")
    assert sweep(store) == 2 and not orphan.exists()
    member = lease(store).groups[0][0]
    store.load(member)
    (store.folder / member.path).write_bytes(b"flipped")
    with pytest.raises(ValueError, match="damaged"):
        store.load(member)


def test_old_blobs_go_and_their_rows_stay(store):
    for _ in range(3):
        add_done(store)
    store.publish(1, 1, "weights/1", "00", lease(store, 2).id)
    store.acknowledge(1, "a")
    kept = store.put(finish(store, add(store)[0])[0])  # open: not done with
    assert not kept and prune(store, 5, most=1) == 1
    assert prune(store, 5) == 1 and prune(store, 5) == 0
    assert prune(store, 0) == 2  # of the four used ones; READY and OPEN stay
    rows = store.database.query("SELECT path FROM trajectory ORDER BY rollout")
    assert [row[0] is None for row in rows] == [True] * 4 + [False] * 3
    assert len(list((store.folder / "blobs").rglob("*.trajectory"))) == 3


def test_figures_of_a_task(store):
    add_done(store, rewards=(0.0, 1.0, 0.0))
    stats = figures.task_stats(store.database, "click", 2)
    assert stats == ([1.0, 0.0], [False, False], 2)
    assert figures.task_stats(store.database, "none") == ([], [], None)


def test_a_paused_task(store):
    store.pause("click")
    assert figures.paused(store.database) == {"click"}
    store.pause("click", False)
    assert figures.paused(store.database) == set()


def test_events_and_steps_are_kept(store):
    store.note("started", pid=3)
    [(ticket, *_)] = [add_done(store)]
    rows = store.database.query("SELECT kind, body FROM event")
    assert rows == [("started", '{"pid": 3}')]
    steps = store.database.query(
        "SELECT t, version, worker FROM step WHERE rollout = ? ORDER BY t",
        ticket.rollout,
    )
    assert steps == [(0, 0, 1), (1, 0, 1)]


# ------------------------------------------------------------- many processes


def _take(folder, address, name, results):
    with Store(folder, address) as store:
        taken, idle = [], 0
        while idle < 20:
            found = lease(store, 2, consumer=name)
            if found is None:
                idle += 1
                time.sleep(0.02)
                continue
            taken += [m.rollout for group in found.groups for m in group]
        results.put(taken)


def _hand_in(folder, address, rollouts):
    with Store(folder, address) as store:
        for ticket in store.queued():
            if ticket.rollout in rollouts:
                finish(store, ticket)


def test_processes_share_a_store_and_each_trajectory_is_taken_once(address, tmp_path):
    folder = tmp_path / "run"
    with Store(folder, address) as store:
        _share(store, folder, address)


def _share(store, folder, address):
    tickets = [ticket for _ in range(20) for ticket in add(store)]
    ids = [t.rollout for t in tickets]
    results = SPAWN.Queue()
    # Two writers hand in overlapping halves, two learners compete for the groups.
    processes = [
        SPAWN.Process(target=_hand_in, args=(folder, address, ids[:28])),
        SPAWN.Process(target=_hand_in, args=(folder, address, ids[12:])),
        SPAWN.Process(target=_take, args=(folder, address, "a", results)),
        SPAWN.Process(target=_take, args=(folder, address, "b", results)),
    ]
    for process in processes:
        process.start()
    for process in processes[:2]:
        process.join(120)
    taken = results.get(timeout=120) + results.get(timeout=120)
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    assert max(collections.Counter(taken).values()) == 1
    found = {r for (r,) in store.database.query("SELECT rollout FROM trajectory")}
    assert found == set(ids)
    left = counts(store)
    assert left.get("READY", 0) * 2 + len(taken) == len(ids)


def _die_with_a_lease(folder, address):
    with Store(folder, address) as store:
        with store.database.transaction() as t:
            t.run("UPDATE grouping SET state = 'LEASED' WHERE state = 'READY'")
            os.kill(os.getpid(), signal.SIGKILL)
            time.sleep(60)


def test_a_killed_process_leaves_nothing_half_done(address, tmp_path):
    with Store(tmp_path, address) as store:
        add_done(store)
        process = SPAWN.Process(target=_die_with_a_lease, args=(tmp_path, address))
        process.start()
        process.join(60)
        assert process.exitcode == -9
        assert counts(store) == {"READY": 1}
        assert lease(store) is not None


# ------------------------------------------------------------------ errors


@pytest.mark.requires("psycopg")
def test_a_server_that_is_not_there_is_named_without_its_password(tmp_path):
    address = "postgresql://me:secret@127.0.0.1:1/db"
    with pytest.raises(UserError, match="me:\\.\\.\\.@127.0.0.1") as caught:
        Store(tmp_path, address)
    assert "secret" not in str(caught.value)


def test_a_file_that_is_no_database_is_named(tmp_path):
    (tmp_path / "store.db").write_text("no database" * 1000)
    with pytest.raises(UserError, match="store.db"):
        Store(tmp_path)
