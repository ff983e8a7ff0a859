"""A signal ends the command wherever it lands, also where what a handler raises is dropped or swallowed."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = """
import atexit, gc, os, signal, sys, threading, time, weakref
from icsearch.core import signals as core
from icsearch.core.endings import run_to_its_end

SIGNAL = int(sys.argv[1])

def send(*_):
    os.kill(os.getpid(), SIGNAL)
    for _ in range(1000):  # steps at one of which it is heard
        pass

def swallow(call):
    try:
        call()
    except BaseException:
        pass

class Dying:
    def __del__(self):
        send()

class Cleaning:
    def __del__(self):
        try:
            send()
        except BaseException as error:
            raise ValueError("on the way out") from error

def finaliser():
    Dying()

def failing_finaliser():
    Cleaning()

def weak_callback():
    thing = Dying.__new__(type("Thing", (), {}))
    reference = weakref.ref(thing, send)
    del thing

def collector_callback():
    gc.callbacks.append(lambda phase, info: phase == "stop" and send())
    gc.collect()
    gc.callbacks.clear()

def cycle():
    dying = Dying()
    dying.itself = dying
    del dying
    gc.collect()

def swallowing_block():
    swallow(send)

def swallowing_for_ever():
    core.GRACE = 0.3
    swallow(send)
    while True:
        swallow(lambda: time.sleep(1))

def kept():
    try:
        send()
    except BaseException as error:
        kept.error = error
    kept.error = None

def failing_import():
    sys.path.insert(0, os.getcwd())
    try:
        import sending
    except BaseException:
        pass

def another_error():
    try:
        send()
    except BaseException as error:
        raise RuntimeError("a library's own") from error

def blocked_wait():
    threading.Timer(0.1, send).start()
    threading.Event().wait(30)

def blocked_join():
    sleeper = threading.Thread(target=time.sleep, args=(30,), daemon=True)
    sleeper.start()
    threading.Timer(0.1, send).start()
    sleeper.join()

def plain():
    send()

def last_moment():
    swallow(send)
    return "done"

def behind_the_end():
    atexit.register(send)
    return "done"

def command():
    signals.listen()
    if globals()[sys.argv[2]]() != "done":
        time.sleep(30)
        print("lost")

signals = core.Signals()
sys.exit(run_to_its_end(command, False, signals))
"""
PLACES = (
    *("finaliser", "failing_finaliser", "weak_callback", "collector_callback", "cycle", "swallowing_block", "kept"),
    *("failing_import", "another_error", "blocked_wait", "blocked_join", "plain", "last_moment"),
    *("swallowing_for_ever", "behind_the_end"),
)


SECOND = """
import sys, time
from icsearch.core.endings import run_to_its_end
from icsearch.core.signals import Signals

def stuck():
    signals.listen()
    try: print('at work', flush=True), time.sleep(60)
    finally: print('stuck', flush=True), time.sleep(60)

signals = Signals()
run_to_its_end(stuck, False, signals)
"""
IGNORED = """
import os, signal, sys
from icsearch.core.signals import Signals

signal.signal(int(sys.argv[1]), signal.SIG_IGN)
Signals().listen()
os.kill(os.getpid(), int(sys.argv[1]))
print("still here")
"""
both = pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])


@pytest.mark.parametrize("place", PLACES)
@both
def test_it_ends_the_command_from_there(tmp_path: Path, place: str, number: int) -> None:
    (tmp_path / "sending.py").write_text("import __main__\n__main__.send()\n")
    ran = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(number), place], capture_output=True, text=True, cwd=tmp_path, timeout=120
    )
    status = -number if place == "behind_the_end" else 128 + number  # a shell shows both as 128 + number
    assert (ran.returncode, ran.stdout, ran.stderr) == (status, "", "")


@both
def test_a_second_one_ends_at_once(number: int) -> None:
    """A process that is stuck on its way out can still be ended politely."""
    process = subprocess.Popen([sys.executable, "-c", SECOND], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    for line in ("at work\n", "stuck\n"):
        assert process.stdout.readline() == line
        process.send_signal(number)
    assert process.wait() == -number


@both
def test_one_that_is_ignored_stays_so(number: int) -> None:
    ran = subprocess.run([sys.executable, "-c", IGNORED, str(number)], capture_output=True, text=True, check=True)
    assert ran.stdout == "still here\n"
