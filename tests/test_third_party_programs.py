"""Programs of others that use pyusb, unchanged, on virtual devices at the other end of a connection.

They are in an environment of their own, which has no usbredir. Versions are in REQUIREMENTS.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from .instruments import ANSWERS, Bootloader, Instrument, SerialAdapter
from .pyusb_bed import exported, run_with, virtual_environment

REQUIREMENTS = (
    "pyusb==1.3.1",
    "pyvisa-py==0.8.1",  # instruments: pyvisa-shell
    "pyvisa==1.16.2",
    "pyftdi==0.57.2",  # serial adapters of FTDI: ftdi_urls.py, and its ports for pyserial
    "pyserial==3.5",
    "pyfu-usb==2.0.2",  # firmware: pyfu-usb
)


@pytest.fixture
def programs() -> Path:
    return virtual_environment(*REQUIREMENTS)


# ---------------------------------------------------------------- pyvisa-shell

VOLTMETER = "USB0::0x1209::0x0011::V0001::INSTR"


@pytest.fixture
def instrument() -> Iterator[tuple[Instrument, str]]:
    device = Instrument()
    with exported(device) as address:
        yield device, address


def test_an_instrument_is_queried(programs: Path, instrument: tuple[Instrument, str]) -> None:
    """The shell opens it by its ids and serial number, and asks it."""
    device, address = instrument
    commands = f"open {VOLTMETER}\nquery *IDN?\nquery MEAS:VOLT?\nwrite OUTPUT ON\nclose\nexit\n"
    output = run_with(address, programs / "pyvisa-shell", "-b", "py", text=commands)
    assert f"{VOLTMETER} has been opened" in output
    assert f"Response: {ANSWERS['*IDN?']}" in output
    assert f"Response: {ANSWERS['MEAS:VOLT?']}" in output
    assert device.asked == ["*IDN?", "MEAS:VOLT?", "OUTPUT ON"]


CURVE = f"""
import pyvisa
with pyvisa.ResourceManager("@py").open_resource("{VOLTMETER}") as voltmeter:
    print(voltmeter.query("CURVE?"), end="")
"""


def test_a_long_answer(programs: Path, instrument: tuple[Instrument, str]) -> None:
    """Several packets and transfers, the way that a user of the library reads them."""
    _, address = instrument
    assert ANSWERS["CURVE?"] in run_with(address, programs / "python", "-c", CURVE)


# ---------------------------------------------------------------- pyftdi

SERIAL = """
from pyftdi.serialext import serial_for_url
with serial_for_url("ftdi://ftdi:232h:FT0001/1", baudrate=115200, bytesize=7, parity="E", timeout=5) as port:
    for length in (1, 600, 5000):
        message = bytes(i & 0x7F for i in range(length))
        port.write(message)
        assert port.read(length) == message
    port.timeout = 0.05
    assert port.read(1) == b""
print("there and back")
"""
DIVISOR_115200 = 0xC068
"""104 and an eighth, of 12 MHz."""


def test_a_serial_adapter_is_found(programs: Path) -> None:
    with exported(SerialAdapter()) as address:
        output = run_with(address, programs / "python", programs / "ftdi_urls.py")
    assert re.search(r"ftdi://ftdi:232h:\S+/1 +\(Single RS232-HS\)", output), output


def test_a_serial_port_is_used(programs: Path) -> None:
    """pyserial's port on the adapter: 7 data bits, even parity, and what is sent comes back."""
    device = SerialAdapter()
    with exported(device) as address:
        assert run_with(address, programs / "python", "-c", SERIAL).endswith("there and back\n")
    assert device.requests[SerialAdapter.SET_DATA].value & 0x7FF == 2 << 8 | 7
    assert device.requests[SerialAdapter.SET_BAUD_RATE].value == DIVISOR_115200


# ---------------------------------------------------------------- pyfu-usb


def test_firmware_is_loaded(programs: Path, tmp_path: Path) -> None:
    """Listed with its memory; then two pages are erased and written, and the firmware started."""
    firmware = os.urandom(20_000)
    image = tmp_path / "firmware.bin"
    image.write_bytes(firmware)
    device = Bootloader()
    with exported(device) as address:
        listing = run_with(address, programs / "pyfu-usb", "--list", COLUMNS="200", TERM="dumb")
        arguments = "--device", "1209:0012", "--address", hex(Bootloader.BASE), "--download", image
        run_with(address, programs / "pyfu-usb", *arguments, COLUMNS="200", TERM="dumb")
    assert "ID 1209:0012" in listing
    assert re.search(r"0x8000000\s+4 pages of +16K bytes", listing), listing
    assert device.left
    assert device.flash[: len(firmware)] == firmware
    assert device.erased == [Bootloader.BASE, Bootloader.BASE + Bootloader.PAGE]
