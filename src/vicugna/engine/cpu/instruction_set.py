"""Which vector instructions the kernels are compiled for: found at run time, or forced by the
environment variable VICUGNA_CPU (see `SETS`)."""

import os
from dataclasses import dataclass
from functools import cache

import llvmlite.binding as llvm
from numba.core import config

from vicugna.errors import VicugnaError, did_you_mean

VARIABLE = "VICUGNA_CPU"


@dataclass(frozen=True)
class InstructionSet:
    """`lanes` float32 numbers fit in one of its `registers`. `needs` are the LLVM features that a
    CPU must have, `cpu` is LLVM's name of the CPU to compile for where the set is forced ("" means
    this one). `dot` says what multiplies bytes: "vnni" has an instruction for it, "madd" goes by
    16-bit products, "sdot" has ARM's for signed bytes, "llvm" leaves the choice to LLVM."""

    name: str
    lanes: int
    registers: int
    needs: tuple[str, ...]
    cpu: str
    dot: str

    def runs_here(self) -> bool:
        """Whether this CPU has all features it needs."""
        features = llvm.get_host_cpu_features()
        return all(features.get(feature) for feature in self.needs)


_AVX512 = ("avx512f", "avx512bw", "avx512vl", "avx512dq")
_AVX2 = ("avx2", "fma", "f16c")
SETS = (  # best first
    InstructionSet("avx512-vnni", 16, 32, (*_AVX512, "avx512vnni"), "cascadelake", "vnni"),
    InstructionSet("avx512", 16, 32, _AVX512, "skylake-avx512", "madd"),
    InstructionSet("avx2-vnni", 8, 16, (*_AVX2, "avxvnni"), "alderlake", "vnni"),
    InstructionSet("avx2", 8, 16, _AVX2, "haswell", "madd"),
    InstructionSet("neon", 4, 32, ("neon", "dotprod"), "", "sdot"),
    InstructionSet("generic", 4, 16, (), "", "llvm"),
)


@cache
def chosen() -> InstructionSet:
    """The best instruction set that this CPU runs, or the forced one. Must be called before numba
    compiles anything: a forced one changes the CPU that numba compiles for.

    Raises VicugnaError for an unknown forced name, or one that this CPU does not run.
    """
    name = os.environ.get(VARIABLE)
    if not name:
        return next(found for found in SETS if found.runs_here())
    by_name = {found.name: found for found in SETS}
    if name not in by_name:
        raise VicugnaError(f"unknown instruction set {name!r}", VARIABLE,
                           did_you_mean(name, by_name))
    forced = by_name[name]
    if not forced.runs_here():
        raise VicugnaError(f"this CPU does not run {name}", VARIABLE,
                           "Known here: " + ", ".join(x.name for x in SETS if x.runs_here()))
    if forced.cpu:
        config.CPU_NAME, config.CPU_FEATURES = forced.cpu, ""
    return forced
