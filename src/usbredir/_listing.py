"""``usbredir list``: the devices that are plugged in, and whether they can be exported."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from . import filter as _filter
from ._describe import CLASS_NAMES
from ._ending import ExitCode, Failure
from ._virtual_kinds import KINDS
from .errors import DeviceError, FilterSyntaxError
from .filter import FilterResult, FilterRule
from .parser import escape
from .proto import Speed

if TYPE_CHECKING:
    from .backends.pyusb import DeviceInfo

__all__ = ["add_arguments", "list_devices"]

SPEEDS = {Speed.LOW: "low", Speed.FULL: "full", Speed.HIGH: "high", Speed.SUPER: "super", Speed.UNKNOWN: "unknown"}
HUB = 0x09
COLUMNS = ("bus-dev", "port", "ids", "speed", "class", "driver", "export", "name", "serial")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    parser.add_argument("--json", action="store_true", help="as a JSON list")
    parser.add_argument("--filter", metavar="RULES", help="rules as for export --filter")
    parser.set_defaults(run=list_devices)


def list_devices(options: argparse.Namespace) -> int:
    """Run the command. Raises Failure."""
    from .backends import pyusb

    try:
        rules = None if options.filter is None else _filter.parse(options.filter)
        devices = [_as_dict(info, rules) for info in pyusb.list_devices()]
    except FilterSyntaxError as error:
        raise Failure(ExitCode.USAGE, f"--filter: {error}") from error
    except DeviceError as error:
        raise Failure(ExitCode.DEVICE, str(error)) from error
    if options.json:
        print(json.dumps(devices, indent=2))
    else:
        for line in _table([COLUMNS, *map(_as_row, devices)]):
            print(line)
        if not devices:
            print("(no real devices)")
        print("\nvirtual:", "  ".join(kind.form for kind in KINDS.values()))
    return ExitCode.OK


def _as_dict(info: DeviceInfo, rules: Sequence[FilterRule] | None) -> dict[str, Any]:
    ids = info.ids
    allowed = None if rules is None else _filter.check(rules, ids) is FilterResult.ALLOW
    return {
        "bus": info.bus,
        "address": info.address,
        "port": info.port,
        "vendor_id": f"{ids.vendor_id:04x}",
        "product_id": f"{ids.product_id:04x}",
        "manufacturer": info.manufacturer,
        "product": info.product,
        "serial": info.serial,
        "speed": SPEEDS[info.speed],
        "device_class": ids.device_class,
        "interfaces": [list(interface) for interface in ids.interfaces],
        "drivers": {str(number): driver for number, driver in info.drivers.items()},
        "accessible": info.accessible,
        "configured": info.configured,
        "allowed": allowed,
    }


def _as_row(device: dict[str, Any]) -> tuple[str, ...]:
    classes = [device["device_class"]] if device["device_class"] else [i[0] for i in device["interfaces"]]
    names = [CLASS_NAMES.get(number, f"0x{number:02x}") for number in dict.fromkeys(classes)]
    return (
        f"{device['bus']}-{device['address']}",
        device["port"] or "-",
        f"{device['vendor_id']}:{device['product_id']}",
        device["speed"],
        "+".join(names) or "-",
        "+".join(dict.fromkeys(device["drivers"].values())) or "-",
        _verdict(device),
        escape(f"{device['manufacturer']} {device['product']}".strip()) or "-",
        escape(device["serial"]) or "-",
    )


def _verdict(device: dict[str, Any]) -> str:
    """Whether it can be exported."""
    if device["device_class"] == HUB:
        return "no: hub"
    if device["allowed"] is False:
        return "no: filter"
    if device["accessible"] is False:
        return "no: permission"
    if device["configured"] is False:
        return "no: unconfigured"
    return "yes"


def _table(rows: Sequence[Sequence[str]]) -> Iterator[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        yield "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
