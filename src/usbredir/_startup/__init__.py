"""A folder for PYTHONPATH: every Python that starts below ``usbredir run`` imports its ``sitecustomize``."""

__all__: list[str] = []
