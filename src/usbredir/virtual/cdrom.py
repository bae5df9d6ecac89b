"""A USB CD or DVD drive with an ISO image as its disc.

::

    drive = Cdrom("debian.iso")
    drive.eject()
    drive.insert("second.iso")
"""

from __future__ import annotations

from ..proto import Speed
from .bulk_only import BulkOnlyDevice, checked_serial, checked_speed, default_serial
from .medium import BLOCK_SIZE, Medium, MediumSource, open_medium
from .scsi_cdrom import CD_BLOCK_SIZE, ScsiCdrom

__all__ = ["Cdrom"]


class Cdrom(BulkOnlyDevice):
    """A CD-ROM drive; an image too large for a CD is a DVD. Discs are read-only and have one data track.

    Args:
        disc: path of an ISO image or block device; or its content; or a medium of one's own; None: no disc yet.
            The device closes it when another takes its place, and at the end.
        speed: FULL, HIGH or SUPER.
        serial: serial number, at least 12 digits 0-9 A-F (BOT, 4.1.1). By default made from *disc*, the same each
            time.

    Raises:
        OSError: the file cannot be opened or is smaller than 512 bytes.
        ValueError: the disc is smaller than a block of 2048 bytes, or *speed* or *serial* is not as above.

    Threads: insert and eject from any; otherwise as :class:`~usbredir.virtual.VirtualDevice`.
    """

    vendor_id, product_id = 0x1209, 0x000A
    manufacturer, product = "usbredir", "Virtual CD-ROM"

    def __init__(
        self, disc: MediumSource | None = None, *, speed: Speed = Speed.HIGH, serial: str | None = None
    ) -> None:
        self.speed = checked_speed(speed)
        self.serial = checked_serial(default_serial(b"" if disc is None else disc) if serial is None else serial)
        self._drive = ScsiCdrom(vendor=self.manufacturer, product=self.product, revision="1.0", serial=self.serial)
        self._disc: Medium | None = None
        if disc is not None:
            self._disc = _open_disc(disc)
            self._drive.insert(self._disc)
        super().__init__(self._drive)

    @property
    def medium_present(self) -> bool:
        """Whether the guest can read a disc: there is one, and the tray is closed."""
        return self._drive.medium_present

    @property
    def locked(self) -> bool:
        """Whether the guest keeps the tray closed, as it does while the disc is mounted."""
        return self._drive.removal_prevented

    def insert(self, disc: MediumSource) -> None:
        """Change the disc, even one that the guest uses, and close the tray; the guest is told.

        Raises OSError or ValueError as the constructor; the disc is then the one before.
        """
        opened = _open_disc(disc)
        with self._hooks:
            before, self._disc = self._disc, opened
            self._drive.insert(opened)
            if before is not None:
                before.close()

    def eject(self) -> bool:
        """Press the button: the tray opens with the disc on it, until the guest loads or :meth:`insert` is called.

        False: the guest has locked the tray. It is told that somebody pressed the button, and may open the tray.
        """
        with self._hooks:
            return self._drive.press_button()

    def close(self) -> None:
        """Close the device, then the disc. Idempotent."""
        super().close()
        with self._hooks:  # not under the feet of a hook that is still reading
            if self._disc is not None:
                self._disc.close()


def _open_disc(source: MediumSource) -> Medium:
    disc = open_medium(source, read_only=True)
    if disc.blocks * BLOCK_SIZE < CD_BLOCK_SIZE:
        disc.close()
        raise ValueError(f"a disc needs at least one block of {CD_BLOCK_SIZE} bytes")
    return disc
