"""A real Linux guest in QEMU, for the end-to-end tests."""
