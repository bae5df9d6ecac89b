"""The output queue: packets wait here until the transport takes them.

Any thread may put packets in; one thread at a time takes them out. The application's lock is held only for
moments, never while its write callback runs, so a slow write blocks no sender and a callback may send.

Taking a packet in or out costs the same however many wait (the original walks its list to the end).
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Sequence
from itertools import islice

from .errors import QueueFullError
from .limits import Limits
from .locking import Guard

__all__ = ["Entry", "OutputQueue"]

Entry = bytes | tuple[bytes, bytes]
"""One packet: its bytes, or header and payload where the payload is too large to be copied."""

BATCH_BUFFERS = 512
"""Buffers per vectored write; systems refuse more than 1024."""
BATCH_BYTES = 1024 * 1024
"""Bytes per vectored write; more than a socket takes at once anyway."""
MOST_PACKETS = 4096
"""Packets gathered for one vectored write."""


def entry_size(entry: Entry) -> int:
    """Bytes of a packet on the wire."""
    return len(entry) if isinstance(entry, bytes) else len(entry[0]) + len(entry[1])


class OutputQueue:
    """FIFO of finished packets.

    Threads: push, len() and size: any number of callers; flush: any number, one of them writes;
    entries and replace: one caller, nothing else going on.
    """

    __slots__ = (
        "_again",
        "_bytes_in",
        "_bytes_out",
        "_entries",
        "_guard",
        "_limited",
        "_limits",
        "_owned",
        "_sent",
        "_write",
        "_writer",
        "_writev",
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
        self._guard = guard
        self._limits = limits
        self._limited = limits.max_queued_packets is not None or limits.max_queued_bytes is not None
        self._write = write
        self._writev = writev
        self._owned = owned
        self._entries: deque[Entry] = deque()
        self._sent = 0  # bytes of the first entry that are written
        # Two counters, each with one kind of writer, so that taking packets out needs no lock.
        self._bytes_in = 0
        self._bytes_out = 0
        self._writer: int | None = None
        self._again = False

    def __len__(self) -> int:
        return len(self._entries)

    @property
    def size(self) -> int:
        """Bytes queued; a packet that is partly written counts in full."""
        out = self._bytes_out  # read first: what comes in between only makes the answer larger
        return self._bytes_in - out

    def push(self, entry: Entry) -> None:
        """Append a packet. Raises QueueFullError at a limit."""
        size = len(entry) if entry.__class__ is bytes else entry_size(entry)
        if self._guard.active:
            with self._guard:
                if self._limited:
                    self._check_room(size)
                self._entries.append(entry)
                self._bytes_in += size
            return
        if self._limited:
            self._check_room(size)
        self._entries.append(entry)
        self._bytes_in += size

    def _check_room(self, size: int) -> None:
        packets, total = self._limits.max_queued_packets, self._limits.max_queued_bytes
        if packets is not None and len(self._entries) >= packets:
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

    def flush(self) -> None:
        """Write until the queue is empty or the transport would block.

        One thread writes. A call from another thread meanwhile makes it look again before it returns; a call
        from inside the write callback does nothing. An exception of the callback passes through, nothing is lost.
        """
        me = threading.get_ident()
        with self._guard:
            if self._writer is not None:
                self._again = self._again or self._writer != me
                return
            self._writer = me
            self._again = False
        drain = self._drain if self._writev is None else self._drain_vectored
        done = False
        try:
            while not done:
                blocked = drain()
                with self._guard:
                    done = not self._again and (blocked or not self._entries)
                    self._again = False
                    if done:
                        self._writer = None
        finally:
            if not done:
                with self._guard:
                    self._writer = None

    def _drain(self) -> bool:
        """One write call per buffer, as in the original. True: the transport would block."""
        entries, write = self._entries, self._write
        while entries:
            entry = entries[0]
            buffer = memoryview(entry) if isinstance(entry, bytes) else self._part(entry)
            if self._sent:
                buffer = buffer[self._offset(entry) :]
            count = write(buffer)
            if not count:
                return True
            self._check_count(count, len(buffer))
            self._advance(count)
        return False

    def _part(self, entry: tuple[bytes, bytes]) -> memoryview:
        return memoryview(entry[0] if self._sent < len(entry[0]) else entry[1])

    def _offset(self, entry: Entry) -> int:
        """Where in the buffer of :meth:`_part` the unwritten bytes begin."""
        if isinstance(entry, bytes) or self._sent < len(entry[0]):
            return self._sent
        return self._sent - len(entry[0])

    def _drain_vectored(self) -> bool:
        """Many packets per call. True: the transport would block."""
        assert self._writev is not None
        while self._entries:
            buffers, total = self._batch()
            count = self._writev(buffers)
            if not count:
                return True
            self._check_count(count, total)
            self._advance(count)
        return False

    def _batch(self) -> tuple[list[memoryview], int]:
        """The first packets as buffers: runs of small ones joined, large payloads by reference."""
        with self._guard:
            waiting = list(islice(self._entries, MOST_PACKETS))
        buffers: list[memoryview] = []
        run: list[bytes | memoryview] = []
        total = -self._sent
        for entry in waiting:
            if isinstance(entry, bytes):
                run.append(entry)
                total += len(entry)
            else:
                run.append(entry[0])
                buffers += (memoryview(b"".join(run)), memoryview(entry[1]))
                run = []
                total += len(entry[0]) + len(entry[1])
            if total >= BATCH_BYTES or len(buffers) >= BATCH_BUFFERS:
                break
        if run:
            buffers.append(memoryview(run[0] if len(run) == 1 else b"".join(run)))
        return _skip(buffers, self._sent), total

    def _check_count(self, count: int, offered: int) -> None:
        if count < 0 or count > offered:
            raise ValueError(f"the write callback returned {count} although {offered} bytes were offered")
        if self._owned and count != offered:
            raise ValueError(
                f"with write_owns_buffer the write callback takes all bytes or none: it returned {count} of {offered}"
            )

    def _advance(self, count: int) -> None:
        """*count* bytes were written: remove what is finished."""
        entries = self._entries
        count += self._sent
        while count:
            size = entry_size(entries[0])
            if count < size:
                break
            entries.popleft()
            self._bytes_out += size
            count -= size
        self._sent = count

    # ------------------------------------------------------------ migration

    def entries(self) -> list[bytes]:
        """What is still to be written, packet by packet."""
        result = [entry if isinstance(entry, bytes) else b"".join(entry) for entry in self._entries]
        if self._sent:
            result[0] = result[0][self._sent :]
        return result

    def replace(self, packets: Sequence[bytes]) -> None:
        """Queue *packets* in place of everything that waits."""
        self._entries = deque(packets)
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
