"""``usbredir run``: programs with pyusb that find remote devices, and are not changed for it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from usbredir import cli
from usbredir._startup.sitecustomize import BACKENDS, VARIABLE
from usbredir.transport import listen, serve
from usbredir.virtual import LoopbackDevice

from .command_bed import Outcome, call_main, signals
from .instruments import BenchmarkDevice
from .pyusb_bed import PATIENCE, exported, run_with

__all__ = ["signals"]

PYTHON = sys.executable, "-X", "dev", "-W", "error"
"""Nothing may be left open, nor warn."""
FIND = "import usb.core; print(usb.core.find().product)"


@pytest.fixture
def address() -> Iterator[str]:
    with exported(LoopbackDevice()) as exported_at:
        yield exported_at


# ================================================================ what is run


def test_a_script(address: str, tmp_path: Path) -> None:
    """It gets its arguments, also those that look like ours, and its input; its exit code is the command's."""
    script = tmp_path / "script.py"
    script.write_text("import sys, usb.core; print(usb.core.find().product, sys.argv[1:], input()); sys.exit(7)")
    arguments = "--connect", "--", "--filter", "-1,-1,-1,-1,1", "--help"
    output = run_with(address, *PYTHON, script, *arguments, code=7, text="read\n")
    assert output == f"Loopback {list(arguments)} read\n"


def test_a_module(address: str, tmp_path: Path) -> None:
    (tmp_path / "some_module.py").write_text(FIND)
    assert run_with(address, *PYTHON, "-m", "some_module", folder=tmp_path) == "Loopback\n"


def test_several_devices(address: str) -> None:
    script = "import usb.core; print(*(device.product for device in usb.core.find(find_all=True)))"
    with exported(BenchmarkDevice()) as second:
        assert run_with(address, *PYTHON, "-c", script, more=[second, address]) == "Loopback Benchmark Device\n"


@pytest.mark.parametrize("module", BACKENDS)
def test_back_ends_that_programs_choose(address: str, module: str) -> None:
    """Whichever it is; with the ways in which they are imported and called."""
    script = f"""
import usb.core, {module} as module
from {module} import get_backend
for backend in (module.get_backend(), get_backend(find_library=lambda name: None)):
    print(usb.core.find(backend=backend).product, type(backend).__module__)
print(module.__file__.rsplit("/", 1)[-1])
"""
    lines = run_with(address, *PYTHON, "-c", script).splitlines()
    assert lines == ["Loopback usbredir.pyusb_backend"] * 2 + [module.rpartition(".")[2] + ".py"]


def test_the_old_interface(address: str) -> None:
    """That of pyusb 0.x."""
    script = "import usb; print([device.idProduct for bus in usb.busses() for device in bus.devices])"
    assert run_with(address, *PYTHON, "-c", script) == "[1]\n"


def test_nothing_is_imported_before_it_is_needed(address: str) -> None:
    script = "import sys; print([name for name in sys.modules if name.startswith(('usb', 'logging'))])"
    assert run_with(address, *PYTHON, "-c", script) == "[]\n"


# ================================================================ processes


def test_processes_that_the_program_starts(address: str) -> None:
    """They inherit it, one after the other."""
    script = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {FIND!r}], check=True)"
    assert run_with(address, *PYTHON, "-c", f"{script}; {script}") == "Loopback\n" * 2


def test_programs_that_are_no_python(address: str) -> None:
    """What they start is."""
    command = f'{sys.executable} -c "{FIND}"; {sys.executable} -c "{FIND}"; exit 3'
    assert run_with(address, "sh", "-c", command, code=3) == "Loopback\n" * 2


def test_the_host_sees_one_guest() -> None:
    """The connection that was tried is the one that is used: some hosts end with their first guest."""
    device = LoopbackDevice()
    with listen("127.0.0.1:0") as listener:
        command = [sys.executable, "-m", "usbredir", "run", "--connect", str(listener.address), "--", *PYTHON]
        with subprocess.Popen([*command, "-c", FIND], stdout=subprocess.PIPE, text=True) as program:
            connection = listener.accept(PATIENCE)
            assert connection is not None
            with connection:
                serve(connection, device)
            assert program.communicate(timeout=PATIENCE)[0] == "Loopback\n"
        assert listener.accept(0) is None
    device.close()


def test_the_program_is_the_process(address: str) -> None:
    """Signals reach it: nobody is between."""
    command = [sys.executable, "-m", "usbredir", "run", "--connect", address, "--", *PYTHON, "-c"]
    script = "import os, signal; print(os.getpid(), flush=True); signal.pause()"
    with subprocess.Popen([*command, script], stdout=subprocess.PIPE, text=True) as program:
        assert program.stdout is not None
        assert int(program.stdout.readline()) == program.pid
        program.send_signal(signal.SIGTERM)
        assert program.wait(PATIENCE) == -signal.SIGTERM


# ================================================================ the environment


def test_the_programs_own_sitecustomize_runs(address: str, tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text("import sys; sys.was_customized = __file__")
    script = f"import sys, sitecustomize; print(sys.was_customized == sitecustomize.__file__); {FIND}"
    output = run_with(address, *PYTHON, "-c", script, PYTHONPATH=str(tmp_path))
    assert output == "True\nLoopback\n"


def test_without_the_variable_nothing_happens(tmp_path: Path) -> None:
    """The folder is still on the path of a program that removed the variable."""
    folder = Path(cli.__file__).parent / "_startup"
    environment = {name: value for name, value in os.environ.items() if name != VARIABLE}
    script = "import sys; print([finder for finder in sys.meta_path if finder.__module__ == 'sitecustomize'])"
    finished = subprocess.run(
        [*PYTHON, "-c", script],
        env={**environment, "PYTHONPATH": str(folder)},
        capture_output=True,
        text=True,
        check=True,
        timeout=PATIENCE,
    )
    assert finished.stdout == "[]\n"


def test_a_host_that_has_gone(address: str) -> None:
    """The program gets an error that it may handle, with the address."""
    script = """
import os, usb.core
os.environ["USBREDIR_RUN"] = "\\nunix:/nonexistent/socket"
try:
    usb.core.find()
except usb.core.USBError as error:
    print(error)
"""
    assert "unix:/nonexistent/socket" in run_with(address, *PYTHON, "-c", script)


def test_what_holds_the_connection_ends_with_the_program(address: str) -> None:
    """Also when nobody has fetched it; its folder is gone. The host has the device for others then."""
    script = "import os; print(os.environ['USBREDIR_RUN'].split()[0])"
    folder = Path(run_with(address, *PYTHON, "-c", script).strip())
    assert run_with(address, *PYTHON, "-c", FIND) == "Loopback\n"
    assert not folder.exists()


def test_a_folder_with_a_name_too_long_for_sockets(address: str, tmp_path: Path) -> None:
    """The connection waits elsewhere."""
    folder = tmp_path / ("x" * 110)
    folder.mkdir()
    script = f"import os; print(bool(os.environ['USBREDIR_RUN'].split(chr(10))[0])); {FIND}"
    assert run_with(address, *PYTHON, "-c", script, TMPDIR=str(folder)) == "True\nLoopback\n"
    assert not list(folder.iterdir())


@pytest.mark.parametrize("forks", [0, 1])
def test_processes_that_cannot_be_had(address: str, tmp_path: Path, forks: int) -> None:
    """The program connects by itself then. It runs once, and no folder stays."""
    script = f"""
import os, sys
from usbredir import cli
left = [os.fork] * {forks}
def fork():
    if not left:
        raise OSError("no more processes")
    return left.pop()()
os.fork = fork
sys.exit(cli.main(sys.argv[1:]))
"""
    finished = subprocess.run(
        [*PYTHON, "-c", script, "run", "--connect", address, "--", *PYTHON, "-c", FIND],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
        timeout=PATIENCE,
        env={**os.environ, "TMPDIR": str(tmp_path)},
    )
    assert finished.stdout == "Loopback\n"
    assert finished.returncode == 0
    assert not list(tmp_path.iterdir())


def test_a_file_that_is_no_program(address: str, tmp_path: Path) -> None:
    """What was prepared for it ends."""
    script, folder = tmp_path / "script", tmp_path / "t"
    script.write_text("no first line that tells what runs it")
    script.chmod(0o755)
    folder.mkdir()
    output = run_with(address, script, code=cli.ExitCode.USAGE, TMPDIR=str(folder))
    assert output == f"usbredir: error: {script}: neither a program nor a script with #!\n"
    assert run_with(address, *PYTHON, "-c", FIND) == "Loopback\n"
    assert not list(folder.iterdir())


# ================================================================ errors before the program starts

ERRORS = {
    "address": (["--connect", "nonsense", "--", "python"], cli.ExitCode.USAGE, "HOST:PORT"),
    "nobody": (["--connect", "unix:/nonexistent", "--", "python"], cli.ExitCode.REFUSED, "unix:/nonexistent"),
    "no program": (["--connect", "127.0.0.1:1"], cli.ExitCode.USAGE, "after --"),
    "no such program": (["--connect", "127.0.0.1:1", "--", "no-such-program"], cli.ExitCode.USAGE, "no-such-program"),
    "no address": (["--", "python"], cli.ExitCode.USAGE, "--connect"),
}


@pytest.mark.parametrize(("arguments", "code", "text"), ERRORS.values(), ids=ERRORS)
def test_errors(capsys: pytest.CaptureFixture[str], arguments: list[str], code: int, text: str) -> None:
    outcome: Outcome = call_main(capsys, "run", *arguments)
    assert outcome.code == code
    assert text in outcome.err
