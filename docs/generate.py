"""Writes the generated tables of README.md and docs/: ``python docs/generate.py``.

A table stands between ``<!-- generated: NAME -->`` and ``<!-- end -->``. ``--check`` changes nothing and
exits with 1 when a table is stale; ``--print NAME`` shows one.
"""

from __future__ import annotations

import argparse
import ast
import inspect
import re
import sys
import textwrap
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from usbredir import _framing, _state, errors
from usbredir._exchange import ExchangeView
from usbredir._layout import Declaration, Wire, describe_layout
from usbredir.guest import Guest
from usbredir.host import Host
from usbredir.limits import Limits
from usbredir.packets import PACKET_TYPES
from usbredir.parser import Parser
from usbredir.proto import Capability

ROOT = Path(__file__).resolve().parent.parent
BLOCK = re.compile(r"(<!-- generated: ([a-z-]+) -->\n).*?(<!-- end -->)", re.DOTALL)
CODES = {"B": "u8", "H": "u16", "I": "u32", "64s": "char[64]"}
EVERYTHING = sum(1 << capability for capability in Capability)


def table(head: str, rows: Iterable[Iterable[object]]) -> str:
    """A Markdown table; *head* names the columns, separated by bars."""
    columns = head.split("|")
    lines = [columns, ["---"] * len(columns), *rows]
    return "".join(f"| {' | '.join(str(cell).strip() for cell in line)} |\n" for line in lines)


def in_one_line(text: str) -> str:
    """Docstring text for a table cell: reStructuredText's marks in Markdown's form."""
    text = re.sub(r":\w+:`~?([^`]+)`", r"``\1``", " ".join(text.split()))
    return text.replace("``", "`").replace("|", "\\|")


# ---------------------------------------------------------------- packets


def packets() -> str:
    """The 33 packets, from their declarations."""
    return table(
        "type|packet|sent by|id|bytes|type header|data behind it|needs",
        (_packet(cls.declaration) for cls in PACKET_TYPES.values()),
    )


def _packet(declaration: Declaration) -> Iterator[str]:
    yield str(int(declaration.packet_type))
    yield f"`{declaration.name}`"
    yield {"host to guest": "host", "guest to host": "guest", "both": "both"}[declaration.direction.value]
    yield "yes" if declaration.carries_id else "0"
    yield _sizes(declaration)
    yield ", ".join(_field(declaration, name, wire) for name, wire in declaration.header_fields(EVERYTHING)) or "-"
    text = next((f.wire.text for f in declaration.fields if f.wire.in_data), "-")
    yield "transfer's bytes" if declaration.transfers else text
    yield "-" if declaration.needs is None else f"`{declaration.needs.name}`"


def _sizes(declaration: Declaration) -> str:
    """Sizes of the type header, the full one first."""
    sizes = {
        sum(size for _, size, _ in describe_layout(declaration, both & EVERYTHING))
        for both in range(EVERYTHING + 1)
        if both == both & declaration.capabilities
    }
    return " / ".join(str(size) for size in sorted(sizes, reverse=True))


def _field(declaration: Declaration, name: str, wire: Wire) -> str:
    code = CODES[wire.code] + (f"[{wire.count}]" if wire.count > 1 else "")
    since = list(wire.since)
    if name.endswith("_high"):
        whole = next(f for f in declaration.fields if f.name + "_high" == name)
        assert whole.wire.high_half_since is not None
        since = [whole.wire.high_half_since]
    condition = f" (`{'` or `'.join(capability.name for capability in since)}`)" if since else ""
    return f"{name} {code}{condition}"


def c_packets() -> str:
    """C names of the packets."""
    return table(
        "packet class|send function|callback field and its type",
        (
            (
                f"`{cls.__name__}`",
                "sent by the parser itself"
                if name in ("hello", "device_disconnect_ack")
                else f"`usbredirparser_send_{name}()`",
                f"`{name}_func`, `usbredirparser_{name}`",
            )
            for cls in PACKET_TYPES.values()
            for name in [cls.packet_type.name.lower()]
        ),
    )


# ---------------------------------------------------------------- threads, errors, limits, modules


def threads_of(cls: type, name: str) -> str:
    """What the docstring of a method says behind "Threads:", or that of its class for all of them."""
    for documented in (inspect.getattr_static(cls, name), cls):
        found = re.search(r"Threads:(.*?)(\n\s*\n|\Z)", inspect.getdoc(documented) or "", re.DOTALL)
        if found and "each method tells" not in found[1]:
            return in_one_line(found[1]).strip().removesuffix(".")
    raise ValueError(f"{cls.__name__}.{name}: nothing is said of threads")


def public_members(cls: type) -> list[str]:
    """The public methods and properties of a class, in its order; first those that guests share."""
    members = {**(vars(ExchangeView) if issubclass(cls, ExchangeView) else {}), **vars(cls)}
    return [name for name, member in members.items() if name[0] != "_" and (callable(member) or is_property(member))]


def is_property(member: object) -> bool:
    """Whether a class member is a property."""
    return isinstance(member, property)


def threads(cls: type) -> str:
    """The thread-safety of a class."""
    rows = ((_signature(cls, name), threads_of(cls, name)) for name in public_members(cls))
    return table(f"{cls.__name__}|callers", rows)


def _signature(cls: type, name: str) -> str:
    return f"`{name}`" if is_property(inspect.getattr_static(cls, name)) else f"`{name}()`"


def reasons(meanings: dict[str, str]) -> str:
    """Keys of errors and what they mean."""
    return table("reason|meaning", ((f"`{key}`", in_one_line(meaning)) for key, meaning in meanings.items()))


def limits() -> str:
    """The limits, with defaults and meanings."""
    doc = textwrap.dedent(inspect.cleandoc(Limits.__doc__ or "").partition("Attributes:")[2])
    meanings = dict(re.findall(r"^(\w+): (.+?)(?=^\w|\Z)", doc, re.MULTILINE | re.DOTALL))
    return table(
        "limit|default|meaning",
        (
            (f"`{name}`", _number(default), in_one_line(meanings[name]))
            for name, default in Limits._field_defaults.items()
        ),
    )


def _number(value: object) -> str:
    return f"{value:,}".replace(",", " ") if isinstance(value, int) else str(value)


def modules(*, private: bool) -> str:
    """The modules and the first sentence of their docstrings."""
    source = ROOT / "src" / "usbredir"
    rows = []
    for path in sorted(source.rglob("*.py"), key=lambda p: (len(p.relative_to(source).parts), p.as_posix())):
        name = ".".join(path.relative_to(source).with_suffix("").parts)
        first = (ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or "").partition("\n\n")[0]
        if ("._" in f".{name}") is private and not name.endswith("__init__"):
            rows.append((f"`usbredir.{name}`", in_one_line(first).rstrip(":")))
    return table("module|what it is", rows)


def error_tree() -> str:
    """The exceptions, as drawn in their module."""
    found = re.search(r"^::\n\n((?:    .*\n)+)", errors.__doc__ or "", re.MULTILINE)
    assert found, "the tree is a literal block"
    return f"```text\n{textwrap.dedent(found[1])}```\n"


BLOCKS: dict[str, Callable[[], str]] = {
    "packets": packets,
    "c-packets": c_packets,
    "threads-parser": lambda: threads(Parser),
    "threads-host": lambda: threads(Host),
    "threads-guest": lambda: threads(Guest),
    "error-tree": error_tree,
    "packet-reasons": lambda: reasons(_framing.REASONS),
    "state-reasons": lambda: reasons(_state.MESSAGES),
    "limits": limits,
    "modules": lambda: modules(private=False),
    "private-modules": lambda: modules(private=True),
}


def pages() -> list[Path]:
    """The files that may hold generated tables."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def updated(text: str) -> str:
    """*text* with its tables made anew."""
    return BLOCK.sub(lambda found: found[1] + BLOCKS[found[2]]() + found[3], text)


def main(arguments: list[str]) -> int:
    """Update, check or print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="only tell which pages are stale")
    parser.add_argument("--print", choices=BLOCKS, dest="block", help="show one table")
    options = parser.parse_args(arguments)
    if options.block:
        print(BLOCKS[options.block](), end="")
        return 0
    stale = [page for page in pages() if updated(page.read_text(encoding="utf-8")) != page.read_text(encoding="utf-8")]
    for page in stale:
        print(f"{page.relative_to(ROOT)}: {'stale' if options.check else 'updated'}")
        if not options.check:
            page.write_text(updated(page.read_text(encoding="utf-8")), encoding="utf-8")
    return 1 if stale and options.check else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
