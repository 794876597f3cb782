"""SIGINT and SIGTERM at moments when an exception would do harm: during an import, in a finalizer, and after the command has ended."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest

MODULE = """
import time
print("importing", flush=True)
for _ in range({steps}):
    time.sleep(0.01)
print("imported", flush=True)
"""
PLAIN = "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # SIGINT is ignored in the background of a shell
DOCTOR = "import evomerge.build.commands.doctor as doctor\ndoctor.examine = lambda *_: {work}\nfrom evomerge.cli import main\nmain()\n"
FINALIZER = """
import time, weakref

class Held:
    pass

def finalize():
    print("finalizing", flush=True)
    for _ in range(100):
        time.sleep(0.01)
    print("finalized", flush=True)

def work():
    held = Held()
    weakref.finalize(held, finalize)
    del held
    time.sleep(60)

"""
DELETED = """
import time

class Held:
    def __del__(self):
        print("finalizing", flush=True)
        for _ in range(100):
            time.sleep(0.01)
        print("finalized", flush=True)

def work():
    held = Held()
    del held
    time.sleep(60)

"""
ENDING = """
import atexit, time

@atexit.register
def end():
    print("ending", flush=True)
    for _ in range(50):
        time.sleep(0.01)

from evomerge.cli import main
main()
"""


def told_when_it_says(word: str, code: str, *numbers: int, command: str = "doctor") -> tuple[int, str, str]:
    """Exit code, later output and errors of a process that receives signals once it has written `word`."""
    process = subprocess.Popen(
        [sys.executable, "-c", PLAIN + code, command], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    while (line := process.stdout.readline()) != f"{word}\n":
        assert line, process.communicate()[1]
    for number in numbers:
        process.send_signal(number)
    output, errors = process.communicate(timeout=60)
    return process.returncode, output, errors


def importing(tmp_path: Path, steps: int) -> str:
    (tmp_path / "slowly.py").write_text(MODULE.format(steps=steps))
    return f"sys.path.insert(0, {str(tmp_path)!r})\n" + DOCTOR.format(
        work="(__import__('slowly'), __import__('time').sleep(60))"
    )


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_import_finishes_before_an_interrupt(tmp_path: Path, number: int) -> None:
    """If C++ calls Python while a module is initialised, an exception there aborts the process."""
    code, output, errors = told_when_it_says("importing", importing(tmp_path, 100), number)
    assert (code, output, errors) == (130, "imported\n", "")


def test_a_second_signal_ends_an_import_at_once(tmp_path: Path) -> None:
    code, output, errors = told_when_it_says("importing", importing(tmp_path, 6000), signal.SIGINT, signal.SIGTERM)
    assert (code, output, errors) == (130, "", "")


@pytest.mark.parametrize("finalizer", [FINALIZER, DELETED])
def test_an_interrupt_is_not_lost_in_a_finalizer(finalizer: str) -> None:
    code, output, errors = told_when_it_says("finalizing", finalizer + DOCTOR.format(work="work()"), signal.SIGINT)
    assert (code, output, errors) == (130, "finalized\n", "")


SOBOL = """
import time, numpy
load = numpy.load

def slowly(*arguments, **options):
    print("reading", flush=True)
    for _ in range(50):
        time.sleep(0.01)
    table = load(*arguments, **options)
    print("read", flush=True)
    return table

def work():
    from scipy.stats import qmc
    numpy.load = slowly
    qmc.Sobol(3)
    time.sleep(60)

"""


def test_an_interrupt_waits_until_the_sobol_table_is_read() -> None:
    code, output, errors = told_when_it_says("reading", SOBOL + DOCTOR.format(work="work()"), signal.SIGINT)
    assert (code, output, errors) == (130, "read\n", "")


WORK = """
import time

def work():
    try:
        print("working", flush=True)
        time.sleep(60)
    {what}

"""


def told_while_it_works(what: str) -> tuple[int, str, str]:
    return told_when_it_says("working", WORK.format(what=what) + DOCTOR.format(work="work()"), signal.SIGTERM)


def test_a_swallowed_interrupt_is_raised_again() -> None:
    code, output, errors = told_while_it_works("except BaseException: pass\n    time.sleep(10)\n    return []")
    assert (code, output, errors) == (130, "", "")


def test_an_error_that_replaced_an_interrupt_counts_as_the_interrupt() -> None:
    replaced = "except BaseException: raise TypeError('could not determine the shape of object type') from None"
    code, output, errors = told_while_it_works(replaced)
    assert (code, output, errors) == (130, "", "interrupted\n")


def test_cleanup_is_not_interrupted() -> None:
    code, output, errors = told_while_it_works(
        "finally:\n        for _ in range(250): time.sleep(0.01)\n        print('tidy', flush=True)"
    )
    assert (code, output, errors) == (130, "tidy\n", "")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_after_the_command_has_ended_does_not_change_its_result(number: int) -> None:
    code, output, errors = told_when_it_says("ending", ENDING, number, number, command="--version")
    assert (code, output, errors) == (0, "", "")


def test_a_child_process_is_ended_by_sigterm() -> None:
    code = """
import os, time
def work():
    child = os.fork()
    if child == 0:
        time.sleep(60)
    time.sleep(0.2)
    os.kill(child, 15)
    print("child", os.waitpid(child, 0)[1], flush=True)
    return []
"""
    process = subprocess.run(
        [sys.executable, "-c", PLAIN + code + DOCTOR.format(work="work()"), "doctor"],
        capture_output=True, text=True, timeout=60, check=True,
    )  # fmt: skip
    assert "child 15\n" in process.stdout
    assert process.stderr == ""
