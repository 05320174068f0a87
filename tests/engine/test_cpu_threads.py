"""Programs on several threads."""

import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch

pytest.importorskip("numba")

from vicugna.engine.cpu import compiler, linear


def test_kernels_are_named_after_what_they_are_compiled_from() -> None:
    """The linker finds machine code by name, also that which other processes have compiled."""
    def made(constant: int, inner: Any) -> Any:
        return compiler.kernel(lambda x: inner(x) + constant)

    one, two = made(1, abs), made(2, abs)
    names = [kernel.py_func.__qualname__ for kernel in (
        one, two, made(1, one), made(1, two), made(1, abs))]
    assert len(set(names)) == 4 and names[0] == names[-1]


@pytest.fixture(autouse=True)
def same_threads_afterwards() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def test_results_have_the_same_bits_on_every_number_of_threads() -> None:
    packed = linear.pack(torch.randn(112, 64), "q8_0")
    x = torch.randn(9, 64)
    results = []
    for threads in (1, 2, 3, 2):
        torch.set_num_threads(threads)
        results.append(linear.matmul(x, packed))
    assert all(torch.equal(result, results[0]) for result in results)


def test_callers_on_several_threads_take_turns() -> None:
    torch.set_num_threads(2)
    packed = linear.pack(torch.randn(48, 64), "q8_0")
    inputs = [torch.randn(5, 64) for _ in range(4)]
    expected = [linear.matmul(x, packed) for x in inputs]
    wrong = []

    def call(x: torch.Tensor, result: torch.Tensor) -> None:
        torch.set_num_threads(2)  # each thread has its own number
        for _ in range(20):
            if not torch.equal(linear.matmul(x, packed), result):
                wrong.append(x)

    callers = [threading.Thread(target=call, args=pair)
               for pair in zip(inputs, expected, strict=True)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert not wrong
