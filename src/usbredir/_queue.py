"""The output queue: packets wait here until the transport takes them.

Any thread may put packets in; one thread at a time takes them out. The application's lock is held only for
moments, never while its write callback runs, so a slow write blocks no sender and a callback may send.

Taking a packet in or out costs the same however many wait (the original walks its list to the end).
"""

from __future__ import annotations

import contextlib
import threading
from collections import deque
from collections.abc import Callable, Sequence
from itertools import islice

from ._layout import Large
from .errors import QueueFullError
from .limits import Limits
from .locking import Guard

__all__ = ["Entry", "OutputQueue"]

Entry = bytes | Large
"""One packet: its bytes, or header and payload where the payload is too large to be copied. len() is its size."""

BATCH_BUFFERS = 512
"""Buffers per vectored write; systems refuse more than 1024."""
BATCH_BYTES = 1024 * 1024
"""Bytes per vectored write; more than a socket takes at once anyway."""
LEAST_ROOM = 4096
"""Bytes per vectored write to a transport that takes little at a time: what it does not take is joined in vain."""
MOST_PACKETS = 4096
"""Packets gathered for one vectored write."""


class OutputQueue:
    """FIFO of finished packets.

    Threads: push, size and how many wait: any number of callers; flush: any number, one of them writes;
    entries and replace: one caller, nothing else going on.
    """

    __slots__ = (
        "_again",
        "_alone",
        "_bytes_in",
        "_bytes_out",
        "_counting",
        "_drain",
        "_guard",
        "_limits",
        "_owned",
        "_room",
        "_sent",
        "_turn",
        "_write",
        "_writer",
        "_writev",
        "flush",
        "push",
        "waiting",
    )

    def __init__(
        self,
        guard: Guard,
        limits: Limits,
        write: Callable[[memoryview], int | None],
        writev: Callable[[Sequence[memoryview]], int | None] | None,
        *,
        owned: bool,
    ) -> None:
        self._guard = guard.section()
        self._limits = limits
        limited = limits.max_queued_packets is not None or limits.max_queued_bytes is not None
        self._counting = limited
        self._write = write
        self._writev = writev
        self._owned = owned
        self.waiting: deque[Entry] = deque()
        """All that is queued, always the same object: for those who often ask how many there are."""
        self._sent = 0  # bytes of the first entry that are written
        # Two counters, each with one kind of writer, so that taking packets out needs no lock.
        self._bytes_in = 0
        self._bytes_out = 0
        self._room = BATCH_BYTES  # bytes for the next vectored write: about twice what the transport took last
        self._turn: deque[None] = deque((None,))  # empty while a thread writes; only with locks
        self._writer: int | None = None
        self._again = False
        # Chosen beforehand: asking for lock and limits again at every packet takes 200 of the 700 ns that queueing and
        # writing a small packet take, and counting its bytes 70.
        self.push: Callable[[Entry], None] = self.waiting.append
        """Append a packet. Raises QueueFullError at a limit."""
        if limited:
            self.push = self._push_limited
        elif guard.active:
            self.push = self._push_locked
        self._alone = not guard.active
        self.flush: Callable[[], None] = self._flush_guarded if guard.active else self._flush
        """Write until the queue is empty or the transport would block; see :meth:`_flush_guarded`."""
        self._drain: Callable[[], bool] = self._drain_single if writev is None else self._drain_vectored
        """Write packets. True: the transport would block."""

    @property
    def size(self) -> int:
        """Bytes queued; a packet that is partly written counts in full. Without :meth:`count` 10 ns per packet."""
        if not self._counting:
            return sum(map(len, self.waiting.copy()))
        out = self._bytes_out  # read first: what comes in between only makes the answer larger
        return self._bytes_in - out

    def exceeds(self, packets: int, size: int) -> bool:
        """Whether more than so many packets, or bytes, wait. Only after :meth:`count`."""
        return len(self.waiting) > packets or self._bytes_in - self._bytes_out > size

    def count(self) -> None:
        """Count bytes as they come from now on. For one that often asks; before others use the queue."""
        if not self._counting:
            self._bytes_in, self._bytes_out = self.size, 0
            self._counting = True
            self.push = self._push_counted if self._alone else self.push_unlimited

    def push_unlimited(self, entry: Entry) -> None:
        """Append a packet that the peer waits for, whatever the limits."""
        with self._guard:
            self.waiting.append(entry)
            self._bytes_in += len(entry)

    def _push_locked(self, entry: Entry) -> None:
        with self._guard:
            self.waiting.append(entry)

    def _push_counted(self, entry: Entry) -> None:
        self.waiting.append(entry)
        self._bytes_in += len(entry)

    def _push_limited(self, entry: Entry) -> None:
        with self._guard:
            self._check_room(len(entry))
            self.waiting.append(entry)
            self._bytes_in += len(entry)

    def _check_room(self, size: int) -> None:
        packets, total = self._limits.max_queued_packets, self._limits.max_queued_bytes
        if packets is not None and len(self.waiting) >= packets:
            raise QueueFullError(
                f"{packets} packets wait to be written, the limit: write them, then send again", reason="queue_full"
            )
        if total is not None and self.size + size > total:
            raise QueueFullError(
                f"{self.size} bytes wait to be written, with this packet more than the limit of {total}: "
                "write them, then send again",
                reason="queue_full",
            )

    # ------------------------------------------------------------ writing

    def _flush(self) -> None:
        """For one thread: a call from inside the write callback does nothing."""
        if self._writer is not None:
            return
        self._writer = 0
        try:
            self._drain()
        finally:
            self._writer = None

    def _flush_guarded(self) -> None:
        """For any number of threads: one of them writes.

        A call from another thread meanwhile makes the writer look again before it returns; a call from inside the
        write callback does nothing. An exception of the callback passes through, nothing is lost.

        Who writes has the only item of a deque, which is one step to take or give back: two sections under the
        application's lock take 400 ns more for each call.
        """
        entries, turn, me = self.waiting, self._turn, threading.get_ident()
        told = False
        while entries:  # what another thread is writing is among them until it is written
            try:
                turn.pop()
            except IndexError:
                if told or self._writer == me:
                    return  # who has it looks at _again when it is back
                self._again = told = True
                continue
            except BaseException:  # a signal handler's: they run as pop returns
                turn.append(None)
                raise
            self._again = told = False
            self._writer = me
            try:
                blocked = self._drain()
            finally:
                self._writer = None
                turn.append(None)
            if blocked and not self._again:
                return

    def _drain_single(self) -> bool:
        """One write call per buffer, as in the original."""
        entries, write = self.waiting, self._write
        while entries:
            entry = entries[0]
            if isinstance(entry, bytes) and not self._sent:
                count = write(memoryview(entry))
                if count == len(entry):  # the usual case, without the general steps below: 300 ns less
                    entries.popleft()
                    self._bytes_out += count
                    continue
                offered = len(entry)
            else:
                buffer = self._rest(entry)
                offered = len(buffer)
                count = write(buffer)
            if not count:
                return True
            self._check_count(count, offered)
            self._advance(count)
        return False

    def _rest(self, entry: Entry) -> memoryview:
        """The unwritten bytes of the first packet, or of its header, where that is a buffer of its own."""
        if isinstance(entry, bytes):
            return memoryview(entry)[self._sent :]
        header, payload = entry.parts
        if self._sent < len(header):
            return memoryview(header)[self._sent :]
        return memoryview(payload)[self._sent - len(header) :]

    def _drain_vectored(self) -> bool:
        """Many packets per call."""
        entries, writev = self.waiting, self._writev
        assert writev is not None
        while entries:
            if len(entries) == 1 and not self._sent:
                # A single packet needs none of what follows: 500 ns less.
                entry = entries[0]
                offered = len(entry)
                if isinstance(entry, bytes):
                    count = writev((memoryview(entry),))
                else:
                    header, payload = entry.parts
                    count = writev((memoryview(header), memoryview(payload)))
                if count == offered:
                    entries.popleft()
                    self._bytes_out += offered
                    continue
                batch: Sequence[Entry] = ()
            else:
                batch, buffers, offered = self._batch()
                count = writev(buffers)
            if count == offered:
                if self._alone and len(entries) == len(batch):
                    entries.clear()  # 20 ns less for each
                else:
                    for _ in batch:
                        entries.popleft()
                self._bytes_out += count + self._sent
                self._sent = 0
                self._room = min(2 * self._room, BATCH_BYTES)
                continue
            if not count:
                return True
            self._check_count(count, offered)
            self._advance(count)
            self._room = max(2 * count, LEAST_ROOM)
        return False

    def _batch(self) -> tuple[Sequence[Entry], Sequence[memoryview], int]:
        """Some of the first packets, their buffers, and how many bytes those have."""
        entries, room, sent = self.waiting, self._room, self._sent
        with self._guard:
            batch = list(islice(entries, MOST_PACKETS))
            everything = len(batch) == len(entries) and sum(map(len, batch)) <= room
        if everything:
            with contextlib.suppress(TypeError):  # a large payload among them
                joined = memoryview(b"".join(batch))[sent:]  # type: ignore[arg-type]
                return batch, (joined,), len(joined)
        return self._gather(batch, room, sent)

    def _gather(self, batch: list[Entry], room: int, sent: int) -> tuple[Sequence[Entry], Sequence[memoryview], int]:
        """Runs of small packets joined, large payloads by reference, up to about *room* bytes."""
        buffers: list[memoryview] = []
        run: list[bytes] = []
        total = -sent
        taken = 0
        for entry in batch:
            taken += 1
            if isinstance(entry, bytes):
                run.append(entry)
                total += len(entry)
            else:
                header, payload = entry.parts
                run.append(header)
                buffers += (memoryview(b"".join(run)), memoryview(payload))
                run = []
                total += len(entry)
            if total >= room or len(buffers) >= BATCH_BUFFERS:
                break
        if run:
            buffers.append(memoryview(b"".join(run)))
        return batch[:taken], _skip(buffers, sent), total

    def _check_count(self, count: int, offered: int) -> None:
        if count < 0 or count > offered:
            raise ValueError(f"the write callback returned {count} although {offered} bytes were offered")
        if self._owned and count != offered:
            raise ValueError(
                f"with write_owns_buffer the write callback takes all bytes or none: it returned {count} of {offered}"
            )

    def _advance(self, count: int) -> None:
        """*count* bytes were written: remove what is finished."""
        entries = self.waiting
        popleft = entries.popleft
        count += self._sent
        finished = 0
        while count:
            entry = entries[0]
            size = len(entry)
            if count < size:
                break
            popleft()
            finished += size
            count -= size
        self._bytes_out += finished
        self._sent = count

    # ------------------------------------------------------------ migration

    def entries(self) -> list[bytes]:
        """What is still to be written, packet by packet."""
        result = [entry if isinstance(entry, bytes) else b"".join(entry.parts) for entry in self.waiting]
        if self._sent:
            result[0] = result[0][self._sent :]
        return result

    def replace(self, packets: Sequence[bytes]) -> None:
        """Queue *packets* in place of everything that waits."""
        self.waiting.clear()
        self.waiting.extend(packets)
        self._sent = 0
        self._bytes_out = 0
        self._bytes_in = sum(map(len, packets))


def _skip(buffers: list[memoryview], count: int) -> list[memoryview]:
    """*buffers* without their first *count* bytes."""
    while count:
        size = len(buffers[0])
        if count < size:
            buffers[0] = buffers[0][count:]
            break
        del buffers[0]
        count -= size
    return buffers
