"""The machine code that the merge kernels compile to for an H200, counted by instruction; needs no GPU.

    PYTHONPATH=.triton:. python benchmarks/merge_gpu_instructions.py

For each method, with base and three experts in bfloat16: bytes moved per element, instructions per element of the loop without masks
(which handles everything but the ends of tensors and a few cut chunks; the slow path of a division is not counted, as hardly any element
takes it), registers per thread, warps that a processor can hold with that many registers, and how busy its busiest unit is while the bytes move at
the target's rate: either the unit that issues instructions or one of those that execute them, which have fewer lanes for some kinds. Below 100% a
kernel is bound by memory.
"""

import os
import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from evomerge.weights.fused.blocks import BF16, F32
from evomerge.weights.fused.kernels import BAND, KEEP_ALL, MAGNITUDE, RANDOM, RANKED
from evomerge.weights.triton import kernels
from evomerge.weights.triton.batch import merge_options

HOPPER = GPUTarget("cuda", 90, 32)

CYCLES_PER_S = 132 * 1.83e9
"""of all processors of an H200 combined"""

TARGET_BYTES_PER_S = 0.85 * 4.8e12

ISSUE_LANES = 128
"""lanes for which a processor can start an instruction per cycle"""

UNITS = {
    "compare, logic, integer add": (
        64,
        "F2FP|FMNMX|FSEL|FSETP|V?IADD3?|ISETP|LEA|LOP3|MOV|PLOP3|PRMT|SEL|SGXT|SHF|VIMNMX",
    ),
    "integer multiply": (64, "IMAD"),
    "reciprocal, conversion": (16, "F2F|F2I|FCHK|I2F|I2FP|MUFU"),
}
"""Units with fewer lanes than instructions are started for -> lanes per processor, their instructions. As far as the throughput table in
CUDA's programming guide shows for compute capability 9.0; selects are counted with comparisons."""

N_INPUTS = 3

MOST_WARPS, REGISTERS = 64, 65536
"""of a processor"""

PER_THREAD = kernels.BLOCK // (32 * kernels.N_WARPS)
"""elements of a block that one thread computes"""

_PLAIN = {"BASE": 0, "MODE": KEEP_ALL, "ELECT": False, "NORMALIZE": False, "DIVIDE": False, "RESCALE": False}

METHODS = {
    "linear": _PLAIN | {"BASE": kernels.NO_BASE, "DIVIDE": True},
    "task_arithmetic": _PLAIN,
    "ties": _PLAIN | {"MODE": MAGNITUDE, "ELECT": True, "NORMALIZE": True},
    "breadcrumbs": _PLAIN | {"MODE": BAND},
    "dare_linear": _PLAIN | {"MODE": RANDOM, "RESCALE": True},
    "dare_ties": _PLAIN | {"MODE": RANDOM, "ELECT": True, "RESCALE": True},
    "della_linear": _PLAIN | {"MODE": RANKED, "RESCALE": True},
    "della": _PLAIN | {"MODE": RANKED, "ELECT": True, "RESCALE": True},
    "della, normalize: true": _PLAIN | {"MODE": RANKED, "ELECT": True, "NORMALIZE": True, "RESCALE": True},
    "dare_ties, columns": _PLAIN | {"MODE": RANDOM, "ELECT": True, "RESCALE": True, "STRIDED": True},
    "della, columns": _PLAIN | {"MODE": RANKED, "ELECT": True, "RESCALE": True, "STRIDED": True},
    "linear, dtype: bfloat16": _PLAIN | {"BASE": kernels.NO_BASE, "DIVIDE": True, "PRECISION": BF16},
    "ties, dtype: bfloat16": _PLAIN | {"MODE": MAGNITUDE, "ELECT": True, "NORMALIZE": True, "PRECISION": BF16},
    "dare_ties, dtype: bfloat16": _PLAIN | {"MODE": RANDOM, "ELECT": True, "RESCALE": True, "PRECISION": BF16},
}
"""row -> constants of `merge_chunks`; with `rescale`, the default for `dare_*` and `della*`; for columns of a tensor-parallel engine, masks cost more"""


@dataclass(frozen=True)
class Counts:
    """What one kernel compiles to."""

    bytes_moved: int
    """per element"""
    executed: dict[str, float]
    """instruction -> how many per element"""
    registers: int
    """per thread"""

    @property
    def instructions(self) -> float:
        """Instructions per element."""
        return sum(self.executed.values())

    @property
    def warps(self) -> int:
        """Warps that a processor holds at a time: whole programs, whose threads get registers in multiples of eight."""
        per_program = -(-self.registers // 8) * 8 * 32 * kernels.N_WARPS
        return min(REGISTERS // per_program * kernels.N_WARPS, MOST_WARPS)

    def busiest(self) -> tuple[str, float]:
        """The unit with most work, and its busy share of the time in which the bytes move at the target's rate."""
        cycles = CYCLES_PER_S * self.bytes_moved / TARGET_BYTES_PER_S  # per processor and element
        shares = {"issue": self.instructions / (ISSUE_LANES * cycles)}
        for unit, (lanes, names) in UNITS.items():
            shares[unit] = sum(n for name, n in self.executed.items() if re.fullmatch(names, name)) / (lanes * cycles)
        return max(shares.items(), key=lambda share: share[1])


def count(row: str) -> Counts:
    """Compiles the kernel of a row and counts its instructions."""
    same = {
        "K": N_INPUTS,
        "KINDS": 0,
        "OUT": 0,
        "PRECISION": F32,
        "ALIGNED": True,
        "STRIDED": False,
        "BLOCK": kernels.BLOCK,
    }
    constants = same | METHODS[row]
    signature = {"chunks": "*i64", "integers": "*i64", "floats": "*fp32", "largest": "*i32"}
    source = ASTSource(kernels.merge_chunks, signature | dict.fromkeys(constants, "constexpr"), constants, {})
    options = merge_options(N_INPUTS, constants["KINDS"], constants["BASE"], constants["MODE"])
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder, "kernel.cubin")
        cubin.write_bytes(triton.compile(source, target=HOPPER, options=options).asm["cubin"])
        code, resources = _cuobjdump("-sass", cubin), _cuobjdump("-res-usage", cubin)
    (loop,) = [loop for loop in _loops(code) if sum("STG.E.128" in text for _, text in loop) == 1]
    n_inputs = N_INPUTS * (2 if constants["MODE"] == RANKED else 1)
    bytes_moved = 2 * (n_inputs + (constants["BASE"] != kernels.NO_BASE) + 1)
    registers = re.search(r"REG:(\d+)", resources)
    assert registers is not None, resources
    executed = {name: n / PER_THREAD for name, n in Counter(map(_name, _executed(loop))).items()}
    return Counts(bytes_moved, executed, int(registers[1]))


def _cuobjdump(option: str, file: Path) -> str:
    program = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    return subprocess.run([program, option, file], capture_output=True, text=True, check=True).stdout


def _loops(code: str) -> list[list[tuple[int, str]]]:
    """(address, instruction) of everything between a backward branch and its target, for every loop that contains stores."""
    listed = [(int(at, 16), text) for at, text in re.findall(r"/\*([0-9a-f]{4,})\*/\s+([^;]*);", code)]
    found = []
    for at, text in listed:
        target = _target(text)
        if target is not None and target < at:
            body = [(place, other) for place, other in listed if target <= place <= at]
            found += [body] if any("STG" in other for _, other in body) else []
    return found


def _target(text: str) -> int | None:
    """The target address of a branch."""
    match = re.search(r"\bBRA\b.* (0x[0-9a-f]+)", text)
    return int(match[1], 16) if match else None


def _name(text: str) -> str:
    """The name of an instruction, without its predicate and modifiers."""
    return re.sub(r"^@\S+ ", "", text.strip()).split()[0].split(".")[0]


def _executed(loop: list[tuple[int, str]]) -> list[str]:
    """Instructions of a loop, except those that a branch skips together with a call (to the slow path of a division)."""
    skipped: set[int] = set()
    for call in [at for at, text in loop if "CALL" in text]:
        around = [(at, target) for at, text in loop if (target := _target(text)) is not None and at < call < target]
        before, after = max(around)
        skipped |= {at for at, _ in loop if before < at < after}
    return [text for at, text in loop if at not in skipped]


def main() -> None:
    print("| | bytes per element | instructions per element | registers | warps | busiest unit at 85% of 4.8 TB/s |")
    print("|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as cache:
        os.environ["TRITON_CACHE_DIR"] = cache
        for row in METHODS:
            found = count(row)
            unit, share = found.busiest()
            print(
                f"| `{row}` | {found.bytes_moved} | {found.instructions:.0f} | {found.registers} | {found.warps} "
                f"| {share:.0%} ({unit}) |"
            )


if __name__ == "__main__":
    main()
