"""USB redirection in pure Python: one USB device, its transfers tunnelled over a stream.

The *host* has the device, the *guest* uses it. See docs/index.md for where to begin:

* ``usbredir.parser`` frames the protocol,
* ``usbredir.host`` exports a device, real (pyusb) or written in Python (``usbredir.virtual``),
* ``usbredir.guest`` uses a device at the other end,
* ``usbredir.locking`` is how an application switches thread-safety on.
"""

__version__ = "0.1.0"
