"""Real devices: each module here makes :class:`~usbredir.device.UsbDevice` objects of what a library finds."""

__all__: list[str] = []
