"""The filter program, run by a small BPF interpreter for both architectures, on any machine."""

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
    steps, at, register = list(struct.iter_unpack("=HBBI", program)), 0, 0
    while True:
        code, if_true, if_false, value = steps[at]
        at += 1
        if code == 0x20:
            register = {0: number & 0xFFFFFFFF, 4: architecture, 16: argument, 24: second}[value]
        elif code == 0x06:
            return int(value)
        else:
            true = {0x15: register == value, 0x25: register > value, 0x35: register >= value}
            true |= {0x45: register & value != 0}
            at += if_true if true[code] else if_false


@pytest.mark.parametrize("machine", MACHINES)
def test_every_call_is_decided(machine: str) -> None:
    calls = MACHINES[machine]
    denied = {int(row[calls.column]) for row in DENIED.values() if row[calls.column] != "-"} | {calls.futex}
    program = first_filter(machine)
    for number in range(NEWEST + 1):
        expected = NO_CALL if number == 435 else PERMISSION if number in denied else ALLOW
        assert decide(program, calls.audit, number) == expected, number
    assert decide(program, calls.audit, NEWEST + 1) == NO_CALL
    assert decide(program, calls.audit, 0x40000000) == decide(program, calls.audit, -1) == KILL
    assert decide(program, 0x40000003, 1) == KILL
    assert calls.execve not in denied


@pytest.mark.parametrize("machine", MACHINES)
def test_last_filter_refuses_only_new_programs(machine: str) -> None:
    calls = MACHINES[machine]
    refused = [number for number in range(NEWEST + 1) if decide(last_filter(machine), calls.audit, number) != ALLOW]
    assert refused == [calls.execve]
    assert decide(last_filter(machine), calls.audit, calls.prctl, 1) == PERMISSION  # PR_SET_PDEATHSIG
    assert decide(last_filter(machine), calls.audit, calls.prctl, 22) == ALLOW
    assert decide(last_filter(machine), calls.audit, 1, 1) == ALLOW
    assert decide(last_filter(machine), 0x40000003, 1) == KILL


@pytest.mark.parametrize("machine", MACHINES)
def test_fcntl_allows_only_harmless_commands(machine: str) -> None:
    calls = MACHINES[machine]
    allowed = [
        command
        for command in range(1100)
        if decide(first_filter(machine), calls.audit, calls.fcntl, 0, command) == ALLOW
    ]
    assert allowed == [0, 1, 2, 3, 4, 1030, 1032]
    assert decide(first_filter(machine), calls.audit, calls.fcntl, 0, 1024) == PERMISSION  # F_SETLEASE
    assert decide(first_filter(machine), calls.audit, calls.prctl, 0, 1024) == ALLOW


@pytest.mark.parametrize("machine", MACHINES)
def test_futex_operations_are_private(machine: str) -> None:
    """Every operation, with and without FUTEX_CLOCK_REALTIME (256) and the private flag (128)."""
    calls = MACHINES[machine]
    for operation in range(1024):
        decision = decide(first_filter(machine), calls.audit, calls.futex, 0, operation)
        assert decision == (ALLOW if operation & 128 else PERMISSION), operation
    assert decide(first_filter(machine), calls.audit, 449, 0, 128) == PERMISSION  # futex_waitv
    assert {decide(first_filter(machine), calls.audit, new, 128, 128) for new in (454, 455, 456)} == {NO_CALL}


def test_allowed_fcntl_commands_equal_the_systems_constants() -> None:
    names = ("DUPFD", "GETFD", "SETFD", "GETFL", "SETFL", "DUPFD_CLOEXEC", "GETPIPE_SZ")
    if not hasattr(fcntl, "F_GETPIPE_SZ"):
        pytest.skip("this is not Linux")
    assert tuple(getattr(fcntl, f"F_{name}") for name in names) == FCNTL


def test_other_machines_have_no_filter() -> None:
    with pytest.raises(KeyError):
        first_filter("riscv64")


def test_no_number_is_used_for_two_calls() -> None:
    for machine in MACHINES.values():
        numbers = [row[machine.column] for row in DENIED.values() if row[machine.column] != "-"]
        assert len(numbers) == len(set(numbers))


@pytest.mark.parametrize(
    ("header", "column"),
    [("/usr/include/x86_64-linux-gnu/asm/unistd_64.h", 0), ("/usr/include/asm-generic/unistd.h", 1)],
)
def test_numbers_equal_the_systems_headers(header: str, column: int) -> None:
    if not Path(header).exists():
        pytest.skip(f"there is no {header}")
    in_header = dict(re.findall(r"#define __NR(?:3264)?_(\w+) (\d+)", Path(header).read_text()))
    known = {name: row[column] for name, row in DENIED.items() if row[column] != "-" and name in in_header}
    known |= {
        name: str(getattr(list(MACHINES.values())[column], name)) for name in ("execve", "prctl", "fcntl", "futex")
    }
    assert len(known) > 80
    assert known == {name: in_header[name] for name in known}
