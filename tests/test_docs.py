"""README.md and docs/: examples run, generated tables are fresh, lists are complete, links lead somewhere."""

from __future__ import annotations

import argparse
import importlib.util
import inspect
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from usbredir import _framing, _state, cli, errors
from usbredir._exchange import ExchangeView
from usbredir.guest import Guest, GuestCallbacks
from usbredir.host import Host, HostCallbacks
from usbredir.limits import Limits
from usbredir.locking import LockCallbacks
from usbredir.packets import PACKET_TYPES
from usbredir.parser import Parser, ParserCallbacks, StreamCallbacks
from usbredir.virtual import VirtualDevice

from .test_architecture import LAYERS

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
SOURCE = ROOT / "src" / "usbredir"
PAGES = [ROOT / "README.md", ROOT / "CHANGELOG.md", ROOT / "CONTRIBUTING.md", *sorted(DOCS.glob("*.md"))]
CODE = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
PATIENCE = 60.0
"""Seconds that the examples of a page may take on a busy machine."""

RUNNER = """\
import sys
for name, code in eval(sys.stdin.read()):
    exec(compile(code, name, "exec"), {"__name__": "__main__"})
"""
"""Runs blocks of code, each with names of its own."""

# Names of usbredirparser.h, usbredirfilter.h and usbredirhost.h that do not follow from the packets.
C_NAMES = re.findall(
    r"\w+",
    """
usbredirparser_create usbredirparser_init usbredirparser_destroy usbredirparser_caps_set_cap usbredirparser_have_cap
usbredirparser_have_peer_caps usbredirparser_peer_has_cap usbredirparser_do_read usbredirparser_do_write
usbredirparser_has_data_to_write usbredirparser_get_bufferered_output_size usbredirparser_free_write_buffer
usbredirparser_free_packet_data usbredirparser_serialize usbredirparser_unserialize USBREDIRPARSER_SERIALIZE_MAGIC
usbredirparser_fl_usb_host usbredirparser_fl_write_cb_owns_buffer usbredirparser_fl_no_hello
usbredirparser_read_io_error usbredirparser_read_parse_error usbredirparser_write_io_error
usbredirparser_log usbredirparser_read usbredirparser_write usbredirparser_alloc_lock usbredirparser_lock
usbredirparser_unlock usbredirparser_free_lock usbredirparser_none usbredirparser_error usbredirparser_warning
usbredirparser_info usbredirparser_debug usbredirparser_debug_data
priv log_func read_func write_func alloc_lock_func lock_func unlock_func free_lock_func
USBREDIR_VERSION USB_REDIR_CAPS_SIZE usb_redir_cap_bulk_streams usb_redir_cap_connect_device_version
usb_redir_cap_filter usb_redir_cap_device_disconnect_ack usb_redir_cap_ep_info_max_packet_size
usb_redir_cap_64bits_ids usb_redir_cap_32bits_bulk_length usb_redir_cap_bulk_receiving
usbredirfilter_rule usbredirfilter_string_to_rules usbredirfilter_rules_to_string usbredirfilter_check
usbredirfilter_fl_default_allow usbredirfilter_fl_dont_skip_non_boot_hid usbredirfilter_verify usbredirfilter_print
usbredirfilter_free
usbredirhost_open usbredirhost_open_full usbredirhost_fl_write_cb_owns_buffer usbredirhost_close
usbredirhost_set_device usbredirhost_set_buffered_output_size_cb usbredirhost_buffered_output_size
usbredirhost_read_guest_data usbredirhost_has_data_to_write usbredirhost_write_guest_data
usbredirhost_free_write_buffer usbredirhost_get_guest_filter usbredirhost_check_device_filter
usbredirhost_read_io_error usbredirhost_read_parse_error usbredirhost_read_device_rejected
usbredirhost_read_device_lost usbredirhost_write_io_error usbredirhost_flush_writes
read_guest_data_func write_guest_data_func flush_writes_func buffered_output_size_func
""",
)

every_page = pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)


def text_of(name: str) -> str:
    return (DOCS / name).read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def generate() -> ModuleType:
    """docs/generate.py, which is no package's module."""
    spec = importlib.util.spec_from_file_location("generate", DOCS / "generate.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# ================================================================ examples


@every_page
def test_examples_run(page: Path, tmp_path: Path) -> None:
    """Every python block, with names of its own, without a word on stderr."""
    content = page.read_text(encoding="utf-8")
    blocks = [(f"{page.name}:{content.count(chr(10), 0, m.start()) + 2}", m[1]) for m in CODE.finditer(content)]
    if not blocks:
        return
    result = subprocess.run(
        [sys.executable, "-W", "error", "-c", RUNNER],
        input=repr(blocks),
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        cwd=tmp_path,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert not result.stderr


def test_readme_begins_with_the_two_commands() -> None:
    first = re.search(
        r"^```\w*\n(.*?)^```$", (ROOT / "README.md").read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL
    )
    assert first is not None
    assert first[1].splitlines() == [
        "python3 -m venv .venv && .venv/bin/pip install -q -e '.[test]' && .venv/bin/usbredir demo",
        ".venv/bin/pytest",
    ]


# ================================================================ generated tables


@every_page
def test_generated_tables_are_fresh(page: Path, generate: ModuleType) -> None:
    """`python docs/generate.py` writes them."""
    content = page.read_text(encoding="utf-8")
    assert generate.updated(content) == content


def test_every_generated_table_is_used(generate: ModuleType) -> None:
    used = re.findall(r"<!-- generated: (.*) -->", "".join(p.read_text(encoding="utf-8") for p in generate.pages()))
    assert sorted(used) == sorted(generate.BLOCKS)


def test_a_stale_table_is_found(generate: ModuleType) -> None:
    stale = "<!-- generated: limits -->\nold\n<!-- end -->\n"
    assert generate.updated(stale) == f"<!-- generated: limits -->\n{generate.limits()}<!-- end -->\n"
    assert all(f"`{name}`" in generate.limits() for name in Limits._fields)


def test_the_table_of_packets_is_complete() -> None:
    table = text_of("protocol.md").partition("<!-- generated: packets -->")[2].partition("<!-- end -->")[0]
    rows = re.findall(r"^\| (\d+) \| `(\w+)` \|", table, re.MULTILINE)
    assert [(int(number), name) for number, name in rows] == [(n, c.__name__) for n, c in PACKET_TYPES.items()]


# ================================================================ errors


def reason_keys() -> set[str]:
    written = re.compile(r"""reason ?=\s?["'](\w+)["']|_refused\([^)]*, ["'](\w+)["']\)""")
    found = {
        key
        for path in SOURCE.rglob("*.py")
        for match in written.findall(path.read_text(encoding="utf-8"))
        for key in match
        if key
    }
    return found | set(_framing.REASONS) | set(_state.MESSAGES)


def test_every_reason_is_documented() -> None:
    documented = set(re.findall(r"^\| `(\w+)` \|", text_of("errors.md"), re.MULTILINE))
    assert "queue_full" in reason_keys()
    assert "send_type_not_allowed" in reason_keys()
    assert reason_keys() <= documented
    for meanings in (_framing.REASONS, _state.MESSAGES):
        for key, meaning in meanings.items():
            assert f"| `{key}` | {meaning} |" in text_of("errors.md")


def test_every_documented_reason_exists() -> None:
    documented = set(re.findall(r"^\| `([a-z_]+)` \|", text_of("errors.md"), re.MULTILINE))
    assert documented == reason_keys()


@pytest.mark.parametrize("name", errors.__all__)
def test_every_exception_is_documented(name: str) -> None:
    assert name in text_of("errors.md")


# ================================================================ threads


def public_members(cls: type) -> Iterator[tuple[str, str]]:
    """Names and docstrings of public methods and properties, with those that guests share."""
    shared = vars(ExchangeView) if issubclass(cls, ExchangeView) else {}
    for name, member in {**shared, **vars(cls)}.items():
        if not name.startswith("_") and (callable(member) or isinstance(member, property)):
            yield name, inspect.getdoc(member) or ""


def said_of_threads(docstring: str) -> str | None:
    """What follows "Threads:" in a docstring, in one line."""
    found = re.search(r"Threads:\s*(.+?)\.?\s*(?:\n\n|\Z)", docstring, re.DOTALL)
    return " ".join(found[1].split()).replace("``", "`") if found else None


@pytest.mark.parametrize("cls", [Parser, Host, Guest])
def test_threads_of_every_method(cls: type) -> None:
    """The table says the words of the docstring, or of the class where that speaks for all its methods."""
    page = text_of("threads.md")
    table = page[page.index(f"| {cls.__name__} | callers |") :].partition("\n\n")[0]
    rows = dict(re.findall(r"^\| `(\w+)(?:\(\))?` \| (.+) \|$", table, re.MULTILINE))
    whole_class = said_of_threads(inspect.getdoc(cls) or "")
    for name, docstring in public_members(cls):
        said = said_of_threads(docstring)
        if said is None:
            assert whole_class is not None
            assert "each method tells" not in whole_class, f"{name} does not tell"
            said = whole_class
        assert rows.pop(name) == said
    assert not rows, "no such method"


# ================================================================ command line


@pytest.mark.parametrize("code", cli.ExitCode)
def test_every_exit_code_is_documented(code: cli.ExitCode) -> None:
    assert f"| {int(code)} | `{code.name}` | " in text_of("cli.md")


def commands(parser: argparse.ArgumentParser) -> Iterator[tuple[str, argparse.ArgumentParser]]:
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            yield from action.choices.items()


def test_every_command_and_option_is_documented() -> None:
    page = text_of("cli.md")
    for name, command in commands(cli._parser()):
        assert f"`usbredir {name}`" in page
        for action in command._actions:
            assert all(f"`{option}" in page for option in action.option_strings)


# ================================================================ lists in other pages


def described(page: str, name: str) -> bool:
    """Whether *page* has *name* as code."""
    return re.search(rf"`[^`\n]*\b{re.escape(name)}\b[^`\n]*`", page) is not None


@pytest.mark.parametrize(
    ("page", "cls"),
    [
        ("parser.md", Parser),
        ("guest.md", Guest),
        ("parser.md", StreamCallbacks),
        ("parser.md", ParserCallbacks),
        ("guest.md", GuestCallbacks),
        ("threads.md", HostCallbacks),
        ("threads.md", LockCallbacks),
    ],
)
def test_methods_are_described(page: str, cls: type) -> None:
    elsewhere = {"Parser": "migration.md", "Guest": "threads.md"}
    text = text_of(page) + (text_of(elsewhere[cls.__name__]) if cls.__name__ in elsewhere else "")
    for name, _ in public_members(cls):
        assert described(text, name), f"{cls.__name__}.{name}"


def test_hooks_are_described() -> None:
    page = text_of("virtual.md")
    base = inspect.getsource(VirtualDevice)
    hooks = base[base.index("# ---") : base.index("UsbDevice: description")]
    for name in re.findall(r"def ([a-z]\w*)\(", hooks):
        assert described(page, name), name


@pytest.mark.parametrize("name", C_NAMES)
def test_every_c_name_has_its_place(name: str) -> None:
    assert described(text_of("c-to-python.md"), name)


def test_every_c_packet_has_its_place() -> None:
    page = text_of("c-to-python.md")
    for cls in PACKET_TYPES.values():
        name = cls.packet_type.name.lower()
        assert described(page, f"{name}_func")
        assert described(page, f"usbredirparser_{name}")
        assert name in ("hello", "device_disconnect_ack") or described(page, f"usbredirparser_send_{name}")


def test_layers_are_those_that_are_checked() -> None:
    rows = re.findall(r"^ *(\d+)  (\S.*)$", text_of("architecture.md"), re.MULTILINE)
    assert {int(level): names.split() for level, names in rows} == {k: v.split() for k, v in LAYERS.items()}


# ================================================================ links


def anchors(page: Path) -> set[str]:
    """What headings are called in links."""
    content = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    titles = re.findall(r"^#+ (.+)$", content, re.MULTILINE)
    return {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}


@every_page
def test_links_lead_somewhere(page: Path) -> None:
    content = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    for target in re.findall(r"\]\(([^)]+)\)", content):
        name, _, anchor = target.partition("#")
        if name.startswith("https://"):
            continue
        linked = (page.parent / name).resolve() if name else page
        assert linked.exists(), target
        if anchor:
            assert anchor in anchors(linked), target


def test_index_has_every_page() -> None:
    linked = set(re.findall(r"\]\(([\w-]+\.md)\)", text_of("index.md")))
    assert linked == {page.name for page in DOCS.glob("*.md")} - {"index.md"}


def test_sources_name_pages_and_headings_that_exist() -> None:
    """As in ``Source: docs/host.md, "Announcing" and "Streams".``"""
    for path in SOURCE.rglob("*.py"):
        for name, headings in re.findall(r'docs/([\w-]+\.md)((?:,? (?:and )?"[^"\n]+")*)', path.read_text("utf-8")):
            page = DOCS / name
            assert page.exists(), f"{path.name}: {name}"
            for heading in re.findall(r'"([^"]+)"', headings):
                assert heading.lower().replace(" ", "-") in anchors(page), f"{path.name}: {name}, {heading}"


@every_page
def test_lines_are_not_too_long(page: Path) -> None:
    """Tables and code may be wider."""
    for number, line in enumerate(page.read_text(encoding="utf-8").splitlines(), 1):
        assert len(line) <= 160 or line.startswith("|"), f"{page.name}:{number}"
