"""The engine against the matmuls it cannot do without, and against what others offer.

    python benchmarks/engine.py                 # time and memory, writes benchmarks/results/engine.json
    python benchmarks/engine.py --widths 576 --repeats 3

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
from collections.abc import Callable
from datetime import date
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

import qtarget as qt

VOCAB = 49152
TEACHER_METHODS = ("qtarget target-sft", "qtarget target-sft, compiled", "eager target-sft", "compiled target-sft")
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


def qtarget_dft(x: Inputs, backend: str = "torch") -> Tensor:
    return qt.linear_target_loss(x.hidden, x.weight, x.labels, qt.preset("dft"), backend=backend).loss


def qtarget_sft(x: Inputs) -> Tensor:
    return qt.linear_target_loss(x.hidden, x.weight, x.labels, qt.preset("sft")).loss


def qtarget_cft(x: Inputs) -> Tensor:
    return qt.linear_target_loss(x.hidden, x.weight, x.labels, qt.preset("cft"), critical=x.critical).loss


def qtarget_target_sft(x: Inputs, backend: str = "torch") -> Tensor:
    teacher = qt.Head(x.teacher_hidden, x.teacher_weight)
    target = qt.preset("target-sft")
    return qt.linear_target_loss(x.hidden, x.weight, x.labels, target, teacher=teacher, backend=backend).loss


def compiled_rows(method: Callable[..., Tensor]) -> Callable[[Inputs], Tensor]:
    """qtarget with its row functions compiled, as a long run has them."""
    return functools.partial(method, backend="compiled")


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


def _compiled(function: Callable[[Inputs], Tensor]) -> Callable[[Inputs], Tensor]:
    return torch.compile(function)


METHODS: dict[str, Callable[[], Callable[[Inputs], Tensor]]] = {
    "qtarget dft": lambda: qtarget_dft,
    "qtarget target-sft": lambda: qtarget_target_sft,
    "qtarget sft": lambda: qtarget_sft,
    "qtarget cft, a fifth kept": lambda: qtarget_cft,
    "qtarget dft, compiled": lambda: compiled_rows(qtarget_dft),
    "qtarget target-sft, compiled": lambda: compiled_rows(qtarget_target_sft),
    "eager dft": lambda: eager_dft,
    "eager target-sft": lambda: eager_target_sft,
    "compiled dft": lambda: _compiled(eager_dft),
    "compiled target-sft": lambda: _compiled(eager_target_sft),
    "torch linear_cross_entropy (sft)": lambda: torch_sft,
    "trl default (dft)": lambda: trl_dft,
}


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


def measure_time(tokens: int, width: int, repeats: int) -> dict:
    x = Inputs(tokens, width)
    missing, methods, first = {}, {}, {}
    for name, make in METHODS.items():
        try:
            method = make()
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
            ratios[name].append(seconds[name][-1] / now[name in TEACHER_METHODS])
    share = (time.process_time() - cpu) / (time.perf_counter() - wall) / torch.get_num_threads()
    spared = statistics.median(seconds[BLOCKS]) - statistics.median(seconds[COMPILED])
    compiling = first[COMPILED] - statistics.median(seconds[COMPILED])
    return {
        "cft over sft": round(statistics.median(seconds[CFT]) / statistics.median(seconds[SFT]), 3),
        "compiling": {
            "seconds, nothing cached": round(compiling, 1),
            "spared seconds a logit": spared / (tokens * VOCAB),
            "pays from logits": compiling / (spared / (tokens * VOCAB)) if spared > 0 else None,
        },
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


def measure_memory(method: str, tokens: int, width: int) -> float | None:
    """Peak memory above inputs, dH and dW, in units of tokens × vocab × 4 bytes."""
    command = [sys.executable, __file__, "--memory_of", method, "--tokens", str(tokens), "--widths", str(width)]
    done = subprocess.run(command, capture_output=True, text=True)
    return float(done.stdout.split()[-1]) if done.returncode == 0 else None


def memory_of(method: str, tokens: int, width: int) -> float:
    x = Inputs(tokens, width)
    function = METHODS[method]()
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--widths", type=int, nargs="+", default=[576, 896])
    parser.add_argument("--tokens", type=int, default=2048, help="tokens of the timing; memory takes twice as many")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--no_memory", action="store_true")
    parser.add_argument("--no_time", action="store_true", help="measure memory only and keep the times on record")
    parser.add_argument("--memory_of", help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    if args.memory_of:
        print(memory_of(args.memory_of, args.tokens, args.widths[0]))
        return
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = tempfile.mkdtemp()  # so that compiling is timed with nothing cached
    record: dict = {"machine": machine(), "time": [], "memory": []}
    if args.no_time:
        record["time"] = json.loads(args.out.read_text())["time"]
    for width in [] if args.no_time else args.widths:
        found = measure_time(args.tokens, width, args.repeats)
        record["time"].append(found)
        print(f"\nwidth {width}, vocabulary {VOCAB}, {args.tokens} tokens, float32: time over the necessary matmuls")
        for name, ratio in found["ratio"].items():
            limit = f"  (limit {LIMITS[name]:.2f})" if name in LIMITS else ""
            print(f"  {name:<34} {ratio:5.2f}{limit}")
        print(f"  cft with a fifth of the tokens kept over sft: {found['cft over sft']:.2f}")
        print("  compiled row mathematics: " + ", ".join(f"{k} {v:.3g}" for k, v in found["compiling"].items() if v))
        for name, reason in found["not available"].items():
            print(f"  {name:<34} not available: {reason}")
        if found["own_cpu_share"] < 0.9:
            print(f"  this process had only {found['own_cpu_share']:.0%} of its cores: run again on a quiet machine")
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
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(record, indent=1) + "\n")
    print(f"\nraw results: {args.out}")


if __name__ == "__main__":
    main()
