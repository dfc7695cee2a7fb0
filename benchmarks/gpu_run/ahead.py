"""The engine's kernels compiled for a GPU that need not be there: registers, spills, load widths, instructions.

    python -m gpu_run.ahead 80 90         # from benchmarks/; compute capability 8.0 and 9.0, a line for each variant

A variant is a launch that a call of the engine makes with types and flags of its own; the calls run on a CPU and launch
nothing. ptxas and cuobjdump come with Triton. TRITON_INTERPRET must not be set.
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

from gpu_run.launches import KERNELS, Call, Launch, as_on_a_device, launches

# Qwen2's head, its real tokens, and GPT-2's vocabulary, which 16 does not divide. A multiple of 16 rows, as chunks have.
VOCAB, REAL, ODD = 151936, 151665, 50257
ROWS, WIDTH = 16, 8
MOST_REGISTERS = 128
WARP = 32

_TEACHER = (("target-sft", {}),)
_TEMPERED = (("kd", {"temperature": 2.0}),)
_JSD = (("kd", {"divergence": "jsd"}),)
_SIGMOID = (("gem", {"h": "logsigmoid"}),)
_KL = {"stats": "all"}
_CAP = {"logit_softcap": 30.0}
CALLS = (
    Call("student", (("dft", {}),)),
    Call("student with groups (eaft)", (("eaft", {}),)),
    Call("uniform", (("label-smoothing", {}),)),
    Call("gem", (("gem", {}),)),
    Call("gem logsigmoid", _SIGMOID),
    Call("teacher", _TEACHER, "head"),
    Call("kd at T=2", _TEMPERED, "head"),
    Call("top-k", _TEACHER, "top-k"),
    Call("teacher, padded", _TEACHER, "head", real=REAL),
    Call("kd at T=2, padded", _TEMPERED, "head", real=REAL),
    Call("top-k, padded", _TEACHER, "top-k", real=REAL),
    Call("uniform, padded", (("label-smoothing", {}),), real=REAL),
    Call("student, softcap", (("dft", {}),), options=_CAP),
    Call("teacher, softcap", _TEACHER, "head", options=_CAP),
    Call("top-k, softcap", _TEACHER, "top-k", options=_CAP),
    Call("student, skips", (("profit", {}),)),
    Call("teacher, skips", (("profit", {}), *_TEACHER), "head"),
    Call("top-k, skips", (("profit", {}), *_TEACHER), "top-k"),
    Call("student, KL", (("dft", {}),), options=_KL),
    Call("gem logsigmoid, KL", _SIGMOID, options=_KL),
    Call("teacher, KL", _TEACHER, "head", options=_KL),
    Call("kd at T=2, KL", _TEMPERED, "head", options=_KL),
    Call("top-k, KL", _TEACHER, "top-k", options=_KL),
    *[
        Call(f"{name}, {dtype}", targets, source, getattr(torch, dtype))
        for dtype in ("float16", "float32")
        for name, targets, source in (
            ("student", (("dft", {}),), ""),
            ("teacher", _TEACHER, "head"),
            ("top-k", _TEACHER, "top-k"),
        )
    ],
    *[
        Call(f"kd by {name}", (("kd", {"divergence": name}),), "head")
        for name in ("reverse_kl", "jsd", "skew_kl", "skew_reverse_kl", "total_variation", "alpha", "todi")
    ],
    Call("kd by todi, padded", (("kd", {"divergence": "todi"}),), "head", real=REAL),
    Call("kd by jsd, top-k, padded", _JSD, "top-k", real=REAL),
    Call("kd by jsd, KL", _JSD, "head", options=_KL),
    Call("kd by jsd, softcap", _JSD, "head", options=_CAP),
    Call("student, odd vocabulary", (("dft", {}),), vocab=ODD),
    Call("teacher, odd vocabulary", _TEACHER, "head", vocab=ODD),
)


@dataclass
class Report:
    """What ptxas and the machine code say of one variant.

    Attributes:
        kernel: "sums" or "gradient". label: the call that launches it. arch: 80 for compute capability 8.0.
        flags: the kernel's constants that are on. g: dtype of what the gradient is written in, "" for sums.
        registers: of a thread. stack: bytes of a thread, 0 where nothing spills. shared: bytes of a block.
        loads_16_bytes: whether every load of logits in the loop takes 16 bytes. loads: how often each kind stands there.
        instructions: of the whole kernel. per_element: of the loop, for one logit; NaN where no loop was found.
        fault: why it could not be compiled, or "".
        wide: whether 16-byte loads are asked for. most_registers: the most a thread may take.
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
        g = "" if self.g in self.label else self.g
        return " ".join(filter(None, (self.kernel, self.label, g, f"sm_{self.arch}")))

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


@functools.cache
def variants(only: str = "") -> tuple[Launch, ...]:
    """The launches of ``CALLS`` that differ in what is compiled, each under the first call that makes it.

    Args:
        only: leaves out those in whose kernel and label it does not stand.
    """
    found: dict[tuple, Launch] = {}
    with as_on_a_device():
        for call in CALLS:
            call = replace(call, vocab=call.vocab or VOCAB)
            if not any(only in f"{kernel} {call.label}" for kernel in KERNELS):
                continue
            for launch in launches(call, ROWS, WIDTH, torch.device("cpu"), execute=False):
                found.setdefault(_key(launch), launch)
    return tuple(launch for launch in found.values() if only in f"{launch.kernel} {launch.label}")


def compile_all(arch: int, workers: int = 1, only: str = "") -> list[Report]:
    """Every variant compiled for compute capability ``arch`` / 10, in ``workers`` forks of this process.

    Raises:
        RuntimeError: TRITON_INTERPRET is set, so that there is nothing to compile.
    """
    return list(compiling(arch, workers, only))


def compiling(arch: int, workers: int = 1, only: str = "") -> Iterator[Report]:
    """As ``compile_all``, each report as it comes."""
    if os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
        raise RuntimeError("TRITON_INTERPRET is set, under which nothing is compiled; start without it")
    chosen = range(len(variants(only)))
    report = functools.partial(_numbered, only=only, arch=arch)
    if workers == 1:
        yield from map(report, chosen)
        return
    # Forks, not threads: compiled by threads, the same kernel came out with 128 registers or with 143.
    with multiprocessing.get_context("fork").Pool(workers) as pool:
        yield from pool.imap(report, chosen)


def _numbered(number: int, only: str, arch: int) -> Report:
    """A fork has the variants already, and they cannot be sent."""
    return _report(variants(only)[number], arch)


# -- compiling ---------------------------------------------------------------------------------------------------------

_POINTERS = {
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.int64: "*i64",
    torch.float64: "*fp64",
}


def _specialised(launch: Launch) -> tuple[dict, dict, dict]:
    """(types, constants, attributes) by position, as at run time: pointers and whole numbers that 16 divides are said to
    be so."""
    signature, constants, attributes = {}, {}, {}
    named = launch.named
    for at, parameter in enumerate(launch.function.params):
        name, value = parameter.name, named[parameter.name]
        if parameter.is_constexpr:
            signature[name], constants[(at,)] = "constexpr", value
        elif isinstance(value, Tensor):
            signature[name] = _POINTERS[value.dtype]
        elif isinstance(value, int):
            signature[name] = "i32"
        else:
            signature[name] = "fp32"
        if not parameter.is_constexpr and (isinstance(value, Tensor) or (isinstance(value, int) and value % 16 == 0)):
            attributes[(at,)] = [["tt.divisibility", 16]]
    return signature, constants, attributes


def _key(launch: Launch) -> tuple:
    signature, constants, attributes = _specialised(launch)
    return (
        launch.kernel,
        tuple(signature.values()),
        tuple(constants.values()),
        tuple(attributes),
        launch.options["num_warps"],
    )


def compiled(launch: Launch, arch: int) -> Any:
    """The kernel as Triton compiles it at run time."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from triton.compiler import compile as build

    source = ASTSource(launch.function, *_specialised(launch))
    options = {name: value for name, value in launch.options.items() if name not in launch.function.arg_names}
    return build(source, target=GPUTarget("cuda", arch, WARP), options=options)


# -- what came of it ---------------------------------------------------------------------------------------------------


def _report(launch: Launch, arch: int) -> Report:
    report = Report(launch.kernel, launch.label, arch, launch.flags, launch.g)
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
        elements = launch.named["BLOCK"] / (launch.options["num_warps"] * WARP)
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
    torch.set_num_threads(1)  # before there are forks
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
