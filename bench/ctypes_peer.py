"""libusbredirparser through ctypes, as a sensible binding does it: the thing to beat.

Read and write callbacks take and give ``bytes``; a packet callback copies the payload out, frees the C buffer and hands
over plain values. The header is a ctypes structure, as it would be in any binding of a reader's taste. Only what the
benchmark needs is declared. ``USBREDIR_LIB`` names another library file.
"""

from __future__ import annotations

import ctypes as C
import os
from collections.abc import Callable
from typing import Any

from endpoints import Received, Transport
from wire import Kind

__all__ = ["CtypesEnd", "load"]

_FLAG_HOST, _FLAG_NO_HELLO = 1, 4

# The members of struct usbredirparser up to hello_func, all pointers. Source: usbredirparser.h.
# fmt: off
_MEMBERS = (
    "priv", "log", "read", "write", "device_connect", "device_disconnect", "reset", "interface_info", "ep_info",
    "set_configuration", "get_configuration", "configuration_status", "set_alt_setting", "get_alt_setting",
    "alt_setting_status", "start_iso_stream", "stop_iso_stream", "iso_stream_status", "start_interrupt_receiving",
    "stop_interrupt_receiving", "interrupt_receiving_status", "alloc_bulk_streams", "free_bulk_streams",
    "bulk_streams_status", "cancel_data_packet", "control_packet", "bulk_packet", "iso_packet", "interrupt_packet",
    "alloc_lock", "lock", "unlock", "free_lock", "hello",
)
# fmt: on


class _Parser(C.Structure):
    _fields_ = [(name, C.c_void_p) for name in _MEMBERS]


class _Header(C.LittleEndianStructure):
    _pack_ = 1
    _layout_ = "ms"


class _Bulk(_Header):
    _fields_ = [
        ("endpoint", C.c_uint8),
        ("status", C.c_uint8),
        ("length", C.c_uint16),
        ("stream_id", C.c_uint32),
        ("length_high", C.c_uint16),
    ]


class _Interrupt(_Header):
    _fields_ = [("endpoint", C.c_uint8), ("status", C.c_uint8), ("length", C.c_uint16)]


class _Control(_Header):
    _fields_ = [
        ("endpoint", C.c_uint8),
        ("request", C.c_uint8),
        ("requesttype", C.c_uint8),
        ("status", C.c_uint8),
        ("value", C.c_uint16),
        ("index", C.c_uint16),
        ("length", C.c_uint16),
    ]


_HEADERS: dict[str, type[Any]] = {"bulk": _Bulk, "interrupt": _Interrupt, "control": _Control}
_LOG = C.CFUNCTYPE(None, C.c_void_p, C.c_int, C.c_char_p)
_MOVE = C.CFUNCTYPE(C.c_int, C.c_void_p, C.c_void_p, C.c_int)
_HELLO = C.CFUNCTYPE(None, C.c_void_p, C.c_void_p)
_DATA = {
    name: C.CFUNCTYPE(None, C.c_void_p, C.c_uint64, C.POINTER(header), C.c_void_p, C.c_int)
    for name, header in _HEADERS.items()
}


def load() -> C.CDLL | None:
    """The C library, or None where there is none."""
    try:
        library = C.CDLL(os.environ.get("USBREDIR_LIB", "libusbredirparser.so.1"))
    except OSError:
        return None
    pointer = C.POINTER(_Parser)
    library.usbredirparser_create.restype = pointer
    library.usbredirparser_init.argtypes = [pointer, C.c_char_p, C.POINTER(C.c_uint32), C.c_int, C.c_int]
    library.usbredirparser_free_packet_data.argtypes = [pointer, C.c_void_p]
    for name in ("do_read", "do_write", "has_data_to_write", "destroy"):
        getattr(library, f"usbredirparser_{name}").argtypes = [pointer]
    for name, header in _HEADERS.items():
        send = getattr(library, f"usbredirparser_send_{name}_packet")
        send.argtypes = [pointer, C.c_uint64, C.POINTER(header), C.c_char_p, C.c_int]
        send.restype = None
    return library


class CtypesEnd:
    """One end of a connection on the C library. See :class:`endpoints.End`."""

    name = "ctypes"

    def __init__(
        self, library: C.CDLL, transport: Transport, *, usb_host: bool = False, received: Received | None = None
    ) -> None:
        self._library = library
        self._parser = parser = library.usbredirparser_create()
        self.connected = False
        self.count = 0
        callbacks = self._callbacks(transport, received)
        for name, callback in callbacks.items():
            setattr(parser.contents, name, C.cast(callback, C.c_void_p))
        self._alive = callbacks  # C has only their addresses
        capabilities = C.c_uint32(0xFF)
        flags = _FLAG_NO_HELLO | (_FLAG_HOST if usb_host else 0)
        library.usbredirparser_init(parser, b"bench", C.byref(capabilities), 1, flags)

    def _callbacks(self, transport: Transport, received: Received | None) -> dict[str, Any]:
        read, write, parser = transport.read, transport.write, self._parser
        free, string_at, memmove = self._library.usbredirparser_free_packet_data, C.string_at, C.memmove

        def on_read(_: int, address: int, count: int) -> int:
            data = read(count)
            if not data:
                return 0 if data is None else -1
            memmove(address, data, len(data))
            return len(data)

        def on_write(_: int, address: int, count: int) -> int:
            return write(string_at(address, count)) or 0

        def on_hello(*_: object) -> None:
            self.connected = True

        # What an application wants of a packet: its id, endpoint, status and data.
        def on_data(_: int, packet_id: int, pointer: Any, address: int, count: int) -> None:
            header = pointer.contents
            data = string_at(address, count) if count else b""
            if address:
                free(parser, address)
            deliver(packet_id, header.endpoint, header.status, data)

        def deliver(packet_id: int, endpoint: int, status: int, data: bytes) -> None:
            self.count += 1
            if received is not None:
                received(packet_id, data)

        return {
            "log": _LOG(lambda _, level, text: None),
            "read": _MOVE(on_read),
            "write": _MOVE(on_write),
            "hello": _HELLO(on_hello),
            **{f"{name}_packet": kind(on_data) for name, kind in _DATA.items()},
        }

    def receive(self) -> None:
        """Parse until the transport has no more."""
        self._library.usbredirparser_do_read(self._parser)

    def flush(self) -> None:
        """Write what is queued, as far as the transport takes it."""
        self._library.usbredirparser_do_write(self._parser)

    def pending(self) -> int:
        """Packets that are queued."""
        return int(self._library.usbredirparser_has_data_to_write(self._parser))

    def sender(self, kind: Kind) -> Callable[[int, bytes], object]:
        """A function that queues one packet of a kind: (id, data)."""
        parser, send = self._parser, getattr(self._library, f"usbredirparser_send_{kind.transfer}_packet")
        if kind.transfer == "bulk":

            def send_one(packet_id: int, data: bytes) -> None:
                size = len(data)
                send(parser, packet_id, _Bulk(0x81, 0, size & 0xFFFF, 0, size >> 16), data, size)

        elif kind.transfer == "interrupt":

            def send_one(packet_id: int, data: bytes) -> None:
                send(parser, packet_id, _Interrupt(0x82, 0, len(data)), data, len(data))

        else:

            def send_one(packet_id: int, data: bytes) -> None:
                send(parser, packet_id, _Control(0x80, 6, 0x80, 0, 0x100, 0, len(data)), data, len(data))

        return send_one

    def close(self) -> None:
        """Free the parser."""
        self._library.usbredirparser_destroy(self._parser)
        self._alive = {}
