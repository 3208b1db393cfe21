"""One contract for every Store: the one in memory and the one in a real etcd."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import count

import pytest

from elasticd.cluster.embedded import EmbeddedEtcd
from elasticd.cluster.etcd import EtcdStore
from elasticd.cluster.store import Changes, Compare, Delete, Put, Store, Watch
from elasticd.errors import Compacted, LeaseLost, StoreUnavailable
from elasticd.testing.memory_store import MemoryStore

_prefixes = count()


@dataclass(frozen=True)
class Backend:
    store: Store
    compact: Callable[[int], None]
    new_store: Callable[[], Store]  # another that sees the same keys, for a close() of its own


@pytest.fixture(scope="module")
def etcd(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EmbeddedEtcd]:
    with EmbeddedEtcd(tmp_path_factory.mktemp("etcd") / "data") as running:
        yield running


@pytest.fixture(params=["memory", "etcd"])
def backend(request: pytest.FixtureRequest) -> Iterator[Backend]:
    if request.param == "memory":
        memory = MemoryStore()
        yield Backend(store=memory, compact=memory.compact, new_store=lambda: memory)
        memory.close()
        return
    endpoint = request.getfixturevalue("etcd").endpoint
    store = EtcdStore([endpoint])
    yield Backend(store=store, compact=store.compact, new_store=lambda: EtcdStore([endpoint]))
    store.close()


@pytest.fixture
def store(backend: Backend) -> Store:
    return backend.store


@pytest.fixture
def prefix() -> str:
    return f"/contract/{next(_prefixes)}/"


def take(watch: Watch, wanted: int, timeout_s: float = 10.0) -> list[Changes]:
    """The first ``wanted`` non-empty changes."""
    seen: list[Changes] = []
    end = time.monotonic() + timeout_s
    for changes in watch:
        if changes.changes:
            seen.append(changes)
        if len(seen) == wanted:
            return seen
        assert time.monotonic() < end, f"only {len(seen)} of {wanted} changes: {seen}"
    raise AssertionError("the watch ended")


def test_get_of_a_missing_key_is_none(store: Store, prefix: str) -> None:
    assert store.get(prefix + "a") is None


def test_put_then_get(store: Store, prefix: str) -> None:
    created = store.put(prefix + "a", "eins")
    changed = store.put(prefix + "a", "zwei")
    found = store.get(prefix + "a")
    assert found is not None
    assert (found.key, found.value, found.lease) == (prefix + "a", "zwei", 0)
    assert (found.create_revision, found.mod_revision) == (created, changed)
    assert changed > created


def test_text_beyond_ascii_and_size(store: Store, prefix: str) -> None:
    text = "größe ✓ " * 20_000
    store.put(prefix + "ü", text)
    found = store.get(prefix + "ü")
    assert found is not None
    assert found.value == text


def test_snapshot_has_the_prefix_only_in_order_of_keys(store: Store, prefix: str) -> None:
    for name in ("b", "a", "c/d"):
        store.put(prefix + name, name)
    last = store.put(prefix[:-1] + "0", "beside")
    snapshot = store.snapshot(prefix)
    assert [entry.key for entry in snapshot.entries] == [prefix + name for name in ("a", "b", "c/d")]
    assert snapshot.revision >= last


def test_delete(store: Store, prefix: str) -> None:
    store.put(prefix + "a", "1")
    assert store.delete(prefix + "a")
    assert not store.delete(prefix + "a")
    assert store.get(prefix + "a") is None


def test_a_key_made_again_has_a_new_create_revision(store: Store, prefix: str) -> None:
    first = store.put(prefix + "a", "1")
    store.delete(prefix + "a")
    again = store.put(prefix + "a", "2")
    found = store.get(prefix + "a")
    assert found is not None
    assert found.create_revision == again > first


def test_txn_create_only_once(store: Store, prefix: str) -> None:
    guard = Compare(key=prefix + "a", create_revision=0)
    assert store.txn([guard], [Put(key=prefix + "a", value="mine")]).succeeded
    assert not store.txn([guard], [Put(key=prefix + "a", value="theirs")]).succeeded
    found = store.get(prefix + "a")
    assert found is not None
    assert found.value == "mine"


def test_txn_by_mod_revision(store: Store, prefix: str) -> None:
    old = store.put(prefix + "a", "1")
    new = store.put(prefix + "a", "2")
    assert not store.txn([Compare(key=prefix + "a", mod_revision=old)], [Put(key=prefix + "a", value="x")]).succeeded
    done = store.txn([Compare(key=prefix + "a", mod_revision=new)], [Put(key=prefix + "a", value="3")])
    found = store.get(prefix + "a")
    assert found is not None
    assert (done.succeeded, found.value, found.mod_revision) == (True, "3", done.revision)


def test_txn_mod_revision_zero_means_no_key(store: Store, prefix: str) -> None:
    guard = Compare(key=prefix + "a", mod_revision=0)
    assert store.txn([guard], [Put(key=prefix + "a", value="1")]).succeeded
    assert not store.txn([guard], [Delete(key=prefix + "a")]).succeeded


def test_txn_needs_every_guard(store: Store, prefix: str) -> None:
    held = store.put(prefix + "a", "1")
    guards = [Compare(key=prefix + "a", create_revision=held), Compare(key=prefix + "b", create_revision=7)]
    assert not store.txn(guards, [Put(key=prefix + "c", value="x")]).succeeded
    assert store.get(prefix + "c") is None


def test_txn_does_all_in_one_revision(store: Store, prefix: str) -> None:
    store.put(prefix + "old", "1")
    done = store.txn(
        [], [Put(key=prefix + "a", value="1"), Put(key=prefix + "b", value="2"), Delete(key=prefix + "old")]
    )
    entries = store.snapshot(prefix).entries
    assert [(e.key, e.mod_revision) for e in entries] == [(prefix + "a", done.revision), (prefix + "b", done.revision)]


def test_a_failed_txn_changes_no_revision(store: Store, prefix: str) -> None:
    before = store.put(prefix + "a", "1")
    done = store.txn([Compare(key=prefix + "a", create_revision=0)], [Put(key=prefix + "a", value="2")])
    assert (done.succeeded, done.revision) == (False, before)


def test_a_guard_compares_exactly_one_revision(store: Store, prefix: str) -> None:
    with pytest.raises(ValueError, match="exactly one"):
        store.txn([Compare(key=prefix + "a")], [])


def test_only_one_of_many_racing_txns_wins(store: Store, prefix: str) -> None:
    won: list[int] = []

    def race(me: int) -> None:
        done = store.txn([Compare(key=prefix + "a", create_revision=0)], [Put(key=prefix + "a", value=str(me))])
        if done.succeeded:
            won.append(me)

    threads = [threading.Thread(target=race, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    found = store.get(prefix + "a")
    assert found is not None
    assert won == [int(found.value)]


def test_keys_go_with_their_revoked_lease(store: Store, prefix: str) -> None:
    lease = store.grant(60)
    store.put(prefix + "a", "1", lease)
    store.txn([], [Put(key=prefix + "b", value="1", lease=lease), Put(key=prefix + "stays", value="1")])
    found = store.get(prefix + "a")
    assert found is not None
    assert found.lease == lease
    store.revoke(lease)
    assert [entry.key for entry in store.snapshot(prefix).entries] == [prefix + "stays"]


def test_a_key_put_without_its_lease_stays(store: Store, prefix: str) -> None:
    lease = store.grant(60)
    store.put(prefix + "a", "1", lease)
    store.put(prefix + "a", "2")
    store.revoke(lease)
    assert store.get(prefix + "a") is not None


def test_keys_go_when_the_lease_expires(store: Store, prefix: str) -> None:
    lease = store.grant(1)
    revision = store.put(prefix + "a", "1", lease)
    started = time.monotonic()
    watch = store.watch(prefix, revision)
    [gone] = take(watch, 1)
    watch.close()
    assert [(change.key, change.entry) for change in gone.changes] == [(prefix + "a", None)]
    assert 0.8 < time.monotonic() - started < 5.0
    with pytest.raises(LeaseLost):
        store.keepalive(lease)


def test_keepalive_keeps_a_lease(store: Store, prefix: str) -> None:
    lease = store.grant(2)
    store.put(prefix + "a", "1", lease)
    end = time.monotonic() + 3.0
    while time.monotonic() < end:
        assert 0 < store.keepalive(lease) <= 2
        time.sleep(0.2)  # the period of the keepalives, not a wait for something
    assert store.get(prefix + "a") is not None


def test_a_missing_lease_is_lost(store: Store, prefix: str) -> None:
    lease = store.grant(60)
    store.revoke(lease)
    store.revoke(lease)  # a second time is no error
    with pytest.raises(LeaseLost):
        store.keepalive(lease)
    with pytest.raises(LeaseLost):
        store.put(prefix + "a", "1", lease)
    with pytest.raises(LeaseLost):
        store.txn([], [Put(key=prefix + "b", value="1"), Put(key=prefix + "a", value="1", lease=lease)])
    assert store.snapshot(prefix).entries == ()


def test_watch_sees_the_past_and_the_present_in_order(store: Store, prefix: str) -> None:
    before = store.put(prefix + "a", "0")
    revisions = [store.put(prefix + "a", str(i)) for i in range(1, 4)]
    watch = store.watch(prefix, before)
    seen = take(watch, 3)
    store.put(prefix[:-1] + "0", "beside the prefix")
    revisions.append(store.put(prefix + "b", "4"))
    seen += take(watch, 1)
    watch.close()
    assert [changes.revision for changes in seen] == revisions
    values = [change.entry.value for changes in seen for change in changes.changes if change.entry is not None]
    assert values == ["1", "2", "3", "4"]


def test_watch_entries_carry_their_revisions_and_lease(store: Store, prefix: str) -> None:
    lease = store.grant(60)
    created = store.put(prefix + "a", "1", lease)
    watch = store.watch(prefix, created - 1)
    [changes] = take(watch, 1)
    watch.close()
    assert changes.changes[0].entry == store.get(prefix + "a")
    store.revoke(lease)


def test_watch_gives_a_txn_as_one_revision(store: Store, prefix: str) -> None:
    before = store.put(prefix + "a", "1")
    done = store.txn([], [Put(key=prefix + "b", value="1"), Delete(key=prefix + "a")])
    watch = store.watch(prefix, before)
    [changes] = take(watch, 1)
    watch.close()
    assert changes.revision == done.revision
    assert [(c.key, c.entry is None) for c in changes.changes] == [(prefix + "b", False), (prefix + "a", True)]


def test_a_quiet_watch_gives_signs_of_life(store: Store, prefix: str) -> None:
    revision = store.put(prefix + "a", "1")
    watch = store.watch(prefix, revision)
    started = time.monotonic()
    sign = next(iter(watch))
    watch.close()
    assert sign.changes == ()
    assert sign.revision >= revision
    assert time.monotonic() - started < 5.0


def test_watch_resumes_where_another_left_off(store: Store, prefix: str) -> None:
    first = store.put(prefix + "a", "1")
    watch = store.watch(prefix, first - 1)
    [seen] = take(watch, 1)
    watch.close()
    later = [store.put(prefix + "a", str(i)) for i in range(2, 5)]
    watch = store.watch(prefix, seen.revision)
    assert [changes.revision for changes in take(watch, 3)] == later
    watch.close()


def test_watch_from_before_a_compaction_raises(backend: Backend, prefix: str) -> None:
    store = backend.store
    first = store.put(prefix + "a", "1")
    for i in range(3):
        last = store.put(prefix + "a", str(i))
    backend.compact(last)
    with pytest.raises(Compacted):
        take(store.watch(prefix, first), 1)
    after = store.put(prefix + "a", "after")
    watch = store.watch(prefix, last)
    assert [changes.revision for changes in take(watch, 1)] == [after]
    watch.close()


def test_close_from_another_thread_ends_a_watch(store: Store, prefix: str) -> None:
    watch = store.watch(prefix, store.put(prefix + "a", "1"))
    ended = threading.Event()

    def follow() -> None:
        for _changes in watch:
            pass
        ended.set()

    thread = threading.Thread(target=follow)
    thread.start()
    started = time.monotonic()
    watch.close()
    assert ended.wait(5.0)
    assert time.monotonic() - started < 0.5
    thread.join()
    assert list(watch) == []


def test_closing_the_store_ends_its_watches_and_calls(backend: Backend, prefix: str) -> None:
    store = backend.new_store()
    watch = store.watch(prefix, store.put(prefix + "a", "1"))
    ended = threading.Event()

    def follow() -> None:
        for _changes in watch:
            pass
        ended.set()

    thread = threading.Thread(target=follow)
    thread.start()
    store.close()
    assert ended.wait(5.0)
    thread.join()
    with pytest.raises(StoreUnavailable):
        store.get(prefix + "a")
    store.close()  # a second time is no error


# --- What only the store in memory has: its switches ---


def test_memory_outage_loses_no_change() -> None:
    store = MemoryStore()
    revision = store.put("/a", "1")
    watch = store.watch("/", revision)
    store.put("/a", "2")
    store.fail()
    for call in (lambda: store.get("/a"), lambda: store.put("/a", "x"), lambda: store.txn([], [])):
        with pytest.raises(StoreUnavailable):
            call()
    assert watch.pending() == []
    store.heal()
    store.put("/a", "3")
    values = [change.entry.value for changes in watch.pending() for change in changes.changes if change.entry]
    assert values == ["2", "3"]


def test_memory_leases_run_on_the_given_clock_and_start_again_after_an_outage() -> None:
    now = 100.0
    store = MemoryStore(clock=lambda: now)
    watch = store.watch("/", 1)
    lease = store.grant(5)
    store.put("/a", "1", lease)
    now += 4.9
    store.fail()
    now += 60.0
    store.heal()
    now += 4.9
    store.tick()
    assert len(watch.pending()) == 1
    now += 0.2
    store.tick()
    assert [change.entry for changes in watch.pending() for change in changes.changes] == [None]


def test_memory_lost_answer_means_that_the_write_happened() -> None:
    store = MemoryStore()
    store.lose_next_answer()
    with pytest.raises(StoreUnavailable):
        store.txn([Compare(key="/a", create_revision=0)], [Put(key="/a", value="1")])
    assert store.get("/a") is not None
