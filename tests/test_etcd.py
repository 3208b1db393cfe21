"""What only a real etcd shows: members that die, hang and come back. Logins: test_etcd_logins.py."""

from __future__ import annotations

import shutil
import threading
import time
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path

import pytest
from etcd_follower import PREFIX, Follower, patiently, until

from elasticd.cluster.embedded import EmbeddedEtcd
from elasticd.cluster.etcd import EtcdStore
from elasticd.cluster.store import Compare, Put
from elasticd.errors import Compacted, StoreUnavailable
from elasticd.testing.etcd_cluster import EtcdCluster

_keys = count()


@pytest.fixture(scope="module")
def running_cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EtcdCluster]:
    with EtcdCluster(tmp_path_factory.mktemp("cluster"), heartbeat_ms=50, election_ms=500) as cluster:
        yield cluster


@pytest.fixture
def cluster(running_cluster: EtcdCluster) -> Iterator[EtcdCluster]:
    running_cluster.heal()
    yield running_cluster
    running_cluster.heal()


@pytest.fixture
def store(cluster: EtcdCluster) -> Iterator[EtcdStore]:
    store = EtcdStore(cluster.endpoints)
    yield store
    store.close()


@pytest.fixture
def key() -> str:
    return f"{PREFIX}{next(_keys)}/k"


def on(store: EtcdStore, cluster: EtcdCluster, *, leader: bool) -> int:
    """Turns the store to the leader, or to a follower; that member's index."""
    leading = cluster.leader()
    wanted = leading if leader else (leading + 1) % 3
    link = store._link
    while cluster.index_of(store.current_endpoint) != wanted:
        link.leave(link.current)
    store.get(PREFIX)
    assert cluster.index_of(store.current_endpoint) == wanted
    return wanted


# --- Members that die or hang ---


@pytest.mark.parametrize("leader", [False, True], ids=["follower", "leader"])
def test_a_killed_member_costs_no_call(cluster: EtcdCluster, store: EtcdStore, key: str, leader: bool) -> None:
    store.put(key, "before")
    cluster.kill(on(store, cluster, leader=leader))
    started = time.monotonic()
    store.put(key, "after")
    took_s = time.monotonic() - started
    found = store.get(key)
    assert found is not None
    assert found.value == "after"
    assert took_s < (3.0 if leader else 1.0)


@pytest.mark.parametrize("leader", [False, True], ids=["follower", "leader"])
def test_a_hung_member_costs_one_timeout(cluster: EtcdCluster, store: EtcdStore, key: str, leader: bool) -> None:
    cluster.pause(on(store, cluster, leader=leader))
    started = time.monotonic()
    store.put(key, "1")
    assert time.monotonic() - started < 3.0


def test_txn_on_a_member_that_hung_long_ago_is_no_gamble(cluster: EtcdCluster, store: EtcdStore, key: str) -> None:
    member = on(store, cluster, leader=False)
    cluster.pause(member)
    store._link.current.answered_at -= 10.0
    assert store.txn([Compare(key=key, create_revision=0)], [Put(key=key, value="1")]).succeeded


def test_txn_is_not_repeated_after_a_deadline(cluster: EtcdCluster, store: EtcdStore, key: str) -> None:
    member = on(store, cluster, leader=False)
    cluster.pause(member)
    store._link.current.answered_at = time.monotonic()
    with pytest.raises(StoreUnavailable):
        store.txn([Compare(key=key, create_revision=0)], [Put(key=key, value="1")])
    # The member that hangs may still do it; had it been repeated on another one, the key would be there now.
    assert cluster.index_of(store.current_endpoint) != member
    assert store.get(key) is None


def test_txn_goes_through_when_its_member_was_killed_before(cluster: EtcdCluster, store: EtcdStore, key: str) -> None:
    member = on(store, cluster, leader=False)
    cluster.kill(member)
    patiently(lambda: store.txn([Compare(key=key, mod_revision=0)], [Put(key=key, value="1")]))
    assert store.get(key) is not None


def test_a_lease_outlives_its_member(cluster: EtcdCluster, store: EtcdStore, key: str) -> None:
    lease = store.grant(5)
    store.put(key, "1", lease)
    cluster.kill(on(store, cluster, leader=True))
    assert patiently(lambda: store.keepalive(lease)) > 0
    assert store.get(key) is not None


def test_without_quorum_nobody_answers(cluster: EtcdCluster, key: str) -> None:
    store = EtcdStore(cluster.endpoints, call_timeout_s=0.4)
    revision = store.put(key, "1")
    follower = Follower(store, key, revision)
    left = on(store, cluster, leader=False)
    for index in {0, 1, 2} - {left}:
        cluster.kill(index)
    started = time.monotonic()
    for call in (lambda: store.get(key), lambda: store.txn([], [Put(key=key, value="x")])):
        with pytest.raises(StoreUnavailable):
            call()
    assert time.monotonic() - started < 8.0
    silent = follower.signs
    with pytest.raises(StoreUnavailable):
        store.get(key)
    assert follower.signs == silent
    cluster.heal()
    patiently(lambda: store.put(key, "2"))
    until(lambda: follower.values and follower.values[-1] == "2")
    follower.close()
    store.close()


# --- Watches ---


def changed_while(store: EtcdStore, key: str, follower: Follower, disturb: Callable[[], None]) -> None:
    """Writes numbers before, during and after the disturbance; the watch must show each revision once, in order."""
    written: list[int] = []
    stop = threading.Event()

    def write() -> None:
        number = 0
        while not stop.is_set():
            revision = patiently(lambda n=number: store.put(key, str(n)))
            written.append(revision)
            number += 1
            stop.wait(0.005)

    writer = threading.Thread(target=write)
    writer.start()
    try:
        until(lambda: len(follower.seen) > 20)
        disturb()
        after = len(written)
        until(lambda: len(written) > after + 50)
    finally:
        stop.set()
        writer.join()
    until(lambda: follower.seen and follower.seen[-1].revision >= written[-1])
    revisions = [changes.revision for changes in follower.seen]
    assert revisions == sorted(set(revisions)), "doubled or out of order"
    missing = set(written) - set(revisions)
    assert not missing
    # A put that was repeated has revisions that its caller never saw; nothing else may be there.
    assert len(revisions) - len(written) <= 5
    assert follower.error is None


@pytest.mark.parametrize("fault", ["kill follower", "kill leader", "pause follower", "pause leader"])
def test_watch_moves_on_and_misses_nothing(cluster: EtcdCluster, store: EtcdStore, key: str, fault: str) -> None:
    verb, _, role = fault.partition(" ")
    member = on(store, cluster, leader=role == "leader")
    other = EtcdStore(cluster.endpoints)
    follower = Follower(store, key, store.put(key, "start"))
    until(lambda: follower.signs)
    changed_while(other, key, follower, lambda: getattr(cluster, verb)(member))
    follower.close()
    other.close()


def test_a_quiet_watch_wakes_nobody(cluster: EtcdCluster, store: EtcdStore, key: str) -> None:
    """Only its probe, once a second, and the core's threads: grpc's waiting for a stream looks up ten times a second."""
    follower = Follower(store, key, store.put(key, "start"))
    until(lambda: follower.signs)
    (reader,) = [thread for thread in threading.enumerate() if thread.name == "etcd-watch"]
    before = switches(reader)
    time.sleep(2.0)  # the window
    assert switches(reader) - before <= 4
    other = store.put(key, "and it is heard")
    until(lambda: follower.seen and follower.seen[-1].revision == other)
    follower.close()


def switches(thread: threading.Thread) -> int:
    """How often it has waited so far."""
    status = Path(f"/proc/self/task/{thread.native_id}/status").read_text()
    return int(status.partition("\nvoluntary_ctxt_switches:")[2].split()[0])


def test_all_members_down_and_back(cluster: EtcdCluster, store: EtcdStore, key: str) -> None:
    follower = Follower(store, key, store.put(key, "start"))

    def outage() -> None:
        cluster.kill_all()
        with pytest.raises(StoreUnavailable):
            store.get(key)
        time.sleep(2.0)  # the length of the outage: back-off must grow, and not matter
        cluster.start_all()

    changed_while(store, key, follower, outage)
    follower.close()


def test_an_emptied_store_is_told_as_compacted(tmp_path: Path) -> None:
    with EmbeddedEtcd(tmp_path / "data") as etcd:
        store = EtcdStore([etcd.endpoint])
        for i in range(10):
            revision = store.put(PREFIX, str(i))
        follower = Follower(store, PREFIX, revision)
        follower.next_sign()
        etcd.process.kill()
        shutil.rmtree(tmp_path / "data")
        etcd.restart()
        assert isinstance(until(lambda: follower.error), Compacted)
        store.close()


def test_credentials_for_an_etcd_without_logins_do_no_harm(cluster: EtcdCluster, key: str) -> None:
    store = EtcdStore(cluster.endpoints, credentials=("elasticd", "secret"))
    store.put(key, "1")
    assert store.get(key) is not None
    store.close()
