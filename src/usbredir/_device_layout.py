"""Interfaces and endpoints of the active configuration, as the host announces and uses them.

Source: docs/host.md, "Announcing".
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from .descriptors import Configuration, Interface, max_packet_size, parse_configuration, parse_device
from .device import UsbDevice
from .packets import DeviceConnect, EpInfo, InterfaceInfo
from .proto import MAX_INTERFACES, Speed, TransferType, endpoint_index

__all__ = ["DeviceLayout", "EndpointSlot"]

NO_INTERFACES = Configuration(0)


class EndpointSlot(NamedTuple):
    """One endpoint as the guest sees it; *max_packet_size* in bytes."""

    type: TransferType
    interval: int = 0
    interface: int = 0
    max_packet_size: int = 0
    max_streams: int = 0


CONTROL = EndpointSlot(TransferType.CONTROL)
MISSING = EndpointSlot(TransferType.INVALID)


class DeviceLayout:
    """The active configuration and the present alternate settings.

    Raises ValueError when the device's descriptors make no sense. Alternate settings are looked up by
    their number: a device need not number them 0, 1, 2.
    """

    def __init__(self, device: UsbDevice) -> None:
        self.speed = device.speed
        self.descriptor = parse_device(device.device_descriptor)
        raw = device.configuration_descriptor
        self.configuration = NO_INTERFACES if raw is None else parse_configuration(raw)
        self.alternates = dict.fromkeys(self.configuration.numbers(), 0)
        self._slots = [MISSING] * 32
        self._fill()

    def select(self, interface: int, alternate: int) -> None:
        """*interface* now has the alternate setting *alternate*."""
        self.alternates[interface] = alternate
        self._fill()

    def endpoint(self, address: int) -> EndpointSlot:
        """What is at an endpoint address; type INVALID where there is nothing."""
        return self._by_address[address]

    def addresses(self, interface: int) -> list[int]:
        """Endpoint addresses of an interface's present alternate setting."""
        return [
            endpoint.address
            for present in self._present()
            if present.number == interface
            for endpoint in present.endpoints
        ]

    def _present(self) -> Iterator[Interface]:
        for number, alternate in self.alternates.items():
            # Alternate setting 0 is assumed after a configuration; a device without one has its first active.
            yield self.configuration.find(number, alternate) or self.configuration.first(number)

    def _fill(self) -> None:
        slots = [MISSING] * 32
        slots[0] = slots[16] = CONTROL
        for interface in self._present():
            for endpoint in interface.endpoints:
                index = endpoint_index(endpoint.address)
                if index not in (0, 16):
                    slots[index] = EndpointSlot(
                        endpoint.type,
                        endpoint.interval,
                        interface.number,
                        max_packet_size(endpoint, self.speed),
                        endpoint.max_streams,
                    )
        self._slots = slots
        # By every value that an address field can have: two calls per transfer less.
        self._by_address = [slots[endpoint_index(address)] for address in range(256)]
        self.types = [slot.type for slot in self._by_address]

    # ------------------------------------------------------------ packets

    def interface_info(self) -> InterfaceInfo:
        """The interfaces, from their present alternate settings."""
        present = list(self._present())
        unused = (0,) * (MAX_INTERFACES - len(present))
        return InterfaceInfo(
            interface_count=len(present),
            interface=(*(i.number for i in present), *unused),
            interface_class=(*(i.interface_class for i in present), *unused),
            interface_subclass=(*(i.interface_subclass for i in present), *unused),
            interface_protocol=(*(i.interface_protocol for i in present), *unused),
        )

    def ep_info(self) -> EpInfo:
        """The endpoints of the present alternate settings."""
        types, intervals, interfaces, sizes, streams = zip(*self._slots, strict=True)
        return EpInfo(type=types, interval=intervals, interface=interfaces, max_packet_size=sizes, max_streams=streams)

    def device_connect(self) -> DeviceConnect:
        """The device itself; speeds beyond super count as unknown."""
        d = self.descriptor
        return DeviceConnect(
            speed=self.speed if self.speed in set(Speed) else Speed.UNKNOWN,
            device_class=d.device_class,
            device_subclass=d.device_subclass,
            device_protocol=d.device_protocol,
            vendor_id=d.vendor_id,
            product_id=d.product_id,
            device_version_bcd=d.device_version_bcd,
        )
