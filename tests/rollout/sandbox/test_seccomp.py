"""The filter's program, run by a machine of five instructions: for both architectures, without either."""

from __future__ import annotations

import errno
import fcntl
import re
import struct
from pathlib import Path

import pytest

from gruppo.rollout.sandbox.seccomp import DENIED, FCNTL, MACHINES, NEWEST, first_filter, last_filter

ALLOW, KILL = 0x7FFF0000, 0x80000000
PERMISSION, NO_CALL = 0x00050000 | errno.EPERM, 0x00050000 | errno.ENOSYS


def decide(program: bytes, architecture: int, number: int, argument: int = 0, second: int = 0) -> int:
    steps, at, held = list(struct.iter_unpack("=HBBI", program)), 0, 0
    while True:
        code, if_true, if_false, value = steps[at]
        at += 1
        if code == 0x20:
            held = {0: number & 0xFFFFFFFF, 4: architecture, 16: argument, 24: second}[value]
        elif code == 0x06:
            return int(value)
        else:
            true = {0x15: held == value, 0x25: held > value, 0x35: held >= value}[code]
            at += if_true if true else if_false


@pytest.mark.parametrize("machine", MACHINES)
def test_every_call_is_decided(machine: str) -> None:
    made = MACHINES[machine]
    denied = {int(row[made.column]) for row in DENIED.values() if row[made.column] != "-"}
    program = first_filter(machine)
    for number in range(NEWEST + 1):
        due = NO_CALL if number == 435 else PERMISSION if number in denied else ALLOW
        assert decide(program, made.audit, number) == due, number
    assert decide(program, made.audit, NEWEST + 1) == NO_CALL
    assert decide(program, made.audit, 0x40000000) == decide(program, made.audit, -1) == KILL
    assert decide(program, 0x40000003, 1) == KILL
    assert made.execve not in denied


@pytest.mark.parametrize("machine", MACHINES)
def test_last_filter_refuses_new_programs_alone(machine: str) -> None:
    made = MACHINES[machine]
    refused = [each for each in range(NEWEST + 1) if decide(last_filter(machine), made.audit, each) != ALLOW]
    assert refused == [made.execve]
    assert decide(last_filter(machine), made.audit, made.prctl, 1) == PERMISSION  # PR_SET_PDEATHSIG
    assert decide(last_filter(machine), made.audit, made.prctl, 22) == ALLOW
    assert decide(last_filter(machine), made.audit, 1, 1) == ALLOW
    assert decide(last_filter(machine), 0x40000003, 1) == KILL


@pytest.mark.parametrize("machine", MACHINES)
def test_fcntl_copies_descriptors_and_nothing_else(machine: str) -> None:
    made = MACHINES[machine]
    allowed = [each for each in range(1100) if decide(first_filter(machine), made.audit, made.fcntl, 0, each) == ALLOW]
    assert allowed == [0, 1, 2, 3, 4, 1030, 1032]
    assert decide(first_filter(machine), made.audit, made.fcntl, 0, 1024) == PERMISSION  # F_SETLEASE
    assert decide(first_filter(machine), made.audit, made.prctl, 0, 1024) == ALLOW


def test_what_fcntl_may_be_asked_for_is_named_as_in_the_system() -> None:
    names = ("DUPFD", "GETFD", "SETFD", "GETFL", "SETFL", "DUPFD_CLOEXEC", "GETPIPE_SZ")
    if not hasattr(fcntl, "F_GETPIPE_SZ"):
        pytest.skip("this is not Linux")
    assert tuple(getattr(fcntl, f"F_{name}") for name in names) == FCNTL


def test_other_machines_have_no_filter() -> None:
    with pytest.raises(KeyError):
        first_filter("riscv64")


def test_no_number_stands_for_two_calls() -> None:
    for machine in MACHINES.values():
        numbers = [row[machine.column] for row in DENIED.values() if row[machine.column] != "-"]
        assert len(numbers) == len(set(numbers))


@pytest.mark.parametrize(
    ("header", "column"),
    [("/usr/include/x86_64-linux-gnu/asm/unistd_64.h", 0), ("/usr/include/asm-generic/unistd.h", 1)],
)
def test_numbers_are_those_of_the_system(header: str, column: int) -> None:
    if not Path(header).exists():
        pytest.skip(f"there is no {header}")
    found = dict(re.findall(r"#define __NR(?:3264)?_(\w+) (\d+)", Path(header).read_text()))
    known = {name: row[column] for name, row in DENIED.items() if row[column] != "-" and name in found}
    known |= {name: str(getattr(list(MACHINES.values())[column], name)) for name in ("execve", "prctl", "fcntl")}
    assert len(known) > 80
    assert known == {name: found[name] for name in known}
