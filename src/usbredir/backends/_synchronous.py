"""Devices of other pyusb backends, which have synchronous calls only."""

from ._base import BaseDevice


class SynchronousDevice(BaseDevice):
    """To be written."""
