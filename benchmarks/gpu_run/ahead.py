"""The engine's kernels compiled for a GPU that need not be there: registers, spills, load widths, instructions.

    python -m gpu_run.ahead 80 90         # from benchmarks/; compute capability 8.0 and 9.0, a line for each variant

A launch is what the wrappers of ``kernels.py`` make of it: they are called with tensors without data and a stand-in for
the kernel, so that argument types, flags and warps are theirs. ptxas and cuobjdump come with Triton. TRITON_INTERPRET
must not be set.
"""

from __future__ import annotations

import functools
import json
import multiprocessing
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qtarget.losses.engine.row_functions import Pass
from qtarget.losses.engine.row_plan import GIVEN

# Qwen2's head, and a vocabulary with padded rows of it.
ROWS, VOCAB, REAL = 1024, 151936, 151665
ODD = 50257  # GPT-2's
MOST_REGISTERS = 128
WARP = 32


@dataclass(frozen=True)
class Variant:
    """A launch: which kernel, for which target, and the dtype of g.

    Attributes:
        skips: whether some rows have no gradient. width: columns of the logits.
        wide: whether 16-byte loads are asked for. registers: the most a thread may take.
    """

    kernel: str
    label: str
    case: Pass
    g: torch.dtype = torch.bfloat16
    skips: bool = False
    width: int = VOCAB
    wide: bool = True
    registers: int = MOST_REGISTERS


@dataclass
class Report:
    """What ptxas and the machine code say of one variant.

    Attributes:
        kernel: "sums" or "gradient". label: the target. arch: 80 for compute capability 8.0.
        flags: the kernel's constants that are on. g: dtype of what the gradient is written in, "" for sums.
        registers: of a thread. stack: bytes of a thread, 0 where nothing spills. shared: bytes of a block.
        loads_16_bytes: whether every load of logits in the loop takes 16 bytes. loads: how often each kind stands there.
        instructions: of the whole kernel. per_element: of the loop, for one logit; NaN where no loop was found.
        fault: why it could not be compiled, or "".
        wide, most_registers: what is asked of the variant.
    """

    kernel: str
    label: str
    arch: int
    flags: list[str]
    g: str = ""
    registers: int = 0
    stack: int = 0
    shared: int = 0
    loads_16_bytes: bool = False
    loads: dict[str, int] = field(default_factory=dict)
    instructions: int = 0
    per_element: float = float("nan")
    fault: str = ""
    wide: bool = True
    most_registers: int = MOST_REGISTERS

    @property
    def name(self) -> str:
        return " ".join(filter(None, (self.kernel, self.label, self.g, f"sm_{self.arch}")))

    @property
    def faults(self) -> list[str]:
        """What it does not keep of: compiled, no stack, few enough registers, 16-byte loads."""
        if self.fault:
            return [f"{self.name}: {self.fault}"]
        found = []
        if self.stack:
            found.append(f"{self.name}: {self.stack} bytes of stack; none is allowed")
        if self.registers > self.most_registers:
            found.append(f"{self.name}: {self.registers} registers a thread; at most {self.most_registers} are allowed")
        if self.wide and not self.loads_16_bytes:
            found.append(f"{self.name}: logits are loaded by {self.loads}; 16 bytes at a time are asked for")
        return found


def variants() -> list[Variant]:
    """Each form of the two passes that a target can ask for, over float32 logits."""
    student = Pass(VOCAB)
    teacher = Pass(VOCAB, c_z=0.5, c_o=0.5, pooled=True, other=True)
    kept = Pass(REAL, pooled=True)  # what is outside a top-k distribution's entries, of a padded vocabulary
    forms = {
        "student": student,
        "uniform": Pass(VOCAB, c_z=0.0, pooled=True),
        "gem": Pass(VOCAB, c_z=1 / 0.7, pooled=True),
        "gem logsigmoid": Pass(VOCAB, c_z=1 / 0.7, slope=0.01, pooled=True, offset=True),
        "teacher": teacher,
        "teacher, padded": replace(teacher, support=REAL),
        "kd at T=2": Pass(VOCAB, c_z=0.0, c_o=0.5, c_b=0.5, pooled=True, other=True, pair=True),
    }
    found = [Variant("sums", label, case) for label, case in forms.items()]
    found.append(Variant("sums", "student with groups (eaft)", replace(student, groups=True)))
    found.append(Variant("sums", "top-k, padded", kept))
    found.append(Variant("sums", "top-k with groups", replace(kept, groups=True)))
    # A vocabulary that 16 does not divide: told, not asked for.
    odd = {"width": ODD, "wide": False}
    found.append(Variant("sums", "student, odd vocabulary", Pass(ODD), **odd))
    found.append(Variant("gradient", "student, odd vocabulary", Pass(ODD), **odd))
    gradients = forms | {
        "top-k": Pass(VOCAB, one_shift=True),
        "top-k, padded": Pass(REAL, one_shift=True),
        "student, softcap": replace(student, softcap=30.0),
        "teacher, softcap": replace(teacher, softcap=30.0),
        "student, KL": replace(student, with_kl=True),
        "teacher, KL": replace(teacher, with_kl=True),
        "kd at T=2, KL": replace(forms["kd at T=2"], with_kl=True),
        "gem logsigmoid, KL": replace(forms["gem logsigmoid"], with_kl=True),
    }
    found += [Variant("gradient", label, case) for label, case in gradients.items()]
    found = [_as_it_is(variant) for variant in found]
    for label in ("student", "teacher", "top-k"):
        found.append(Variant("gradient", f"{label}, skips", gradients[label], skips=True))
        found += [Variant("gradient", label, gradients[label], g) for g in (torch.float16, torch.float32)]
    # float32 g: a pass of its own measures how far the normaliser is off
    found.append(Variant("gradient", "teacher, drift", replace(teacher, write=False), torch.float32))
    return found


def _as_it_is(variant: Variant) -> Variant:
    """What a variant is known not to keep, so that anything else is noticed."""
    if variant.label == "kd at T=2, KL":  # only where every statistic is asked for
        return replace(variant, registers=160)
    if (
        variant.label == "teacher, padded"
    ):  # the other model's logits are told apart at a column that 16 does not divide
        return replace(variant, wide=False)
    return variant


def compile_all(arch: int, workers: int = 1, only: str = "") -> list[Report]:
    """Every variant compiled for compute capability ``arch`` / 10, in ``workers`` forks of this process.

    Args:
        only: leaves out the variants in whose name it does not stand.

    Raises:
        RuntimeError: TRITON_INTERPRET is set, so that there is nothing to compile.
    """
    return list(compiling(arch, workers, only))


def compiling(arch: int, workers: int = 1, only: str = "") -> Iterator[Report]:
    """As ``compile_all``, each report as it comes."""
    if os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
        raise RuntimeError("TRITON_INTERPRET is set, under which nothing is compiled; start without it")
    chosen = [variant for variant in variants() if only in f"{variant.kernel} {variant.label}"]
    report = functools.partial(_report, arch=arch)
    if workers == 1:
        yield from map(report, chosen)
        return
    # Forks, not threads: compiled by threads, the same kernel came out with 128 registers or with 143.
    with multiprocessing.get_context("fork").Pool(workers) as pool:
        yield from pool.imap(report, chosen)


# -- what a wrapper launches -------------------------------------------------------------------------------------------


@dataclass
class Launch:
    """A kernel with the arguments of one launch."""

    function: Any
    arguments: dict[str, Any]
    constants: dict[str, Any]
    warps: int


class _Recorder:
    """Stands in for a kernel: remembers what it is launched with."""

    def __init__(self, function: Any):
        self.function, self.launch = function, None

    def __getitem__(self, grid: Any):
        def launch(*arguments: Any, num_warps: int, **constants: Any) -> None:
            names = [name for name in self.function.arg_names if name not in constants]
            self.launch = Launch(self.function, dict(zip(names, arguments, strict=True)), constants, num_warps)

        return launch


def captured(variant: Variant) -> Launch:
    """What the wrapper of ``kernels.py`` launches for a variant."""
    from qtarget.losses.engine import kernels

    stride = -(-variant.width // 64) * 64  # as the engine's buffers
    z = torch.empty(ROWS, stride, device="meta").narrow(1, 0, variant.width)
    o = torch.empty_strided(z.shape, z.stride(), device="meta") if variant.case.other else z
    y = torch.empty(ROWS, dtype=torch.int64, device="meta")
    name = f"_{variant.kernel}"
    function = getattr(kernels, name)
    recorder = _Recorder(function)
    setattr(kernels, name, recorder)
    try:
        if variant.kernel == "sums":
            kernels.sums(z, o, y, variant.case)
        else:
            g = torch.empty(ROWS, stride, dtype=variant.g, device="meta").narrow(1, 0, variant.width)
            given = torch.empty(len(GIVEN), ROWS, device="meta")
            kernels.gradient(z, o, y, given, variant.case, g, y if variant.skips else None)
    finally:
        setattr(kernels, name, function)
    assert recorder.launch is not None
    return recorder.launch


_POINTERS = {
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.int64: "*i64",
    torch.float64: "*fp64",
}


def compiled(launch: Launch, arch: int) -> Any:
    """The kernel as Triton compiles it at run time: whole numbers that 16 divides, and pointers, are said to be so."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from triton.compiler import compile as build

    signature, constants, attributes = {}, {}, {}
    for at, name in enumerate(launch.function.arg_names):
        if name in launch.constants:
            signature[name], constants[(at,)] = "constexpr", launch.constants[name]
            continue
        value = launch.arguments[name]
        if isinstance(value, Tensor):
            signature[name] = _POINTERS[value.dtype]
        elif isinstance(value, int):
            signature[name] = "i32"
        else:
            signature[name] = "fp32"
        if isinstance(value, Tensor) or (isinstance(value, int) and value % 16 == 0):
            attributes[(at,)] = [["tt.divisibility", 16]]
    source = ASTSource(launch.function, signature, constants, attributes)
    return build(source, target=GPUTarget("cuda", arch, WARP), options={"num_warps": launch.warps})


# -- what came of it ---------------------------------------------------------------------------------------------------


def _report(variant: Variant, arch: int) -> Report:
    launch = captured(variant)
    flags = sorted(name for name, value in launch.constants.items() if value and name != "BLOCK")
    g = "" if variant.kernel == "sums" else str(variant.g).removeprefix("torch.")
    report = Report(variant.kernel, variant.label, arch, flags, g)
    report.wide, report.most_registers = variant.wide, variant.registers
    try:
        kernel = compiled(launch, arch)
        usage, code = _disassembled(kernel.asm["cubin"])
    except Exception as error:  # one that does not compile is a finding about that one
        report.fault = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        return report
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:(\d+)", usage)
    if found is None:
        report.fault = f"cuobjdump tells nothing of registers: {usage[:200]!r}"
        return report
    report.registers, report.stack = int(found[1]), int(found[2])
    report.shared = int(kernel.metadata.shared)
    whole = [operation for _, operation, _ in _instructions(code)]
    report.instructions = len(whole)
    loop = _longest_loop(code)
    if loop:
        elements = launch.constants["BLOCK"] / (launch.warps * WARP)
        report.per_element = round(len(loop) / elements, 1)
    loads = [operation for operation in loop or whole if operation.startswith("LDG")]
    report.loads = {name: loads.count(name) for name in sorted(set(loads))}
    wide = [name for name in loads if ".128" in name]
    report.loads_16_bytes = bool(wide) and (not loop or len(wide) == len(loads))
    return report


def _disassembled(cubin: bytes) -> tuple[str, str]:
    """(use of resources, machine code), as cuobjdump prints them."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    if not tool.exists():
        tool = Path(shutil.which("cuobjdump") or tool)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage, code = (
            subprocess.run([str(tool), option, file.name], capture_output=True, text=True, check=True).stdout
            for option in ("-res-usage", "-sass")
        )
    return usage, code


_LINE = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+ )?([A-Z][A-Z0-9_.]*)(.*)")


def _instructions(code: str) -> list[tuple[int, str, str]]:
    """(address, operation, operands) of each line of machine code."""
    found = (_LINE.search(line) for line in code.splitlines())
    return [(int(match[1], 16), match[2], match[3]) for match in found if match]


def _longest_loop(code: str) -> list[str]:
    """Operations of the longest stretch that is jumped back over; empty where there is none."""
    lines = _instructions(code)
    best: tuple[int, int] | None = None
    for address, operation, operands in lines:
        to = re.search(r"0x([0-9a-f]+)", operands) if operation.startswith("BRA") else None
        if to and int(to[1], 16) < address and (best is None or address - int(to[1], 16) > best[1] - best[0]):
            best = (int(to[1], 16), address)
    return [operation for address, operation, _ in lines if best and best[0] <= address <= best[1]]


def line(report: Report) -> str:
    """A report for people."""
    if report.fault:
        return f"{report.name:<50} {report.fault}"
    loads = ", ".join(f"{count} {name}" for name, count in report.loads.items())
    return (
        f"{report.name:<50} {report.registers:>3} registers  stack {report.stack}  shared {report.shared:>5}  "
        f"{report.per_element:>5} SASS a logit  {loads}"
    )


def main(arguments: list[str]) -> int:
    """Compile for each compute capability named, and print a line, or with --json an object, for each variant."""
    as_json = "--json" in arguments
    only = next((argument.removeprefix("--only=") for argument in arguments if argument.startswith("--only=")), "")
    faults = 0
    for arch in [int(argument) for argument in arguments if argument.isdigit()] or [80, 90]:
        for report in compiling(arch, os.cpu_count() or 1, only):
            faults += len(report.faults)
            print(json.dumps(asdict(report)) if as_json else line(report), flush=True)
            if not as_json:
                for fault in report.faults:
                    print(f"  FAIL {fault}")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
