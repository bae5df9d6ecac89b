"""``usbredir demo``: a whole redirection on this machine, in a few seconds, without hardware.

A virtual USB stick with a real file system is exported over TCP; a guest connects, shows the device, reads files
from it by SCSI commands, and measures.
"""

from __future__ import annotations

import argparse
import hashlib
import sys
import threading
import time
from collections.abc import Callable
from statistics import quantiles
from typing import TextIO

from ._describe import describe_device
from ._disk_client import DiskClient
from .guest import Guest
from .transport import GuestConnection, Listener, connect, listen, serve
from .virtual import MassStorage
from .virtual.fat import FatReader, make_image

__all__ = ["add_arguments", "run"]

IMAGE_BYTES = 16 * 1024 * 1024
PICTURE_BYTES = 512 * 1024
READ_BYTES = 1024 * 1024
READ_SECONDS = 0.6
"""How long the throughput is measured, and the latency."""
CONNECT_SECONDS = 10.0
BAR = 32
"""Characters of the progress bar."""

NOTE = b"""This stick is made of Python.

Plug it into a virtual machine:

    usbredir export --virtual disk:stick.img --as 127.0.0.1:4000
"""


def make_stick() -> bytes:
    """The image of a FAT file system with a few files."""
    pattern = bytes((i * i >> 4) & 0xFF for i in range(4096))
    files = {
        "README.TXT": NOTE,
        "hello world.txt": b"Hello, world!\n",
        "PICTURE.BIN": pattern * (PICTURE_BYTES // 4096),
    }
    return make_image(files, size=IMAGE_BYTES, label="USBREDIR")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """It has no options."""
    parser.set_defaults(run=lambda options: run())


def run(output: TextIO = sys.stdout) -> int:
    """Run the demonstration; the exit code: 0 when all was read as it was written."""
    image = make_stick()
    # Two threads take turns for every transfer: the default of 5 ms would be most of the latency measured.
    sys.setswitchinterval(0.0005)
    with listen("127.0.0.1:0") as listener:
        exporter = threading.Thread(target=_export, args=(listener, image), name="exporter", daemon=True)
        exporter.start()
        _print(output, f"A virtual USB stick of {len(image) >> 20} MiB is exported on {listener.address}.")
        with connect(str(listener.address)) as connection, Guest(GuestConnection(connection)) as guest:
            guest.wait_for_device(CONNECT_SECONDS)
            _print(output, f"Guest connected; the host is {guest.host_version!r}.\n")
            for line in describe_device(guest):
                _print(output, line)
            good = _read_files(guest, output)
            _measure(guest, output)
            _print(
                output,
                f"\n{guest.packets_received} packets, {connection.bytes_received:,} bytes received, "
                f"{connection.bytes_sent:,} sent.",
            )
        exporter.join(CONNECT_SECONDS)
    return 0 if good else 1


def _export(listener: Listener, image: bytes) -> None:
    connection = listener.accept(CONNECT_SECONDS)
    if connection is None:
        return
    device = MassStorage(image)
    try:
        with connection:
            serve(connection, device)
    finally:
        device.close()


def _print(output: TextIO, line: str) -> None:
    print(line, file=output, flush=True)


def _read_files(guest: Guest, output: TextIO) -> bool:
    disk = DiskClient(guest)
    disk.test_unit_ready()
    about = disk.inquiry()
    blocks, size = disk.capacity()
    _print(output, f"\nDisk {about.vendor} {about.product} {about.revision}: {blocks} blocks of {size} bytes")
    reader = FatReader(disk.read)
    for name in reader.names():
        content = reader.read(name)
        _print(output, f"  {name:16} {len(content):>9,} bytes  sha256 {hashlib.sha256(content).hexdigest()[:16]}")
    note = reader.read("README.TXT")
    _print(output, "\n" + "".join(f"  | {line}\n" for line in note.decode().splitlines()))
    return note == NOTE


def _measure(guest: Guest, output: TextIO) -> None:
    disk = DiskClient(guest)
    blocks, size = disk.capacity()
    step = READ_BYTES // size
    done, started = 0, time.perf_counter()
    bar = _progress(output)
    while (spent := time.perf_counter() - started) < READ_SECONDS:
        disk.read_blocks(done // size % (blocks - step), step)
        done += READ_BYTES
        bar(min(1.0, spent / READ_SECONDS), f"{done / max(spent, 1e-9) / 1e6:7.0f} MB/s")
    spent = time.perf_counter() - started
    bar(1.0, f"{done / spent / 1e6:7.0f} MB/s")
    _print(output, f"\nSequential reads of 1 MiB: {done / spent / 1e6:.0f} MB/s ({done >> 20} MiB in {spent:.2f} s)")
    times: list[float] = []
    started = time.perf_counter()
    while time.perf_counter() - started < READ_SECONDS / 2:
        before = time.perf_counter()
        disk.read_blocks(len(times) * 37 % (blocks - 8), 8)
        times.append((time.perf_counter() - before) * 1e6)
    cuts = quantiles(times, n=100)
    _print(
        output,
        f"Reads of 4 KiB, three transfers each: {len(times) / (READ_SECONDS / 2):.0f} per second; "
        f"half within {cuts[49]:.0f} us, 99 % within {cuts[98]:.0f} us, worst {max(times):.0f} us",
    )


def _progress(output: TextIO) -> Callable[[float, str], None]:
    """A progress bar; where it would fill a log, only its end."""
    terminal = output.isatty()

    def show(share: float, text: str) -> None:
        filled = round(share * BAR)
        if terminal or share >= 1:
            start = "\r" if terminal else ""
            print(
                f"{start}  [{'#' * filled}{'.' * (BAR - filled)}] {share:4.0%} {text}", end="", file=output, flush=True
            )

    return show
