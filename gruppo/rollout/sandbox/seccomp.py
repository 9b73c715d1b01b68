"""The system call filter as a program for the kernel (classic BPF), written without a library.

A denied call fails with EPERM, which Python raises as PermissionError. A call newer than this list fails with ENOSYS,
for which the C library has fallbacks. A process that makes calls of another architecture, or of x32, is killed.
"""

from __future__ import annotations

import errno
import platform
import struct
from dataclasses import dataclass

# Name, number on x86_64, number on aarch64; "-" if the architecture has no such call. New processes and threads:
_PROCESSES = """
fork 57 -   vfork 58 -   clone 56 220   execveat 322 281   unshare 272 97   setns 308 268
"""
# Signals and other access to a process; each timer takes a place in the queue of all of the user's signals
_OTHERS = """
timer_create 222 107
kill 62 129   tkill 200 130   tgkill 234 131   rt_sigqueueinfo 129 138   rt_tgsigqueueinfo 297 240
pidfd_open 434 434   pidfd_getfd 438 438   pidfd_send_signal 424 424   ptrace 101 117   kcmp 312 272
process_vm_readv 310 270   process_vm_writev 311 271   process_madvise 440 440   process_mrelease 448 448
"""
_NETWORK = """
socket 41 198   socketpair 53 199   connect 42 203   bind 49 200   listen 50 201   accept 43 202   accept4 288 242
sendto 44 206   sendmsg 46 211   sendmmsg 307 269   recvfrom 45 207   recvmsg 47 212   recvmmsg 299 243
"""
# Mounts; syncing all disks of the machine, which delays other processes; locks on files that others can see
_FILE_SYSTEMS = """
flock 73 32
mount 165 40   umount2 166 39   pivot_root 155 41   chroot 161 51   move_mount 429 429   open_tree 428 428
fsopen 430 430   fsconfig 431 431   fsmount 432 432   fspick 433 433   mount_setattr 442 442   swapon 167 224
swapoff 168 225   quotactl 179 60   quotactl_fd 443 443   acct 163 89   name_to_handle_at 303 264
open_by_handle_at 304 265   fanotify_init 300 262   fanotify_mark 301 263   inotify_init 253 -   inotify_init1 294 26
lookup_dcookie 212 18   sync 162 81   syncfs 306 267
"""
# What is in the system's cache of files that other sessions use as well, and a say in it
_CACHE = """
mincore 27 232   preadv2 327 286   pwritev2 328 287   fadvise64 221 223   readahead 187 213
"""
# Memory that does not count towards the address space limit, or that is pinned
_MEMORY = """
memfd_create 319 279   memfd_secret 447 447   shmget 29 194   shmat 30 196   shmctl 31 195   semget 64 190
semop 65 193   semtimedop 220 192   semctl 66 191   msgget 68 186   msgsnd 69 189   msgrcv 70 188   msgctl 71 187
mq_open 240 180   splice 275 76   tee 276 77   vmsplice 278 75   mbind 237 235   set_mempolicy 238 237
set_mempolicy_home_node 450 450   migrate_pages 256 238   move_pages 279 239   mlock 149 228   mlock2 325 284
mlockall 151 230
"""
# Kernel interfaces that no calculation needs; futex_waitv waits on memory that is shared with others, as below
_KERNEL = """
futex_waitv 449 449
bpf 321 280   perf_event_open 298 241   userfaultfd 323 282   io_setup 206 0   io_submit 209 2
io_uring_setup 425 425   io_uring_enter 426 426   io_uring_register 427 427   keyctl 250 219   add_key 248 217
request_key 249 218   init_module 175 105   finit_module 313 273   delete_module 176 106   kexec_load 246 104
kexec_file_load 320 294   reboot 169 142   syslog 103 116   iopl 172 -   ioperm 173 -   modify_ldt 154 -
personality 135 92   vhangup 153 58   settimeofday 164 170   adjtimex 159 171   clock_settime 227 112
clock_adjtime 305 266   sethostname 170 161   setdomainname 171 162   uselib 134 -   nfsservctl 180 42   ustat 136 -
sysfs 139 -   _sysctl 156 -   create_module 174 -   get_kernel_syms 177 -   query_module 178 -   seccomp 317 277
"""
DENIED = {
    name: (x86_64, aarch64)
    for group in (_PROCESSES, _OTHERS, _NETWORK, _FILE_SYSTEMS, _CACHE, _MEMORY, _KERNEL)
    for name, x86_64, aarch64 in zip(*[iter(group.split())] * 3, strict=True)
}
NEWEST = 450  # the last call number, on both architectures, that was considered for this list

_CLONE3 = 435  # its flags are in memory, which a filter cannot read; the C library falls back to clone
_X32 = 0x40000000
_LOAD, _EQUAL, _AT_LEAST, _ABOVE, _ANY_BIT, _RETURN = 0x20, 0x15, 0x35, 0x25, 0x45, 0x06
# Offsets in struct seccomp_data; of the arguments, the lower halves, which is all that prctl, fcntl and futex read
_NUMBER, _ARCHITECTURE, _ARGUMENT, _SECOND = 0, 4, 16, 24
_PR_SET_PDEATHSIG, _FUTEX_PRIVATE_FLAG = 1, 128
# Allowed fcntl commands: copies of a descriptor, its flags, the size of its pipe. Not allowed: locks and leases, which
# could signal to other processes, or block them, through files that both can see; watching folders; signals.
_F_DUPFD, _F_GETFD, _F_SETFD, _F_GETFL, _F_SETFL, _F_DUPFD_CLOEXEC, _F_GETPIPE_SZ = 0, 1, 2, 3, 4, 1030, 1032
FCNTL = (_F_DUPFD, _F_GETFD, _F_SETFD, _F_GETFL, _F_SETFL, _F_DUPFD_CLOEXEC, _F_GETPIPE_SZ)
_ALLOW, _ERROR, _KILL = 0x7FFF0000, 0x00050000, 0x80000000


@dataclass(frozen=True)
class Machine:
    """An architecture: its audit number and the numbers of its system calls."""

    audit: int
    column: int  # of DENIED
    execve: int
    prctl: int
    fcntl: int
    futex: int


MACHINES = {"x86_64": Machine(0xC000003E, 0, 59, 157, 72, 202), "aarch64": Machine(0xC00000B7, 1, 221, 167, 25, 98)}


def first_filter(machine: str = "") -> bytes:
    """The filter for bubblewrap: denies all of DENIED, but not execve, as the interpreter still has to be started.

    Raises KeyError if the machine is not one of MACHINES.
    """
    target = MACHINES[machine or platform.machine()]
    numbers = [int(row[target.column]) for row in DENIED.values() if row[target.column] != "-"]
    refused = [step for number in numbers for step in _refused(number, errno.EPERM)]
    newer = [_step(_ABOVE, NEWEST, 0, 1), _step(_RETURN, _ERROR | errno.ENOSYS)]
    return _program(target, [*_refused(_CLONE3, errno.ENOSYS), *newer, *refused, *_fcntl(target), *_futex(target)])


def last_filter(machine: str = "") -> bytes:
    """The filter for the running interpreter: it cannot execute another program, and it cannot revoke that it dies with
    bubblewrap. Raises KeyError like `first_filter`."""
    target = MACHINES[machine or platform.machine()]
    no_pdeathsig = [
        _step(_EQUAL, target.prctl, 0, 4),
        _step(_LOAD, _ARGUMENT),
        *_refused(_PR_SET_PDEATHSIG, errno.EPERM),
        _step(_LOAD, _NUMBER),
    ]
    return _program(target, [*_refused(target.execve, errno.EPERM), *no_pdeathsig])


def _fcntl(machine: Machine) -> list[bytes]:
    """Deny all fcntl commands except FCNTL."""
    count = len(FCNTL)
    return [
        _step(_EQUAL, machine.fcntl, 0, count + 3),
        _step(_LOAD, _SECOND),
        *(_step(_EQUAL, command, count - place, 0) for place, command in enumerate(FCNTL)),
        _step(_RETURN, _ERROR | errno.EPERM),
        _step(_LOAD, _NUMBER),
    ]


def _futex(machine: Machine) -> list[bytes]:
    """Deny futex calls on shared memory: a page of a library is the same memory in all sessions, which could otherwise
    wake each other. Locks within a process use the private operations."""
    return [
        _step(_EQUAL, machine.futex, 0, 4),
        _step(_LOAD, _SECOND),
        _step(_ANY_BIT, _FUTEX_PRIVATE_FLAG, 1, 0),
        _step(_RETURN, _ERROR | errno.EPERM),
        _step(_LOAD, _NUMBER),
    ]


def _program(machine: Machine, refusals: list[bytes]) -> bytes:
    prologue = [
        _step(_LOAD, _ARCHITECTURE),
        _step(_EQUAL, machine.audit, 1, 0),
        _step(_RETURN, _KILL),
        _step(_LOAD, _NUMBER),
        _step(_AT_LEAST, _X32, 0, 1),
        _step(_RETURN, _KILL),
    ]
    return b"".join([*prologue, *refusals, _step(_RETURN, _ALLOW)])


def _refused(number: int, code: int) -> list[bytes]:
    return [_step(_EQUAL, number, 0, 1), _step(_RETURN, _ERROR | code)]


def _step(code: int, value: int, if_true: int = 0, if_false: int = 0) -> bytes:
    """One struct sock_filter."""
    return struct.pack("=HBBI", code, if_true, if_false, value)
