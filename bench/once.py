"""Long work that several rows want is done once; a failure, too, is remembered."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import TypeVar

__all__ = ["once"]

Argument = TypeVar("Argument", bound=Hashable)
Result = TypeVar("Result")


def once(work: Callable[[Argument], Result]) -> Callable[[Argument], Result]:
    """A function that does *work* once for each argument, and raises its RuntimeError as often as it is called."""
    results: dict[Argument, Result] = {}
    errors: dict[Argument, RuntimeError] = {}

    def result(argument: Argument) -> Result:
        if argument in errors:
            raise errors[argument]
        if argument not in results:
            try:
                results[argument] = work(argument)
            except RuntimeError as error:
                errors[argument] = error
                raise
        return results[argument]

    return result
