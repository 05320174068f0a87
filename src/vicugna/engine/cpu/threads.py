"""Programs, and the threads that run them together.

A program is an int64 array [instructions, WIDTH]: the address of an operation (compiler.py) and its
operands. Every thread executes every instruction, each its own part of the work, and waits for the
others after it. Between programs threads spin for a moment, then sleep.
"""

import ctypes
import os
import threading
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from llvmlite import ir
from numba import types
from numba.core import cgutils

from vicugna.engine.cpu.compiler import Operation, entry, kernel
from vicugna.engine.cpu.vectors import I64, VOID, instruction, read_i64, write_i64

WIDTH = 16  # int64 numbers of an instruction
SPINS = 4000  # reads of a counter, about 0.1 ms, before a thread gives way

# The shared words, each in a cache line of its own: how many programs were posted, what was posted,
# how often threads arrived at a barrier and how often before this program, who sleeps.
POSTED, PROGRAM, COUNT, THREADS, BEFORE, ARRIVED, SLEEPING, STOP, SEMAPHORE = range(0, 9 * 64, 64)


# ---- instructions for threads

@instruction(types.int64, types.intp, types.int64)
def atomic_add(b: Any, address: Any, value: Any) -> Any:
    """Add to an int64 in memory; what it was before."""
    return b.atomic_rmw("add", b.inttoptr(address, I64.as_pointer()), value, "seq_cst")


@instruction(types.int64, types.intp, types.int64)
def exchange(b: Any, address: Any, value: Any) -> Any:
    """Replace an int64 in memory; what it was before."""
    return b.atomic_rmw("xchg", b.inttoptr(address, I64.as_pointer()), value, "seq_cst")


@instruction(types.int64, types.intp)
def atomic_read(b: Any, address: Any) -> Any:
    """An int64 in memory as other threads left it."""
    return b.load_atomic(b.inttoptr(address, I64.as_pointer()), "seq_cst", 8)


@instruction(types.void)
def pause(b: Any) -> None:
    """Tell the CPU that this thread spins."""
    if b.module.triple.startswith("x86"):
        kind = ir.FunctionType(VOID, [])
        b.call(cgutils.get_or_insert_function(b.module, kind, "llvm.x86.sse2.pause"), [])


@instruction(types.int64, types.intp, types.intp, types.int64, types.int64)
def call(b: Any, address: Any, operands: Any, thread: Any, threads: Any) -> Any:
    """Call an operation by its address."""
    kind = ir.FunctionType(VOID, [I64, I64, I64])
    b.call(b.inttoptr(address, kind.as_pointer()), [operands, thread, threads])
    return address


@instruction(types.int32)
def sched_yield(b: Any) -> Any:
    """Let another thread run on this core."""
    return _libc(b, "sched_yield")


@instruction(types.int32, types.intp)
def sem_wait(b: Any, semaphore: Any) -> Any:
    """Sleep until the semaphore at this address is posted."""
    return _libc(b, "sem_wait", semaphore)


@instruction(types.int32, types.intp)
def sem_post(b: Any, semaphore: Any) -> Any:
    """Wake one thread that sleeps there."""
    return _libc(b, "sem_post", semaphore)


def _libc(b: Any, name: str, *values: Any) -> Any:
    kind = ir.FunctionType(ir.IntType(32), [I64] * len(values))
    return b.call(cgutils.get_or_insert_function(b.module, kind, name), values)


# ---- what every thread does

@kernel
def _barrier(control: int, target: int) -> int:
    """Wait until threads have arrived `target` times in all; 1 if that took long, else 0."""
    atomic_add(control + ARRIVED, 1)
    spins = 0
    while atomic_read(control + ARRIVED) < target:
        spins += 1
        if spins < SPINS:
            pause()
        else:
            sched_yield()
    return 1 if spins >= SPINS else 0


@kernel
def _execute(control: int, program: int, count: int, thread: int, threads: int,
             before: int) -> int:
    """All instructions; how many barriers took long."""
    slow = 0
    for i in range(count):
        row = program + i * WIDTH * 8
        call(read_i64(row), row + 8, thread, threads)
        if threads > 1:
            slow += _barrier(control, before + threads * (i + 1))
    return slow


@entry
def _run(control: int, program: int, count: int, threads: int) -> int:
    """Thread 0: post the program, and take part in it; how many barriers took long."""
    before = atomic_read(control + ARRIVED)
    if threads > 1:
        write_i64(control + PROGRAM, program)
        write_i64(control + COUNT, count)
        write_i64(control + THREADS, threads)
        write_i64(control + BEFORE, before)
        atomic_add(control + POSTED, 1)
        for _ in range(exchange(control + SLEEPING, 0)):
            sem_post(control + SEMAPHORE)
    return _execute(control, program, count, 0, threads, before)


@entry
def _work(control: int, thread: int) -> None:
    """Any other thread: take part in every program posted, until stopped."""
    seen, spins = 0, 0
    while True:
        if atomic_read(control + POSTED) == seen:
            spins += 1
            if spins < SPINS:
                pause()
                continue
            atomic_add(control + SLEEPING, 1)
            if atomic_read(control + POSTED) == seen:  # else it may have been counted too late
                sem_wait(control + SEMAPHORE)
            continue
        seen, spins = seen + 1, 0
        if atomic_read(control + STOP):
            return
        _execute(control, read_i64(control + PROGRAM), read_i64(control + COUNT), thread,
                 read_i64(control + THREADS), read_i64(control + BEFORE))


class Pool:
    """As many threads as given, the caller's among them. Where other processes keep a core busy, so
    that waiting takes longer than working, the caller runs some programs alone."""

    def __init__(self, threads: int) -> None:
        self.threads = threads
        self._words = np.zeros(10 * 64, np.uint8)
        self._control = -(-self._words.ctypes.data // 64) * 64
        self._lock = threading.Lock()
        self._alone = self._penalty = 0  # programs
        ctypes.CDLL(None).sem_init(ctypes.c_void_p(self._control + SEMAPHORE), 0, 0)
        for thread in range(1, threads):
            threading.Thread(target=_work, args=(self._control, thread), daemon=True).start()

    def run(self, program: np.ndarray) -> None:
        """Run an int64 array [instructions, WIDTH] to its end."""
        with self._lock:
            alone = self._alone > 0 or self.threads == 1
            slow = _run(self._control, program.ctypes.data, len(program),
                        1 if alone else self.threads)
            self._alone -= alone
            if not alone:
                self._penalty = min(2 * self._penalty + 8, 1024) if slow else 0
                self._alone = self._penalty

    def stop(self) -> None:
        """End its threads."""
        with self._lock:
            words = (ctypes.c_int64.from_address(self._control + at) for at in (STOP, POSTED))
            for word in words:
                word.value += 1
            for _ in range(1, self.threads):
                ctypes.CDLL(None).sem_post(ctypes.c_void_p(self._control + SEMAPHORE))


def program(*instructions: tuple[Operation, Sequence[int]]) -> np.ndarray:
    """A program of these operations and their operands."""
    rows = np.zeros((len(instructions), WIDTH), np.int64)
    for row, (operation, operands) in zip(rows, instructions, strict=True):
        row[0], row[1 : 1 + len(operands)] = operation.address, operands
    return rows


_pool: Pool | None = None


def pool() -> Pool:
    """The threads of this process, as many as PyTorch has."""
    global _pool
    threads = torch.get_num_threads()
    if _pool is None or _pool.threads != threads:
        if _pool is not None:
            _pool.stop()
        _pool = Pool(threads)
    return _pool


def _forget() -> None:
    """A forked process has no threads but its own."""
    global _pool
    _pool = None


os.register_at_fork(after_in_child=_forget)
