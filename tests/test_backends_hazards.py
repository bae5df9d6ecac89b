"""Ways to end badly with libusb below Python, each of which once crashed, hung or lost something: LIBUSB's hazards."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from typing import Any

import pytest

from . import vusb

LONG = os.environ.get("USBREDIR_LONG") == "1"
CYCLES = 10_000 if LONG else 500
EXIT_LIMIT = 20.0
"""Seconds that a process may take to end, on a busy machine; what hangs takes for ever."""

IN_FLIGHT = """
event_thread = sys.argv[1] == "thread"
device = backends.open_device("1209:0001", event_thread=event_thread)
device.claim()
def again(transfer):
    device.submit(transfer)
for _ in range(8):
    assert device.submit(make(BULK, 0x86, 64)) == 0
    assert device.submit(make(BULK, 0x82, 64, again)) == 0
for _ in range(5):
    device.handle_events(0.1)
"""

ENDINGS = {
    "sys.exit": ("sys.exit(7)", 7),
    "exception": ("raise RuntimeError('nobody catches this')", 1),
    "end": ("", 0),
    "waiting thread": (
        "threading.Thread(target=lambda: [device.handle_events(None) for _ in iter(int, 1)], daemon=True).start()",
        0,
    ),
    "other references": ("del device, again; gc.collect(); sys.exit(7)", 7),
    "second backend": ("other = new_backend(); kept = find_all(IDS, other)[0]; sys.exit(7)", 7),
    "os._exit": ("os._exit(7)", 7),
    "interrupt": ("import signal; os.kill(os.getpid(), signal.SIGINT); device.handle_events(60)", -2),
}


@pytest.mark.parametrize("driver", ["polling", "thread"])
@pytest.mark.parametrize("ending", ENDINGS)
def test_exit_with_transfers_in_flight(ending: str, driver: str) -> None:
    """The process ends with its own exit code, soon, whatever runs."""
    line, code = ENDINGS[ending]
    began = time.monotonic()
    vusb.run(f"{vusb.PRELUDE}\n{IN_FLIGHT}\n{line}", driver, code=code)
    assert time.monotonic() - began < EXIT_LIMIT


STUCK = """
from usbredir.backends import pyusb
pyusb.CLOSE_LIMIT = 0.2
device = backends.open_device("1209:0001", event_thread=sys.argv[1] == "thread")
device.claim()
device.submit(make(BULK, 0x86, 64))
device.cancel = lambda transfer: None  # a device that does not give its transfers back
if sys.argv[2] == "closed":
    device.close()
print("closed", flush=True)
sys.exit(7)
"""


@pytest.mark.parametrize("driver", ["polling", "thread"])
@pytest.mark.parametrize("when", ["closed", "at exit"])
def test_transfers_that_never_come_back(when: str, driver: str) -> None:
    """The handle and the context are leaked on purpose, and nobody ends them, pyusb at exit included."""
    assert "closed" in vusb.run(vusb.PRELUDE + STUCK, driver, when, code=7)


COLLECTED = """
import weakref, warnings
warnings.simplefilter("error", ResourceWarning)
caught = []
sys.unraisablehook = lambda problem: caught.append(type(problem.exc_value).__name__)

# every reference of the user dropped while transfers run: completions come, memory stays
device = backends.open_device("1209:0001")
device.claim()
seen = []
def submit(length):
    data = bytearray(length)
    device.submit(make(BULK, 0x02, length, lambda t: seen.append(t.status), data=data))
    device.submit(make(BULK, 0x82, length, lambda t: seen.append(len(t.data))))
for length in (1, 1000, 100_000, 1_000_000):
    submit(length)
gc.collect()
junk = [bytearray(1_000_000) for _ in range(20)]
until(device, lambda: len(seen) == 8)
out["seen"] = sorted(seen)
device.close()

# never closed
def forget(cycle):
    device = backends.open_device("1209:0001", event_thread=True)
    device.claim()
    complete(device, make(BULK, 0x82, 64))
    if cycle:
        device.itself = device
    return weakref.ref(device)
with warnings.catch_warnings(record=True) as told:
    warnings.simplefilter("always")
    gone = [forget(False), forget(True)]
    gc.collect()
out["gone"] = [reference() is None for reference in gone]
out["warned"] = len([warning for warning in told if warning.category is ResourceWarning])
out["threads"] = threading.active_count()
device = backends.open_device("1209:0001")
device.claim()
device.close()
with open(os.environ["VUSB_LOG"]) as log:
    out["log"] = [line for line in log.read().split() if line in ("open", "close")]
out["caught"] = caught
"""


def test_what_nobody_holds(tmp_path: Any) -> None:
    """Transfers in flight keep their memory; a device that was forgotten is closed, with a warning."""
    found = vusb.found(COLLECTED, env=vusb.environment(log=tmp_path / "log"))
    assert found["seen"] == sorted([0, 0, 0, 0, 1, 1000, 100_000, 1_000_000])
    assert found["gone"] == [True, True]
    assert found["warned"] == 2
    assert found["threads"] == 1
    assert found["log"] == ["open", "close"] * 4
    assert not found["caught"]


LOAD = """
vigorous = [make(BULK, 0x82, 4096)]
cycles = int(sys.argv[1])
backend = new_backend()
usb_device = find_all(IDS, backend)[0]
def cycle(number):
    if number % 10 == 0:  # in a context of its own
        device = backends.open_device("1209:0001", event_thread=number % 20 == 0)
    else:
        device = backends.wrap(usb_device, event_thread=number % 2 == 0)
    device.claim()
    complete(device, *[make(BULK, 0x82, 5000) for _ in range(4)], vendor_in(1, 8))
    device.pollfds()
    device.submit(make(BULK, 0x86, 64))  # in flight at close
    device.close()
def resident():
    gc.collect()
    return int(open("/proc/self/statm").read().split()[1]) * os.sysconf("SC_PAGESIZE")
def held():
    from usbredir.backends import _context, _exit
    return len(os.listdir("/proc/self/fd")), threading.active_count(), len(_context._in_flight), len(_exit._open)
for number in range(cycles // 5):
    cycle(number)
before, out["held_before"] = resident(), held()
began = time.monotonic()
for number in range(cycles):
    cycle(number)
out["seconds"] = time.monotonic() - began
out["grown"], out["held_after"] = resident() - before, held()
"""


def test_nothing_is_left_behind() -> None:
    """Of many cycles of opening, transferring and closing with something in flight; USBREDIR_LONG=1: of 10,000."""
    found = vusb.found(LOAD, str(CYCLES))
    print(f"{CYCLES} cycles: {found}")
    assert found["held_after"] == found["held_before"]
    assert found["grown"] < 2 * 1024 * 1024


CPU_BOUND = """
device = backends.open_device("1209:0001", event_thread=True)
device.claim()
stop = []
def spin():
    while not stop:
        sum(range(1000))
busy = threading.Thread(target=spin)
busy.start()
numbers = []
def again(transfer):
    numbers.append(int.from_bytes(transfer.data, "little"))
    device.submit(transfer)
for _ in range(16):
    device.submit(make(INTERRUPT, 0x83, 8, again))
until(device, lambda: len(numbers) >= 500)
stop.append(1)
busy.join()
device.close()
out["numbers"] = numbers[:500] == list(range(numbers[0], numbers[0] + 500))
"""


def test_a_busy_thread_beside_the_event_thread() -> None:
    """Slow, but with several transfers queued none is lost."""
    assert vusb.found(CPU_BOUND)["numbers"]


SYNCHRONOUS = """
device = backends.open_device("1209:0001", event_thread=sys.argv[1] == "thread")
device.claim()
halted, answers = [], []
def in_a_completion(transfer):
    halted.append(device.clear_halt(0x85))
    halted.append(device.set_alt_setting(1, 1))
    answers.append(usb.util.get_string(device.device, 3))  # busy, were it libusb's callback
device.submit(make(BULK, 0x82, 8, in_a_completion))
until(device, lambda: answers)
out["halted"], out["answers"] = halted, answers
stop, calls = [], []
def synchronous():
    while not stop:
        calls.append(usb.util.get_string(device.device, 3))
thread = threading.Thread(target=synchronous)
thread.start()
count = []
def again(transfer):
    count.append(transfer.status)
    if len(count) < 3000:
        device.submit(transfer)
for _ in range(8):
    device.submit(make(BULK, 0x82, 64, again))
until(device, lambda: len(count) >= 3000 and calls)
stop.append(1)
thread.join()
out["right"] = set(calls) == {"0001"} and set(count) == {0}
device.close()
"""


@pytest.mark.parametrize("driver", ["polling", "thread"])
def test_synchronous_calls(driver: str) -> None:
    """Of pyusb: inside a completion, which is not inside libusb, and in another thread."""
    found = vusb.found(SYNCHRONOUS, driver)
    assert found["halted"] == [0, 0]
    assert found["answers"] == ["0001"]
    assert found["right"]


CHILDREN = """
import multiprocessing, subprocess
def main():
    device = backends.open_device("1209:0001", event_thread=True)
    device.claim()
    hanging = make(BULK, 0x86, 64)
    device.submit(hanging)

    pid = os.fork()
    if pid == 0:
        gc.collect()
        device.close()  # nothing: the parent's
        os._exit(5)
    out["fork_exit"] = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

    pid = os.fork()
    if pid == 0:
        os.execv(sys.executable, [sys.executable, "-c", "raise SystemExit(6)"])
    out["fork_exec"] = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    # Before 3.11 the child closes descriptors one by one in its parent's memory (vfork), of which the bus is a part.
    if sys.version_info >= (3, 11):
        out["subprocess"] = subprocess.call([sys.executable, "-c", "raise SystemExit(7)"])
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            out["spawn"] = pool.apply(abs, [-8])
    forked = multiprocessing.get_context("fork").Process(target=abs, args=[-8])
    forked.start()
    forked.join(LIMIT)
    out["multiprocessing_fork"] = forked.exitcode

    # the parent's transfers are as they were
    out["in_flight"] = len(device._flying)
    complete(device, make(BULK, 0x82, 8))
    device.cancel(hanging)
    until(device, lambda: not device._flying)
    out["hanging"] = int(hanging.status)
    device.close()
main()
"""


def test_children() -> None:
    """exec, spawn and os._exit are fine, and leave the parent's devices alone."""
    found = vusb.found(CHILDREN)
    assert {"subprocess": 7, "spawn": 8, **found} == {
        "fork_exit": 5,
        "fork_exec": 6,
        "subprocess": 7,
        "spawn": 8,
        "multiprocessing_fork": 0,
        "in_flight": 1,
        "hanging": 1,
    }


CALLBACK = """
# Signals while transfers complete as fast as they can: the exception comes out, and nothing is lost.
import signal
class Alarm(BaseException): pass
def ring(number, frame):
    raise Alarm
signal.signal(signal.SIGALRM, ring)
unraisable = []
sys.unraisablehook = lambda problem: unraisable.append(repr(problem.exc_value))
device = backends.open_device("1209:0001")
device.claim()

def again(transfer):
    device.submit(transfer)
for _ in range(32):
    device.submit(make(BULK, 0x82, 64, again))
rung = 0
for _ in range(100):
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.002)
        while True:
            device.handle_events(1.0)
    except Alarm:
        rung += 1
out["rung"], out["unraisable"] = rung, unraisable
from usbredir.backends import _context
began = time.monotonic()
device.close()
out["close_took"] = time.monotonic() - began
out["in_flight"] = len(_context._in_flight)
out["flying"] = len(device._flying)
"""


def test_exceptions_of_signal_handlers() -> None:
    """None is swallowed inside libusb's callback, and the device can be closed whatever they interrupted."""
    found = vusb.found(CALLBACK)
    assert found["rung"] == 100
    assert found["unraisable"] == []
    assert found["in_flight"] == 0
    assert found["flying"] == 0
    assert found["close_took"] < 4


def test_nothing_needs_a_device() -> None:
    """The modules can be imported and the process ended where there is no USB at all."""
    program = "from usbredir.backends import pyusb; print(pyusb.parse_spec('1-2'))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout) == (0, "1-2\n"), done.stderr
