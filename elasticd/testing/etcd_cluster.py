"""A real etcd cluster on one machine whose members can be killed, paused, stopped and started again.

Not here: how one member runs (cluster/embedded.py).
"""

from __future__ import annotations

import signal
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

from elasticd.cluster.embedded import EtcdProcess, MemberSpec, PortInUse, free_port
from elasticd.cluster.etcd_link import Member, rpc_of
from elasticd.cluster.quiet_grpc import grpc

_PORT_TRIES = 5
_STATUS = rpc_of("Maintenance", "Status")


class EtcdCluster:
    """Members ``0 .. members-1`` under ``data_dir``; their data is kept over kills and restarts.

    ``hosts``: one address a member (default: all on loopback). ``command_prefixes``: one a member, such as
    ``["ip", "netns", "exec", NAME]``. Heartbeat and election default to etcd's own (100 ms, 1 s), so that a lost leader
    costs what it costs in production; 10 and 100 make a quick cluster.
    """

    def __init__(
        self,
        data_dir: Path,
        *,
        members: int = 3,
        hosts: Sequence[str] = (),
        command_prefixes: Sequence[Sequence[str]] = (),
        heartbeat_ms: int = 100,
        election_ms: int = 1000,
    ) -> None:
        self._data_dir = data_dir
        self._hosts = tuple(hosts) or ("127.0.0.1",) * members
        self._prefixes = tuple(command_prefixes) or ((),) * members
        self._timing = (heartbeat_ms, election_ms)
        self._members: list[EtcdProcess] = []

    @property
    def endpoints(self) -> list[str]:
        return [member.spec.endpoint for member in self._members]

    def pid(self, index: int) -> int:
        return self._members[index].pid

    def index_of(self, target: str) -> int:
        """The member that serves ``host:port``, such as EtcdStore.current_endpoint."""
        return next(i for i, endpoint in enumerate(self.endpoints) if endpoint.endswith("//" + target))

    def kill(self, index: int) -> None:
        """SIGKILL, like a crash of the host."""
        self._members[index].kill()

    def pause(self, index: int) -> None:
        """SIGSTOP: it hangs, its connections stay open. Returns once every thread of it has stopped: on a busy machine
        one may still serve a request after the signal was sent.
        """
        self._members[index].signal(signal.SIGSTOP)
        tasks = Path(f"/proc/{self._members[index].pid}/task")
        while any(_state(task) not in "TXZ" for task in tasks.iterdir()):
            time.sleep(0.001)

    def resume(self, index: int) -> None:
        self._members[index].signal(signal.SIGCONT)

    def restart(self, index: int) -> None:
        """Starts a killed or stopped member on its old data, and waits until it serves."""
        self._members[index].start()
        self._members[index].wait_ready()

    def kill_all(self) -> None:
        for member in self._members:
            member.kill()

    def stop_all(self) -> None:
        """All at once: one after the other, each would first hand its leadership over."""
        for member in self._members:
            member.signal(signal.SIGCONT)
            member.signal(signal.SIGTERM)
        for member in self._members:
            member.stop()

    def start_all(self) -> None:
        for member in self._members:
            member.start()
        for member in self._members:
            member.wait_ready()

    def heal(self) -> None:
        """Whatever was done to them: all members run and serve."""
        for member in self._members:
            if member.running:
                member.signal(signal.SIGCONT)
            else:
                member.kill()  # forgets one that ended by itself
                member.start()
        for member in self._members:
            member.wait_ready()

    def leader(self, timeout_s: float = 10.0) -> int:
        """The index of the leader, once there is one."""
        deadline_s = time.monotonic() + timeout_s
        while time.monotonic() < deadline_s:
            for index, member in enumerate(self._members):
                if self._leads(member):
                    return index
            time.sleep(0.02)
        raise TimeoutError(f"no etcd leader in {timeout_s:g} s")

    @staticmethod
    def _leads(process: EtcdProcess) -> bool:
        """Asked on a channel of its own, without TLS or a login: a member that is down just does not lead."""
        member = Member(f"{process.spec.host}:{process.spec.client_port}", None)
        try:
            status = member.start(_STATUS, _STATUS.request(), timeout=0.5)
        except grpc.RpcError:
            return False
        finally:
            member.close()
        return bool(status.leader and status.leader == status.header.member_id)

    def __enter__(self) -> EtcdCluster:
        for attempt in range(_PORT_TRIES):
            self._members = [EtcdProcess(spec) for spec in self._specs()]
            try:
                self.start_all()
            except PortInUse:
                self._kill_and_forget()
                if attempt + 1 == _PORT_TRIES:
                    raise
            except BaseException:
                self.kill_all()
                raise
            else:
                break
        return self

    def _kill_and_forget(self) -> None:
        """Nothing was stored yet under the ports that turned out to be taken."""
        self.kill_all()
        self._data_dir = self._data_dir.with_name(self._data_dir.name + "_")

    def _specs(self) -> list[MemberSpec]:
        heartbeat_ms, election_ms = self._timing
        names = [f"m{index}" for index in range(len(self._hosts))]
        ports = [(free_port(), free_port()) for _ in names]
        cluster = ",".join(
            f"{name}=http://{host}:{peer}"
            for name, host, (_client, peer) in zip(names, self._hosts, ports, strict=True)
        )
        return [
            MemberSpec(
                name=name,
                data_dir=self._data_dir / name,
                host=host,
                client_port=client,
                peer_port=peer,
                cluster=cluster,
                heartbeat_ms=heartbeat_ms,
                election_ms=election_ms,
                command_prefix=tuple(prefix),
            )
            for name, host, prefix, (client, peer) in zip(names, self._hosts, self._prefixes, ports, strict=True)
        ]

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.kill_all()


def _state(task: Path) -> str:
    """Of a thread, as proc(5) has it: T for stopped; X or Z for one that has ended."""
    try:
        return (task / "stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return "X"
