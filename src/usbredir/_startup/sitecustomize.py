"""Run by every Python that starts below ``usbredir run``: pyusb's back ends are replaced when they get imported.

Nothing else of the program changes, and nothing is imported before pyusb is. The program's own ``sitecustomize``, which
this one hides, runs as well. It uses the ``usbredir`` beside it, wherever the interpreter has its packages.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any

__all__ = ["BACKENDS", "VARIABLE"]

VARIABLE = "USBREDIR_RUN"
"""Environment variable with what ``usbredir._pyusb_handover`` needs: where connections wait, and the addresses."""
BACKENDS = ("usb.backend.libusb1", "usb.backend.libusb0", "usb.backend.openusb")
FOLDER = os.path.dirname(os.path.abspath(__file__))
PACKAGE = os.path.dirname(FOLDER)


class _BackendFinder:
    """Finds pyusb's back ends as always; once loaded, their ``get_backend`` is ours."""

    @staticmethod
    def find_spec(name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name not in BACKENDS:
            return None
        spec = PathFinder.find_spec(name, path)
        if spec is not None and spec.loader is not None:
            load = spec.loader.exec_module

            def load_and_replace(module: ModuleType) -> None:
                load(module)
                module.get_backend = _get_backend  # type: ignore[attr-defined]

            spec.loader.exec_module = load_and_replace  # type: ignore[method-assign]
        return spec


def _get_backend(find_library: object = None) -> Any:
    """In place of the functions of pyusb. Raises USBError when nobody answers."""
    _provide_usbredir()
    from usbredir import _pyusb_handover

    return _pyusb_handover.backend(os.environ[VARIABLE])


def _provide_usbredir() -> None:
    """Make the package importable where it is not installed, and only it, not what stands beside it."""
    if importlib.util.find_spec("usbredir") is None:
        spec = importlib.util.spec_from_file_location("usbredir", os.path.join(PACKAGE, "__init__.py"))
        assert spec is not None
        assert spec.loader is not None
        module = sys.modules["usbredir"] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)


def _run_hidden() -> None:
    """The next ``sitecustomize`` on the path, if there is one."""
    path = [entry for entry in sys.path if os.path.abspath(entry) != FOLDER]
    spec = PathFinder.find_spec("sitecustomize", path)
    if spec is not None and spec.loader is not None:
        module = sys.modules["sitecustomize"] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)


if __name__ == "sitecustomize" and VARIABLE in os.environ:
    sys.meta_path.insert(0, _BackendFinder)
    _run_hidden()
