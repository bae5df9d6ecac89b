"""A USB stick: a disk image, block device or bytes behind the Bulk-Only Transport.

::

    device = MassStorage("disk.img")
    device = MassStorage(make_image({"hello.txt": b"hello"}), read_only=True)
"""

from __future__ import annotations

from ..proto import Speed
from .bulk_only import BulkOnlyDevice, checked_serial, checked_speed, default_serial
from .medium import MediumSource, open_medium
from .scsi_disk import ScsiDisk

__all__ = ["MassStorage"]


class MassStorage(BulkOnlyDevice):
    """A USB stick with one disk.

    What the guest wrote is with the operating system before the guest sees the command's status, so that
    the end of this process loses nothing; SYNCHRONIZE CACHE and FUA bring it to stable storage.

    Args:
        source: path of an image file or block device, used in place; or the content, kept in
            memory; or a medium of one's own. The device closes it.
        read_only: write protected.
        removable: the guest can eject the disk. Without, guests ask less often whether it is still there.
        speed: FULL, HIGH or SUPER.
        serial: serial number, at least 12 digits 0-9 A-F (BOT, 4.1.1). By default made from *source*, the
            same each time.

    Raises:
        OSError: the file cannot be opened or is smaller than a block of 512 bytes.
        ValueError: the content is smaller than a block, or *speed* or *serial* is not as above.
    """

    # The ids of Linux's own mass storage gadget, which every operating system has met.
    vendor_id, product_id = 0x0525, 0xA4A5
    manufacturer, product = "usbredir", "Virtual Disk"

    def __init__(
        self,
        source: MediumSource,
        *,
        read_only: bool = False,
        removable: bool = True,
        speed: Speed = Speed.HIGH,
        serial: str | None = None,
    ) -> None:
        self.speed = checked_speed(speed)
        self.serial = checked_serial(default_serial(source) if serial is None else serial)
        self._medium = open_medium(source, read_only=read_only)
        self._disk = ScsiDisk(
            self._medium,
            read_only=read_only,
            removable=removable,
            vendor=self.manufacturer,
            product=self.product,
            serial=self.serial,
        )
        super().__init__(self._disk)

    @property
    def medium_present(self) -> bool:
        """Whether the guest has not ejected the disk. A bus reset brings it back."""
        return self._disk.medium_present

    def close(self) -> None:
        """Close the device, then its file. Idempotent."""
        super().close()
        with self._hooks:  # not under the feet of a hook that is still reading
            self._medium.close()
