"""The engine against the matmuls it cannot do without, and against what others offer.

    python benchmarks/engine.py                 # time and memory, writes benchmarks/results/engine.json
    python benchmarks/engine.py --widths 576 --repeats 3
    python benchmarks/engine.py --targets reverse_kl deft      # these beside target-sft, time only

``--targets`` takes presets and divergences, which stand for distillation by them. Each is timed beside its printed loss
through autograd on full logits; the record is kept beside the others in the same file.

Time: forward and backward, all methods in turn in one process, repeated; the figure is the median of the ratios to the
bare matmuls of the same round (three with the student's head: logits, dH, dW; a fourth where there is a teacher). A
ratio holds while the machine's speed drifts; absolute times here do not.
Memory: each method in a process of its own; peak resident memory above the inputs and above dH and dW, as a share of one
[tokens, vocab] float32 matrix.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import qtarget as qt
from qtarget.targets.divergence import Divergence

VOCAB = 49152
LIMITS = {"qtarget dft": 1.20, "qtarget target-sft": 1.30}
MEMORY_LIMITS = {"qtarget dft": 0.2, "qtarget target-sft": 0.4}
BLOCKS, COMPILED = "qtarget target-sft", "qtarget target-sft, compiled"
SFT, CFT = "qtarget sft", "qtarget cft, a fifth kept"
RESULTS = Path(__file__).parent / "results" / "engine.json"


class Inputs:
    """Hidden states and heads of a student and a teacher that is near it, of one width."""

    def __init__(self, tokens: int, width: int):
        torch.manual_seed(0)
        self.hidden = torch.randn(tokens, width, requires_grad=True)
        self.weight = (torch.randn(VOCAB, width) * width**-0.5).requires_grad_()
        self.teacher_hidden = self.hidden.detach() + 0.3 * torch.randn(tokens, width)
        self.teacher_weight = self.weight.detach() + 0.1 * width**-0.5 * torch.randn(VOCAB, width)
        # Half the labels are what the student holds likely, half are drawn at random.
        with torch.no_grad():
            likely = torch.cat([(h @ self.weight.T).argmax(-1) for h in self.hidden.split(256)])
        random = torch.randint(0, VOCAB, (tokens,))
        self.labels = torch.where(torch.rand(tokens) < 0.5, likely, random)
        self.critical = torch.rand(tokens) < 0.2

    def clear(self) -> None:
        self.hidden.grad = self.weight.grad = None


def eager_dft(x: Inputs) -> Tensor:
    log_p_y = (x.hidden @ x.weight.T).log_softmax(-1).gather(1, x.labels[:, None])
    return -(log_p_y.detach().exp() * log_p_y).mean()


def eager_target_sft(x: Inputs) -> Tensor:
    z = x.hidden @ x.weight.T
    log_p = z.log_softmax(-1)
    with torch.no_grad():
        R = (0.5 * z + 0.5 * (x.teacher_hidden @ x.teacher_weight.T)).softmax(-1)
        p_y = log_p.gather(1, x.labels[:, None]).exp()
        Q = (1 - p_y) * R
        Q.scatter_add_(1, x.labels[:, None], p_y)
    return -(Q * log_p).sum(-1).mean()


def qtarget_loss(x: Inputs, target: qt.Target, backend: str = "torch") -> Tensor:
    others: dict[str, Any] = {name: qt.Head(x.teacher_hidden, x.teacher_weight) for name in others_of(target)}
    critical = x.critical if "critical" in target.requires else None
    return qt.linear_target_loss(
        x.hidden, x.weight, x.labels, target, critical=critical, backend=backend, **others
    ).loss


def printed_loss(x: Inputs, target: qt.Target) -> Tensor:
    """The loss as it is printed, through autograd on full logits."""
    loss = qt.presets.printed_loss(target)
    assert loss is not None
    given: dict[str, Tensor] = {}
    with torch.no_grad():
        for name in others_of(target):
            given[f"{name}_logits"] = x.teacher_hidden @ x.teacher_weight.T
    return loss(x.hidden @ x.weight.T, x.labels, {**given, "critical": x.critical}).mean()


def others_of(target: qt.Target) -> list[str]:
    """The models beside the student that a target needs; each is played by the teacher."""
    return [name for name in ("teacher", "reference") if name in target.requires]


def torch_sft(x: Inputs) -> Tensor:
    """PyTorch's own chunked head and cross-entropy: hard labels only."""
    options = torch.nn.LinearCrossEntropyOptions()
    return F.linear_cross_entropy(x.hidden, x.weight, x.labels, options=options)


def trl_dft(x: Inputs) -> Tensor:
    """TRL's default path on this device, with the statistics its SFT trainer asks for."""
    from trl.kernels import ChunkedLogProbFunction

    fields = ("log_probs", "entropy", "is_top1")
    log_p_y = ChunkedLogProbFunction.apply(x.hidden, x.weight, None, x.labels, 1.0, 32768, None, 1.0, fields)[0]
    return -(log_p_y.detach().exp() * log_p_y).mean()


def liger_fused_jsd() -> Callable[[Inputs], Tensor]:
    """Liger's Triton kernels."""
    from liger_kernel.transformers import LigerFusedLinearJSD

    loss = LigerFusedLinearJSD(jsd_beta=0.5)
    return lambda x: loss(x.hidden, x.weight, x.teacher_hidden, x.teacher_weight, None)


def liger_chunked_jsd() -> Callable[[Inputs], Tensor]:
    """Liger's chunked loss, compiled as is its default; the part of the labels has no weight."""
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    loss = LigerFusedLinearJSDLoss(weight_hard_loss=0.0, weight_soft_loss=1.0, beta=0.5)
    return lambda x: loss(x.hidden, x.weight, x.teacher_hidden, x.teacher_weight, x.labels)


@dataclass(frozen=True)
class Method:
    """``make`` gives a loss or raises where there is none. teacher: whether another model's logits are formed."""

    make: Callable[[], Callable[[Inputs], Tensor]]
    teacher: bool = False


def qtarget_method(target: qt.Target, backend: str = "torch") -> Method:
    """``backend="compiled"``: with its row functions compiled, as a long run has them."""
    loss = functools.partial(qtarget_loss, target=target, backend=backend)
    return Method(lambda: loss, bool(others_of(target)))


def printed_method(target: qt.Target) -> Method:
    loss = functools.partial(printed_loss, target=target)
    return Method(lambda: loss, bool(others_of(target)))


METHODS = {
    "qtarget dft": qtarget_method(qt.preset("dft")),
    BLOCKS: qtarget_method(qt.preset("target-sft")),
    SFT: qtarget_method(qt.preset("sft")),
    CFT: qtarget_method(qt.preset("cft")),
    "qtarget dft, compiled": qtarget_method(qt.preset("dft"), "compiled"),
    COMPILED: qtarget_method(qt.preset("target-sft"), "compiled"),
    "eager dft": Method(lambda: eager_dft),
    "eager target-sft": Method(lambda: eager_target_sft, teacher=True),
    "compiled dft": Method(lambda: torch.compile(eager_dft)),
    "compiled target-sft": Method(lambda: torch.compile(eager_target_sft), teacher=True),
    "torch linear_cross_entropy (sft)": Method(lambda: torch_sft),
    "trl default (dft)": Method(lambda: trl_dft),
}


def methods_for(names: Sequence[str]) -> dict[str, Method]:
    """target-sft, and each of the named presets or divergences beside its printed loss and its peers."""
    found = {BLOCKS: METHODS[BLOCKS]}
    for name in names:
        target = qt.preset("kd", divergence=name) if name in Divergence.known else qt.preset(name)
        found[f"qtarget {name}"] = qtarget_method(target)
        found[f"eager {name}, printed"] = printed_method(target)
        if name == "jsd":
            found["liger chunked jsd"] = Method(liger_chunked_jsd, teacher=True)
            found["liger fused jsd"] = Method(liger_fused_jsd, teacher=True)
    return found


@torch.no_grad()
def bare_matmuls(x: Inputs, teacher: bool, rows: int, logits: Tensor, other: Tensor) -> None:
    """Logits, dH and dW, and a teacher's logits, over chunks of ``rows``: nothing else."""
    d_weight = torch.zeros_like(x.weight)
    for begin in range(0, len(x.hidden), rows):
        h = x.hidden[begin : begin + rows]
        z = logits[: len(h)]
        torch.mm(h, x.weight.T, out=z)
        if teacher:
            torch.mm(x.teacher_hidden[begin : begin + rows], x.teacher_weight.T, out=other[: len(h)])
        torch.mm(z, x.weight)
        d_weight.addmm_(z.T, h)


def timed(function: Callable[[], object]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def measure_time(asked: dict[str, Method], tokens: int, width: int, repeats: int) -> dict:
    x = Inputs(tokens, width)
    missing, methods, first = {}, {}, {}
    for name, one in asked.items():
        try:
            method = one.make()
            start = time.perf_counter()
            method(x).backward()  # warm up, compile
            first[name] = time.perf_counter() - start
            x.clear()
            methods[name] = method
        except Exception as error:  # a peer that is not there is reported, not hidden
            missing[name] = f"{type(error).__name__}: {str(error).splitlines()[0][:120]}"
    layouts = [512, tokens]
    logits, other = torch.empty(tokens, VOCAB), torch.empty(tokens, VOCAB)
    seconds: dict[str, list[float]] = {name: [] for name in methods}
    ratios: dict[str, list[float]] = {name: [] for name in methods}
    bare: dict[bool, list[float]] = {False: [], True: []}
    cpu, wall = time.process_time(), time.perf_counter()
    for _ in range(repeats):
        now = {}
        for teacher in (False, True):
            runs = [timed(lambda r=rows, t=teacher: bare_matmuls(x, t, r, logits, other)) for rows in layouts]
            now[teacher] = min(runs)
            bare[teacher].append(now[teacher])
        for name, method in methods.items():
            seconds[name].append(timed(lambda m=method: m(x).backward()))
            x.clear()
            ratios[name].append(seconds[name][-1] / now[asked[name].teacher])
    share = (time.process_time() - cpu) / (time.perf_counter() - wall) / torch.get_num_threads()
    return {
        **(compiling(first, seconds, tokens * VOCAB) if asked is METHODS else {}),
        "tokens": tokens,
        "width": width,
        "vocab": VOCAB,
        "repeats": repeats,
        "own_cpu_share": round(share, 3),
        "bare_seconds": {"student": bare[False], "with teacher": bare[True]},
        "seconds": seconds,
        "ratio": {name: round(statistics.median(values), 3) for name, values in ratios.items()},
        "not available": missing,
    }


def compiling(first: dict[str, float], seconds: dict[str, list[float]], logits: int) -> dict:
    """What the methods say of compiled row functions, and of dropped tokens."""
    median = {name: statistics.median(values) for name, values in seconds.items()}
    spared, compiled = (median[BLOCKS] - median[COMPILED]) / logits, first[COMPILED] - median[COMPILED]
    return {
        "cft over sft": round(median[CFT] / median[SFT], 3),
        "compiling": {
            "seconds, nothing cached": round(compiled, 1),
            "spared seconds a logit": spared,
            "pays from logits": compiled / spared if spared > 0 else None,
        },
    }


def measure_memory(method: str, tokens: int, width: int) -> float | None:
    """Peak memory above inputs, dH and dW, in units of tokens × vocab × 4 bytes."""
    command = [sys.executable, __file__, "--memory_of", method, "--tokens", str(tokens), "--widths", str(width)]
    done = subprocess.run(command, capture_output=True, text=True)
    return float(done.stdout.split()[-1]) if done.returncode == 0 else None


def memory_of(method: str, tokens: int, width: int) -> float:
    x = Inputs(tokens, width)
    function = METHODS[method].make()
    tiny = Inputs(8, width)
    function(tiny).backward()  # libraries' own buffers are not the method's
    del tiny
    resident = process_status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts again from here
    function(x).backward()
    outputs = 4 * (x.hidden.numel() + x.weight.numel())
    return max(0.0, process_status("VmHWM") - resident - outputs) / (tokens * VOCAB * 4)


def process_status(field: str) -> int:
    """Bytes of a line of /proc/self/status. (getrusage's peak is handed on from the parent process.)"""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return 1024 * int(line.split()[1])
    raise OSError(f"no {field} in /proc/self/status: peak memory is measured on Linux only")


def machine() -> dict:
    model = platform.processor() or platform.machine()
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                model = line.split(":", 1)[1].strip()
                break
    except OSError:
        pass
    return {
        "cpu": model,
        "threads": torch.get_num_threads(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "torch": torch.__version__,
        "date": date.today().isoformat(),
    }


def show_time(methods: dict[str, Method], tokens: int, width: int, repeats: int) -> dict:
    found = measure_time(methods, tokens, width, repeats)
    print(f"\nwidth {width}, vocabulary {VOCAB}, {tokens} tokens, float32: time over the necessary matmuls")
    for name, ratio in found["ratio"].items():
        limit = f"  (limit {LIMITS[name]:.2f})" if name in LIMITS else ""
        print(f"  {name:<34} {ratio:5.2f}{limit}")
    if "compiling" in found:
        print(f"  cft with a fifth of the tokens kept over sft: {found['cft over sft']:.2f}")
        print("  compiled row mathematics: " + ", ".join(f"{k} {v:.3g}" for k, v in found["compiling"].items() if v))
    for name, reason in found["not available"].items():
        print(f"  {name:<34} not available: {reason}")
    if found["own_cpu_share"] < 0.9:
        print(f"  this process had only {found['own_cpu_share']:.0%} of its cores: run again on a quiet machine")
    return found


def write(path: Path, record: dict) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=1) + "\n")
    print(f"\nraw results: {path}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--widths", type=int, nargs="+", default=[576, 896])
    parser.add_argument("--tokens", type=int, default=2048, help="tokens of the timing; memory takes twice as many")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--no_memory", action="store_true")
    parser.add_argument("--no_time", action="store_true", help="measure memory only and keep the times on record")
    parser.add_argument("--targets", nargs="+", metavar="NAME", help="presets and divergences, timed beside target-sft")
    parser.add_argument("--memory_of", help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    if args.memory_of:
        print(memory_of(args.memory_of, args.tokens, args.widths[0]))
        return
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = tempfile.mkdtemp()  # so that compiling is timed with nothing cached
    if args.targets:
        found = [show_time(methods_for(args.targets), args.tokens, width, args.repeats) for width in args.widths]
        write(args.out, {**json.loads(args.out.read_text()), "targets": {"machine": machine(), "time": found}})
        return
    kept = json.loads(args.out.read_text()) if args.out.exists() else {}
    record: dict = {**kept, "machine": machine(), "memory": []}
    if not args.no_time:
        record["time"] = [show_time(METHODS, args.tokens, width, args.repeats) for width in args.widths]
    if not args.no_memory:
        width, tokens = args.widths[0], 2 * args.tokens
        print(
            f"\nwidth {width}, {tokens} tokens: peak memory beyond inputs, dH and dW, in [tokens, vocab] float32 matrices"
        )
        for name in METHODS:
            share = measure_memory(name, tokens, width)
            record["memory"].append({"method": name, "tokens": tokens, "width": width, "matrices": share})
            limit = f"  (limit {MEMORY_LIMITS[name]:.1f})" if name in MEMORY_LIMITS else ""
            print(f"  {name:<34} {'not available' if share is None else f'{share:5.2f}'}{limit}")
    write(args.out, record)


if __name__ == "__main__":
    main()
