"""Programs, and the threads that run them together.

A program is an int64 array [instructions, WIDTH]: the address of an operation (compiler.py), its
operands, and last whether threads wait for each other after it. Every thread executes every
instruction, each its own part of the work. Between programs threads spin for a moment, then sleep.
"""

import ctypes
import os
import threading
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from llvmlite import ir
from numba import types

from vicugna.engine.cpu import llvm
from vicugna.engine.cpu import vectors as v
from vicugna.engine.cpu.compiler import Operation, entry, kernel

WIDTH = 24  # int64 numbers of an llvm.instruction
SHORTEST = 20_000_000  # ns of programs, before waiting is a reason to run alone
SPINS = 4000  # reads of a counter, about 0.1 ms, before a thread gives way

# The shared words, each in a cache line of its own: how many programs were posted, what was posted,
# how often threads arrived at a barrier and how often before this program, who sleeps.
POSTED, PROGRAM, COUNT, THREADS, BEFORE, ARRIVED, SLEEPING, SEMAPHORE = range(0, 8 * 64, 64)


# ---- instructions for threads

@llvm.instruction(types.int64, types.intp, types.int64)
def atomic_add(b: Any, address: Any, value: Any) -> Any:
    """Add to an int64 in memory; what it was before."""
    return b.atomic_rmw("add", llvm.pointer(b, address, llvm.I64), value, "seq_cst")


@llvm.instruction(types.int64, types.intp, types.int64)
def exchange(b: Any, address: Any, value: Any) -> Any:
    """Replace an int64 in memory; what it was before."""
    return b.atomic_rmw("xchg", llvm.pointer(b, address, llvm.I64), value, "seq_cst")


@llvm.instruction(types.int64, types.intp)
def atomic_read(b: Any, address: Any) -> Any:
    """An int64 in memory as other threads left it."""
    return b.load_atomic(llvm.pointer(b, address, llvm.I64), "seq_cst", 8)


@llvm.instruction(types.void)
def pause(b: Any) -> None:
    """Tell the CPU that this thread spins."""
    if b.module.triple.startswith("x86"):
        llvm.call(b, "llvm.x86.sse2.pause", llvm.VOID)


@llvm.instruction(types.void, types.intp, types.intp, types.int64, types.int64)
def call(b: Any, address: Any, operands: Any, thread: Any, threads: Any) -> None:
    """Call an operation by its address."""
    kind = ir.FunctionType(llvm.VOID, [llvm.I64] * 3)
    b.call(llvm.pointer(b, address, kind), [operands, thread, threads])


@llvm.instruction(types.int32)
def sched_yield(b: Any) -> Any:
    """Let another thread run on this core."""
    return llvm.call(b, "sched_yield", llvm.I32)


@llvm.instruction(types.int64)
def clock(b: Any) -> Any:
    """Nanoseconds of the monotonic clock."""
    with b.goto_entry_block():
        time_ = b.alloca(llvm.I64, size=ir.Constant(llvm.I64, 2))
    llvm.call(b, "clock_gettime", llvm.I32, ir.Constant(llvm.I32, time.CLOCK_MONOTONIC),
              b.ptrtoint(time_, llvm.I64))
    second, rest = (b.load(b.gep(time_, [ir.Constant(llvm.I64, i)])) for i in range(2))
    return b.add(b.mul(second, ir.Constant(llvm.I64, 10**9)), rest)


@llvm.instruction(types.int32, types.intp)
def sem_wait(b: Any, semaphore: Any) -> Any:
    """Sleep until the semaphore at this address is posted."""
    return llvm.call(b, "sem_wait", llvm.I32, semaphore)


@llvm.instruction(types.int32, types.intp)
def sem_post(b: Any, semaphore: Any) -> Any:
    """Wake one thread that sleeps there."""
    return llvm.call(b, "sem_post", llvm.I32, semaphore)


# ---- what every thread does

@kernel
def _barrier(control: int, target: int) -> int:
    """Wait until threads have arrived `target` times in all; ns of that, 0 if it was short."""
    atomic_add(control + ARRIVED, 1)
    spins, start = 0, 0
    while atomic_read(control + ARRIVED) < target:
        spins += 1
        if spins < SPINS:
            pause()
            continue
        if start == 0:
            start = clock()
        sched_yield()
    return clock() - start if start else 0


@kernel
def _execute(control: int, program: int, count: int, thread: int, threads: int,
             before: int) -> int:
    """All instructions; ns of waiting for others."""
    waited, target = 0, before
    for i in range(count):
        row = program + i * WIDTH * 8
        call(v.read_i64(row), row + 8, thread, threads)
        if threads > 1 and v.read_i64(row + (WIDTH - 1) * 8):
            target += threads
            waited += _barrier(control, target)
    return waited


@entry
def _run(control: int, program: int, count: int, threads: int) -> int:
    """Thread 0: post the program, and take part in it; ns of waiting for others."""
    before = atomic_read(control + ARRIVED)
    if threads > 1:
        v.write_i64(control + PROGRAM, program)
        v.write_i64(control + COUNT, count)
        v.write_i64(control + THREADS, threads)
        v.write_i64(control + BEFORE, before)
        atomic_add(control + POSTED, 1)
        for _ in range(exchange(control + SLEEPING, 0)):
            sem_post(control + SEMAPHORE)
    return _execute(control, program, count, 0, threads, before)


@entry
def _work(control: int, thread: int) -> None:
    """Any other thread: take part in every program posted."""
    seen, spins = 0, 0
    while True:
        if atomic_read(control + POSTED) == seen:
            spins += 1
            if spins < SPINS:
                if spins < 64:
                    pause()
                else:  # PyTorch's own threads may wait for this core
                    sched_yield()
                continue
            atomic_add(control + SLEEPING, 1)
            if atomic_read(control + POSTED) == seen:  # else it may have been counted too late
                sem_wait(control + SEMAPHORE)
            continue
        seen, spins = seen + 1, 0
        _execute(control, v.read_i64(control + PROGRAM), v.read_i64(control + COUNT), thread,
                 v.read_i64(control + THREADS), v.read_i64(control + BEFORE))


class Pool:
    """As many threads as given, the caller's among them; they live as long as the process. Where
    other processes keep a core busy, so that the caller waits more than it works, it runs some
    programs alone."""

    def __init__(self, threads: int) -> None:
        self.threads = threads
        self._words = np.zeros(10 * 64, np.uint8)
        self._control = -(-self._words.ctypes.data // 64) * 64
        self._waited = self._total = 0.0  # ns of the last ten programs or so
        self._alone = self._penalty = 0  # programs
        ctypes.CDLL(None).sem_init(ctypes.c_void_p(self._control + SEMAPHORE), 0, 0)
        for thread in range(1, threads):
            threading.Thread(target=_work, args=(self._control, thread), daemon=True).start()

    def run(self, program: np.ndarray) -> None:
        """Run an int64 array [instructions, WIDTH] to its end."""
        if self._alone:
            self._alone -= 1
            _run(self._control, program.ctypes.data, len(program), 1)
            return
        begun = time.perf_counter_ns()
        waited = _run(self._control, program.ctypes.data, len(program), self.threads)
        self._waited = self._waited * 0.9 + waited
        self._total = self._total * 0.9 + time.perf_counter_ns() - begun
        if self._waited > 0.5 * max(self._total, SHORTEST):
            self._waited = self._total = 0.0
            self._alone = self._penalty = min(2 * self._penalty + 8, 256)
        elif not waited:
            self._penalty = self._penalty * 7 // 8


class Instruction(NamedTuple):
    """An operation and its operands; `wait` says whether what follows needs all of its result, and
    not only what the same thread made."""

    operation: Operation
    operands: Sequence[int]
    wait: bool = True


def program(instructions: Sequence[Instruction]) -> np.ndarray:
    """A program of these instructions; after the last one threads always wait."""
    rows = np.zeros((len(instructions), WIDTH), np.int64)
    for row, (operation, operands, wait) in zip(rows, instructions, strict=True):
        row[0], row[1 : 1 + len(operands)], row[-1] = operation.address, operands, wait
    rows[-1, -1] = 1
    return rows


_pools: dict[int, Pool] = {}
_lock = threading.Lock()


def run(program: np.ndarray) -> None:
    """Run a program on as many threads as PyTorch has here; callers take turns."""
    threads = torch.get_num_threads()
    with _lock:
        if threads not in _pools:
            _pools[threads] = Pool(threads)
        _pools[threads].run(program)


def _reset() -> None:
    """A forked process has none of the threads."""
    global _lock
    _pools.clear()
    _lock = threading.Lock()


os.register_at_fork(after_in_child=_reset)
