"""A host embedded as in an emulator: reader, writer and USB event thread, under locks of the application."""

import select
import socket
import threading
from typing import Any

from usbredir.errors import UsbRedirError
from usbredir.guest import Guest
from usbredir.host import Host
from usbredir.locking import LockCallbacks
from usbredir.transport import Connection, GuestConnection, HostConnection
from usbredir.virtual import LoopbackDevice


class _Locks(LockCallbacks):  # an emulator brings its own kind
    def alloc_lock(self) -> object:
        return threading.Lock()

    def lock(self, lock: Any, /) -> None:
        lock.acquire()

    def unlock(self, lock: Any, /) -> None:
        lock.release()

    def free_lock(self, lock: Any, /) -> None:
        assert not lock.locked()


class _Emulator(HostConnection):  # has the read, write and log callbacks
    def __init__(self, connection: Connection) -> None:
        super().__init__(connection)
        self.work, self.ended = threading.Event(), threading.Event()
        self.device = LoopbackDevice()
        self.host = Host(self, self.device, locks=_Locks())
        self.threads = [threading.Thread(target=t) for t in (self.read_requests, self.write_replies, self.handle_usb)]

    def flush_writes(self) -> None:  # called by reader and event thread, with no lock held
        self.work.set()

    def read_requests(self) -> None:
        try:
            while True:  # while replies pile up, requests have to wait
                select.select([] if self.host.reading_paused else [self.connection], [], [], 0.1)
                self.host.read_guest_data()
        except (UsbRedirError, OSError) as reason:
            print("reader:", reason)
        self.ended.set()
        self.work.set()
        self.device.wake()

    def write_replies(self) -> None:
        while not self.ended.is_set():
            self.host.write_guest_data()  # the first time: hello, queued by the constructor
            if self.host.has_data_to_write():
                select.select([], [self.connection], [], 0.1)  # the socket is full
            else:
                self.work.wait()
                self.work.clear()

    def handle_usb(self) -> None:
        while not self.ended.is_set():
            self.device.handle_events(None)  # completes transfers, which queues replies


here, there = socket.socketpair()
emulator = _Emulator(Connection(here, "the guest"))
for thread in emulator.threads:
    thread.start()
with Connection(there, "the host") as connection, Guest(GuestConnection(connection)) as guest:
    print("guest:", guest.wait_for_device(5))
    for message in (b"x", bytes(512), bytes(range(256)) * 4096):
        guest.bulk_out(0x01, message, timeout=5)
        assert guest.bulk_in(0x81, len(message), timeout=5).data == message
        print(f"guest: {len(message)} bytes went out and came back")
for thread in emulator.threads:
    thread.join()
emulator.host.close()  # gives the device back, so before it is closed
emulator.device.close()
emulator.connection.close()
