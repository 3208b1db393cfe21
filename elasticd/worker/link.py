"""The training process's connection to its daemon. It serves training, and never holds it up.

Two daemon threads, one that reads and one that writes, so that a slow or dead daemon costs the step nothing: what is to
be said is handed over under a lock, step reports are folded into one when they come faster than they may be sent (in
constant memory, however long the daemon does not read), and once the connection is lost everything that is posted is
dropped. There is no way back to a daemon that died: its workers die with it.

Not here: what a boundary or a lost fence means to training (session.py).
"""

from __future__ import annotations

import contextlib
import logging
import queue
import socket
import threading
import time
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field

from elasticd.channel import Channel, Message
from elasticd.core.memory import Need
from elasticd.errors import ChannelClosed, ProtocolError

log = logging.getLogger(__name__)

#: Each wakes a thread here and the daemon there. Nothing is lost between: what a report says is folded (Folded).
MAX_REPORTS_PER_S = 2.0
#: How often the daemon hears that a script is between two steps, so that it does not take it for stuck in one.
PAUSE_REPORT_S = 10.0


@dataclass(frozen=True, slots=True, kw_only=True)
class StepReport:
    """A completed step. ``step`` counts completed steps: the first one is 1."""

    step: int
    seconds: float
    wait_seconds: float
    samples: int
    sent_bytes: int
    metrics: Mapping[str, float]


@dataclass(slots=True)
class Folded:
    """What several reports say together: the latest step and metrics, mean seconds, all the samples and bytes."""

    steps: int = 0
    step: int = 0
    seconds: float = 0.0
    wait_seconds: float = 0.0
    samples: int = 0
    sent_bytes: int = 0
    metrics: Mapping[str, float] = field(default_factory=dict)

    def add(self, report: StepReport) -> None:
        self.steps += 1
        self.step, self.metrics = report.step, report.metrics
        self.seconds += report.seconds
        self.wait_seconds += report.wait_seconds
        self.samples += report.samples
        self.sent_bytes += report.sent_bytes

    def message(self, round_number: int) -> Message:
        return {
            "type": "step",
            "round": round_number,
            "step": self.step,
            "steps": self.steps,
            "seconds": self.seconds / self.steps,
            "wait_seconds": self.wait_seconds / self.steps,
            "samples": self.samples,
            "sent_bytes": self.sent_bytes,
            "metrics": dict(self.metrics),
        }


class DaemonLink:
    """ChannelClosed from the constructor when nobody listens at ``path``."""

    def __init__(self, path: str, hello: Message) -> None:
        reader = Channel.connect(path)
        # Two ends of one socket: Channel is for one thread each, and both stay blocking.
        self._socket = socket.socket(fileno=socket.dup(reader.fileno()))
        #: Whether a step is under way. Set by the training thread, without a lock: it costs the step nothing.
        self.in_step = False
        self._round_number = int(hello["round"])
        self._stop_need = Need.NOTHING
        self._refusal = ""
        self._closed = threading.Event()
        self._drained = threading.Event()
        self._ready = threading.Condition()
        self._outbox: deque[Message] = deque([hello])
        self._reports = Folded()
        self._closing = False
        self._next_report_at = 0.0
        self._asked: dict[int, queue.SimpleQueue[Message | None]] = {}
        self._last_id = 0
        for target, channel in ((self._read, reader), (self._write, Channel(self._socket))):
            threading.Thread(target=target, args=(channel,), name="elasticd-link", daemon=True).start()

    @property
    def stop_need(self) -> Need:
        """What the daemon asks of the state at a stop at the next common step boundary; NOTHING: for no stop."""
        return self._stop_need

    @property
    def refusal(self) -> str:
        """Why a commit of this round was refused; empty while none was."""
        return self._refusal

    def report(self, report: StepReport) -> None:
        with self._ready:
            if not self._closed.is_set():
                self._reports.add(report)
                if self._reports.steps == 1:  # otherwise the writer waits for its time already: leave it asleep
                    self._ready.notify()

    def post(self, message: Message) -> None:
        """Say something of this round. Returns at once."""
        with self._ready:
            if not self._closed.is_set():
                self._outbox.append({**message, "round": self._round_number})
                self._ready.notify()

    def request(self, message: Message, timeout_s: float) -> Message:
        """Ask, and wait for the answer, in any thread. ChannelClosed when none came."""
        answers: queue.SimpleQueue[Message | None] = queue.SimpleQueue()
        with self._ready:
            if self._closed.is_set():
                raise ChannelClosed("the daemon is gone")
            self._last_id += 1
            number = self._last_id
            self._asked[number] = answers
            self._outbox.append({**message, "id": number, "round": self._round_number})
            self._ready.notify()
        try:
            answer = answers.get(timeout=timeout_s)
        except queue.Empty:
            raise ChannelClosed(f"the daemon has not answered for {timeout_s:g} s") from None
        finally:
            with self._ready:
                self._asked.pop(number, None)
        if answer is None:
            raise ChannelClosed("the daemon is gone")
        return answer

    def wait_closed(self, timeout_s: float | None = None) -> bool:
        """Wait until the daemon is gone. Whether it is."""
        return self._closed.wait(timeout_s)

    def close(self, timeout_s: float = 1.0) -> None:
        """Send what is left, within the time-out, and hang up."""
        with self._ready:
            self._closing = True
            self._ready.notify()
        self._drained.wait(timeout_s)
        self._hang_up()

    def _read(self, channel: Channel) -> None:
        try:
            while True:
                message = channel.receive()
                if message is not None:
                    self._receive(message)
        except (ChannelClosed, ProtocolError) as error:
            if not self._closing:
                log.warning("elasticd: the connection to the daemon is lost (%s); training goes on", error)
        finally:
            self._hang_up()

    def _receive(self, message: Message) -> None:
        if message["type"] == "boundary_wanted" and message.get("round") == self._round_number:
            self._stop_need = Need(message.get("need", Need.DISK))
        elif message.get("committed") is False or message.get("stands") is False:  # of a commit, or of the fence
            self._refusal = str(message.get("reason") or "a newer round stands")
        with self._ready:
            asked = self._asked.get(message.get("id", 0))
        if asked is not None:
            asked.put(message)

    def _write(self, channel: Channel) -> None:
        try:
            while (message := self._next_message()) is not None:
                channel.send(message)
        except (ChannelClosed, ProtocolError):
            self._hang_up()
        finally:
            self._drained.set()

    def _next_message(self) -> Message | None:
        """Wait for something that may be sent now; None at the end. Reports go before other posts."""
        pause_at = time.monotonic() + PAUSE_REPORT_S
        with self._ready:
            while True:
                now = time.monotonic()
                report_at = now if self._outbox or self._closing else self._next_report_at
                if self._reports.steps and report_at <= now and not self._hello_pending:
                    return self._take_reports()
                if self._outbox:
                    return self._outbox.popleft()
                if self._closing or self._closed.is_set():
                    return None
                if pause_at <= now:
                    if not self.in_step:
                        return {"type": "pause", "round": self._round_number}
                    pause_at = now + PAUSE_REPORT_S
                self._ready.wait((report_at if self._reports.steps else pause_at) - now)

    @property
    def _hello_pending(self) -> bool:
        return bool(self._outbox) and self._outbox[0]["type"] == "worker_hello"

    def _take_reports(self) -> Message:
        reports, self._reports = self._reports, Folded()
        self._next_report_at = time.monotonic() + 1.0 / MAX_REPORTS_PER_S
        return reports.message(self._round_number)

    def _hang_up(self) -> None:
        self._closed.set()
        with contextlib.suppress(OSError):  # hung up already
            self._socket.shutdown(socket.SHUT_RDWR)
        with self._ready:
            self._reports = Folded()
            self._outbox.clear()
            for answers in self._asked.values():
                answers.put(None)
            self._ready.notify()
