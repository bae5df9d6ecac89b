"""What a device in Python tells about itself: the declaration, compiled into descriptors for one speed.

::

    class Scale(Declaration):
        vendor_id, product_id, product = 0x1209, 0x0004, "Scale"
        interfaces = [interface(0xFF, bulk_in(0x81))]

    Scale().describe(Speed.HIGH).device

Packet sizes, intervals, string indexes, companions, BOS and qualifier follow from the speed. What USB forbids
is a ValueError that says what and why.

Source: USB 2.0, 5.5 to 5.8 and 9.6; USB 3.2, 9.6; Interface Association Descriptors ECN.
"""

from __future__ import annotations

import struct
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from ..descriptors import (
    FRAME,
    MICROFRAME,
    Configuration,
    DescriptorType,
    DeviceDescriptor,
    Endpoint,
    Interface,
    bos_descriptor,
    build_configuration,
    string_descriptor,
)
from ..proto import Speed, TransferType
from .declare import (
    Association,
    ConfigurationDeclaration,
    EndpointDeclaration,
    InterfaceDeclaration,
    check_bytes,
    check_range,
    configuration,
)
from .microsoft import (
    OS_STRING_INDEX,
    WinUsb,
    constant_answers,
    default_guid,
    descriptor_set,
    os_string,
    platform_capability,
)

__all__ = ["Declaration", "Description", "endpoint_at"]

BULK, INTERRUPT, ISO = TransferType.BULK, TransferType.INTERRUPT, TransferType.ISO


@dataclass(frozen=True)
class Description:
    """What a device tells about itself at one speed: descriptors as they are sent.

    Attributes:
        device: the device descriptor, 18 bytes.
        configurations: whole configuration descriptors; the first one is active at the start.
        strings: texts of string descriptors, by index.
        bos: the BOS descriptor.
        qualifier: the device qualifier, of devices that are at high speed and have a full speed.
        other_speed: the configurations at the other speed, as such.
        answers: constant answers to control IN requests by (bmRequestType, bRequest, wValue, wIndex), such as
            descriptors of interfaces.
    """

    device: bytes
    configurations: Sequence[bytes]
    strings: Mapping[int, str] = field(default_factory=dict)
    bos: bytes | None = None
    qualifier: bytes | None = None
    other_speed: Sequence[bytes] = ()
    answers: Mapping[tuple[int, int, int, int], bytes] = field(default_factory=dict)

    def descriptor(self, kind: int, index: int) -> bytes | None:
        """What GET_DESCRIPTOR of the device answers (USB 2.0, 9.4.3); None: there is no such descriptor."""
        if kind == DescriptorType.STRING:
            if index == 0:
                return bytes((4, kind)) + _ENGLISH.to_bytes(2, "little")
            return string_descriptor(self.strings[index]) if index in self.strings else None
        present: Mapping[int, Sequence[bytes | None]] = {
            DescriptorType.DEVICE: [self.device],
            DescriptorType.CONFIGURATION: self.configurations,
            DescriptorType.BOS: [self.bos],
            DescriptorType.DEVICE_QUALIFIER: [self.qualifier],
            DescriptorType.OTHER_SPEED_CONFIGURATION: self.other_speed,
        }
        found = present.get(kind, ())
        return found[index] if index < len(found) else None


_ENGLISH = 0x0409
_MAX_PACKET_0 = {Speed.LOW: 8, Speed.FULL: 64, Speed.HIGH: 64, Speed.SUPER: 9}
"""bMaxPacketSize0: bytes, at super speed an exponent of 2."""
_COMPOSITE = (0xEF, 0x02, 0x01)
"""Class, subclass and protocol of devices with interface associations."""
_USB_2_EXTENSION = bytes.fromhex("07100200000000")
"""No link power management."""
_SUPERSPEED = bytes.fromhex("0a1003000e00010a2000")
"""Full, high and super speed; works from full speed on."""
_RESERVED, _SELF_POWERED, _REMOTE_WAKEUP = 0x80, 0x40, 0x20  # bmAttributes of a configuration
_GET_INTERFACE_DESCRIPTOR = 0x81, 6


class Declaration:
    """A device's declaration: attributes of the class, or of the object if set before it is described.

    Attributes:
        vendor_id: idVendor. 0x1209 is for open projects: take an id of your own for what leaves your desk.
        product_id: idProduct.
        device_version: bcdDevice.
        device_class: bDeviceClass; 0: the interfaces tell. With associations it becomes 0xEF, 2, 1.
        device_subclass: bDeviceSubClass.
        device_protocol: bDeviceProtocol.
        manufacturer: text, None for none.
        product: text, None for none.
        serial: serial number, None for none.
        speed: speed on the bus.
        usb_version: bcdUSB, None: the lowest that is right.
        self_powered: has its own power supply.
        remote_wakeup: can wake the host.
        max_power: mA.
        interfaces: of the only configuration.
        configurations: several configurations, in place of *interfaces*.
        winusb: True or a :class:`~usbredir.virtual.microsoft.WinUsb`: Windows uses its WinUSB driver.
    """

    vendor_id: int = 0x1209
    product_id: int = 0x0002
    device_version: int = 0x0100
    device_class: int = 0
    device_subclass: int = 0
    device_protocol: int = 0
    manufacturer: str | None = "usbredir"
    product: str | None = None
    serial: str | None = None
    speed: Speed = Speed.HIGH
    usb_version: int | None = None
    self_powered: bool = False
    remote_wakeup: bool = False
    max_power: int = 100
    interfaces: Sequence[InterfaceDeclaration | Association] = ()
    configurations: Sequence[ConfigurationDeclaration] = ()
    winusb: WinUsb | bool = False

    def describe(self, speed: Speed) -> Description:
        """Compile the declaration. Raises ValueError for what USB forbids at *speed*.

        A device whose descriptors are known only as bytes overrides this.
        """
        if speed not in _MAX_PACKET_0:
            raise ValueError(f"a device has low, full, high or super speed, not {speed!r}")
        check_range(0xFFFF, vendor_id=self.vendor_id, product_id=self.product_id, device_version=self.device_version)
        check_range(0xFFFF, usb_version=self.usb_version or 0)
        check_bytes(device_class=self.device_class, device_subclass=self.device_subclass)
        check_bytes(device_protocol=self.device_protocol)
        if self.interfaces and self.configurations:
            raise ValueError("a device has either interfaces or configurations")
        return _Compiler(self, speed).description()


class _Compiler:
    """From a declaration to its description at one speed."""

    def __init__(self, device: Declaration, speed: Speed) -> None:
        self._device = device
        self._speed = speed
        self._strings: dict[int, str] = {}
        self._configurations = [
            replace(declared, interfaces=tuple(_numbered(declared.interfaces)))
            for declared in device.configurations or [configuration(*device.interfaces)]
        ]
        self._winusb = WinUsb() if device.winusb is True else device.winusb or None

    def description(self) -> Description:
        device = self._device_descriptor()
        configurations = self._built(self._speed)
        answers = dict(self._interface_answers())
        strings = self._strings
        capabilities = [_SUPERSPEED] if self._speed is Speed.SUPER else []
        if self._winusb is not None:
            request, guid, functions, composite = self._microsoft(self._winusb)
            answers |= constant_answers(request, guid, functions, composite=composite)
            set_length = len(descriptor_set(guid, functions if composite else ()))
            capabilities.append(platform_capability(set_length, request))
            strings = {**strings, OS_STRING_INDEX: os_string(request)}
        bos = bos_descriptor([_USB_2_EXTENSION, *capabilities]) if capabilities else None
        qualifier, other_speed = self._at_full_speed(device)
        return Description(device, configurations, strings, bos, qualifier, other_speed, answers)

    # ------------------------------------------------------------ device

    def _device_descriptor(self) -> bytes:
        device = self._device
        kind = device.device_class, device.device_subclass, device.device_protocol
        associated = any(isinstance(item, Association) for c in self._configurations for item in c.interfaces)
        return DeviceDescriptor(
            self._usb_version(),
            *(_COMPOSITE if associated and not any(kind) else kind),
            _MAX_PACKET_0[self._speed],
            device.vendor_id,
            device.product_id,
            device.device_version,
            self._string(device.manufacturer),
            self._string(device.product),
            self._string(device.serial),
            len(self._configurations),
        ).to_bytes()

    def _usb_version(self) -> int:
        if self._device.usb_version is not None:
            return self._device.usb_version
        if self._speed is Speed.SUPER:
            return 0x0300
        return 0x0200 if self._winusb is None else 0x0210  # which has the BOS descriptor

    def _string(self, text: str | None) -> int:
        """The index of a text, 0 for none."""
        if text is None:
            return 0
        index = next((index for index, known in self._strings.items() if known == text), len(self._strings) + 1)
        self._strings[index] = text
        return index

    def _at_full_speed(self, device: bytes) -> tuple[bytes | None, list[bytes]]:
        """Device qualifier and other-speed configurations, if this high-speed device has a full speed."""
        if self._speed is not Speed.HIGH:
            return None, []
        try:
            configurations = self._built(Speed.FULL)
        except ValueError:  # for high speed only
            return None, []
        qualifier = struct.pack(
            "<BB6sBB", 10, DescriptorType.DEVICE_QUALIFIER, device[2:8], len(self._configurations), 0
        )
        kind = bytes([DescriptorType.OTHER_SPEED_CONFIGURATION])
        return qualifier, [raw[:1] + kind + raw[2:] for raw in configurations]

    # ------------------------------------------------------------ configurations

    def _built(self, speed: Speed) -> list[bytes]:
        return [
            build_configuration(self._configuration(declared, number, speed))
            for number, declared in enumerate(self._configurations, 1)
        ]

    def _configuration(self, declared: ConfigurationDeclaration, number: int, speed: Speed) -> Configuration:
        device = self._device
        attributes = _RESERVED
        if device.self_powered if declared.self_powered is None else declared.self_powered:
            attributes |= _SELF_POWERED
        if device.remote_wakeup if declared.remote_wakeup is None else declared.remote_wakeup:
            attributes |= _REMOTE_WAKEUP
        power = device.max_power if declared.max_power is None else declared.max_power
        most, unit = (900, 8) if speed is Speed.SUPER else (500, 2)
        check_range(most, max_power=power)
        interfaces = tuple(built for item in declared.interfaces for built in self._item(item, speed))
        _check(interfaces)
        value = number if declared.value is None else declared.value
        return Configuration(value, attributes, -(-power // unit), self._string(declared.name), interfaces)

    def _item(self, item: InterfaceDeclaration | Association, speed: Speed) -> list[Interface]:
        if isinstance(item, InterfaceDeclaration):
            return [self._interface(item, speed)]
        interfaces = [self._interface(declared, speed) for declared in item.interfaces]
        numbers = sorted({declared.number for declared in interfaces})
        if numbers != list(range(numbers[0], numbers[0] + len(numbers))):
            raise ValueError(f"interfaces of an association have consecutive numbers, not {numbers}")
        head = bytes((8, DescriptorType.INTERFACE_ASSOCIATION, numbers[0], len(numbers)))
        kind = bytes((item.function_class, item.subclass, item.protocol, self._string(item.name)))
        return [replace(interfaces[0], association=head + kind), *interfaces[1:]]

    def _interface(self, declared: InterfaceDeclaration, speed: Speed) -> Interface:
        return Interface(
            declared.number or 0,
            declared.alternate,
            declared.interface_class,
            declared.subclass,
            declared.protocol,
            self._string(declared.name),
            tuple(endpoint_at(endpoint, speed) for endpoint in declared.endpoints),
            declared.extra,
        )

    # ------------------------------------------------------------ answers

    def _interface_answers(self) -> Iterator[tuple[tuple[int, int, int, int], bytes]]:
        for declared in self._configurations:
            for setting in _flat(declared.interfaces):
                for kind, raw in setting.descriptors.items():
                    yield (*_GET_INTERFACE_DESCRIPTOR, kind << 8, setting.number or 0), raw

    def _microsoft(self, winusb: WinUsb) -> tuple[int, str, list[int], bool]:
        """Vendor request, GUID, first interfaces of the functions, and whether the device is composite."""
        functions = _functions(self._configurations[0].interfaces)
        chosen = winusb.interfaces
        composite = len(functions) > 1
        if chosen is None:
            chosen = tuple(n for n, kind in functions.items() if kind == 0xFF or not composite)
        if not chosen or not set(chosen) <= set(functions):
            raise ValueError(f"WinUSB is for functions that begin at interfaces {list(functions)}, not {list(chosen)}")
        guid = winusb.guid or default_guid(self._device.vendor_id, self._device.product_id)
        return winusb.request, guid, list(chosen), composite


# ---------------------------------------------------------------- interfaces


def _numbered(interfaces: Sequence[InterfaceDeclaration | Association]) -> list[InterfaceDeclaration | Association]:
    """The same with all interface numbers filled in."""
    last = -1

    def fill(declared: InterfaceDeclaration) -> InterfaceDeclaration:
        nonlocal last
        if declared.number is None:
            declared = replace(declared, number=max(0, last + (declared.alternate == 0)))
        last = declared.number or 0
        return declared

    return [
        replace(item, interfaces=tuple(map(fill, item.interfaces))) if isinstance(item, Association) else fill(item)
        for item in interfaces
    ]


def _flat(items: Sequence[InterfaceDeclaration | Association]) -> Iterator[InterfaceDeclaration]:
    for item in items:
        yield from item.interfaces if isinstance(item, Association) else (item,)


def _functions(items: Sequence[InterfaceDeclaration | Association]) -> dict[int, int]:
    """What a composite device consists of: class of each function by the number of its first interface."""
    functions: dict[int, int] = {}
    for item in items:
        first = item.interfaces[0] if isinstance(item, Association) else item
        functions.setdefault(first.number or 0, first.interface_class)
    return functions


def _check(interfaces: Sequence[Interface]) -> None:
    """Each alternate setting once, and no endpoint address in two places at a time. Raises ValueError."""
    settings = Counter((setting.number, setting.alternate) for setting in interfaces)
    addresses = Counter(
        (setting.number, setting.alternate, endpoint.address)
        for setting in interfaces
        for endpoint in setting.endpoints
    )
    owners = Counter(address for _, address in {(number, address) for number, _, address in addresses})
    for (number, alternate), count in settings.items():
        if count > 1:
            raise ValueError(f"interface {number} has alternate setting {alternate} twice")
    for (number, _, address), count in addresses.items():
        if count > 1 or owners[address] > 1:
            raise ValueError(f"endpoint 0x{address:02x} of interface {number} is declared twice")


# ---------------------------------------------------------------- endpoints

_MOST: Mapping[tuple[Speed, TransferType], int] = {
    (Speed.LOW, INTERRUPT): 8,
    (Speed.FULL, BULK): 64,
    (Speed.FULL, INTERRUPT): 64,
    (Speed.FULL, ISO): 1023,
    (Speed.HIGH, BULK): 512,
    (Speed.HIGH, INTERRUPT): 3 * 1024,
    (Speed.HIGH, ISO): 3 * 1024,
    (Speed.SUPER, BULK): 1024,
    (Speed.SUPER, INTERRUPT): 3 * 1024,
    (Speed.SUPER, ISO): 16 * 1024,
}
"""Most bytes of a bulk packet, or of a periodic endpoint's interval. What is not here does not exist."""
_USUAL_INTERRUPT_SIZE = 64
_BULK_SIZES: Mapping[Speed, tuple[int, ...]] = {Speed.FULL: (8, 16, 32, 64), Speed.HIGH: (512,), Speed.SUPER: (1024,)}
_LOW_SPEED_MILLISECONDS = 10
"""Shortest interval at low speed."""
_NAMES = {BULK: "bulk", INTERRUPT: "interrupt", ISO: "isochronous"}


def endpoint_at(declared: EndpointDeclaration, speed: Speed) -> Endpoint:
    """The descriptor of an endpoint at *speed*. Raises ValueError when USB has no such endpoint there."""
    if (speed, declared.type) not in _MOST:
        raise declared.error(f"there are no {_NAMES[declared.type]} endpoints at {speed.name.lower()} speed")
    size = _size(declared, speed)
    raw_size, burst = (size, declared.max_burst) if declared.type is BULK else _packets(size, speed)
    superspeed = speed is Speed.SUPER
    return Endpoint(
        declared.address,
        declared.type | declared.usage << 2,
        raw_size,
        _interval(declared, speed),
        companion=superspeed,
        max_burst=burst if superspeed else 0,
        max_streams=declared.max_streams if superspeed else 0,
        bytes_per_interval=size if superspeed and declared.type is not BULK else 0,
        tail=declared.tail,
        extra=declared.extra,
    )


def _size(declared: EndpointDeclaration, speed: Speed) -> int:
    most = _MOST[speed, declared.type]
    size = declared.size.get(speed) if isinstance(declared.size, Mapping) else declared.size
    if size is None:
        return min(most, _USUAL_INTERRUPT_SIZE) if declared.type is INTERRUPT else most
    if declared.type is BULK and size not in _BULK_SIZES[speed]:
        allowed = ", ".join(map(str, _BULK_SIZES[speed]))
        raise declared.error(f"bulk packets of {speed.name.lower()} speed have {allowed} bytes, not {size}")
    if not 0 <= size <= most:
        raise declared.error(
            f"at {speed.name.lower()} speed at most {most} bytes per interval are possible, not {size}"
        )
    return size


def _interval(declared: EndpointDeclaration, speed: Speed) -> int:
    if declared.type is BULK:
        return 0
    slow = speed in (Speed.LOW, Speed.FULL)
    linear = slow and declared.type is INTERRUPT
    least = _LOW_SPEED_MILLISECONDS if speed is Speed.LOW else 1
    most = 255 if linear else 16
    if declared.interval is not None:
        if not least <= declared.interval <= most:
            raise declared.error(
                f"bInterval is {least} to {most} at {speed.name.lower()} speed, not {declared.interval}"
            )
        return declared.interval
    units = int(declared.period / (FRAME if slow else MICROFRAME) + 1e-6)
    return min(max(units if linear else units.bit_length(), least), most)


def _packets(size: int, speed: Speed) -> tuple[int, int]:
    """wMaxPacketSize and bMaxBurst for *size* bytes per interval: above 1024 it takes several packets."""
    further = (size - 1) // 1024 if size else 0
    if speed is Speed.SUPER:
        return (1024 if further else size), further
    return -(-size // (further + 1)) | further << 11, 0
