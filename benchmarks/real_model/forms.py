"""The two forms of the check: their cells, settings and teachers, and where results go.

The small form is on record. The large one has not been run. PREDICTED for it: 40 minutes of one H100 or H200, in five
or six pieces of eight minutes; half or twice that would not surprise. From counted work and guessed rates:

    a step       32 rows of 77 tokens, 2 TFLOP: 10 ms of arithmetic, and so bound by launches. 30 layers, about 45
                 kernels each forward and 90 backward: 4,000 launches of 10 us, with clipping, AdamW and the trainer
                 45 ms; 57 with a teacher's forward pass. 250 steps see 8,000 rows, as many as 1,000 steps of 8:
                 11 s, or 14 with a teacher
    answers      3,400 of up to 72 tokens, 850 at once: 4 batches of 72 steps of 22 ms (750 launches, the sampler's
                 334 MB of float64 logits, 850 random streams), 6 s
    around them  rows, their tokens and labels 5 s, with a teacher's context 11 s (measured on one core of an EPYC);
                 loading twice and saving, 540 MB each, 4 s, a teacher 1 s; verdicts and files 1 s; the rest of both
                 programs 3 s

    sft, dft                     11 + 6 + 13 = 30 s       20 cells    10 minutes
    kd, target-sft               14 + 6 + 14 = 34 s       20 cells    11 minutes
    the same, answer in context  14 + 6 + 20 = 40 s       20 cells    13 minutes
    teachers that are trained    22 s                     5            2 minutes
    starts and ends of pieces    40 s                     5            3 minutes

Memory: below 10 GB. A cell's file is about 0.3 MB, a piece's in one archive about 1 MB.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

from real_model.problems import CHAINS, PAIRS, Sums

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
BUILD = ROOT / "build" / "real_model"
CPU, CUDA = DEVICES = ("cpu", "cuda")

BASE, SFT, DFT, KD, TARGET = ARMS = ("base", "sft", "dft", "kd", "target-sft")
KD_CONTEXT, TARGET_CONTEXT = ("kd-context", "target-sft-context")
CLEAN, NOISY = CONDITIONS = ("clean", "noisy")
# A teacher is the model itself: it reads the right answer in every row, also where the demonstration is wrong; or it was
# trained before on right demonstrations of other problems, and reads what the student reads.
READS, TRAINED = ("reads the answer", "trained")
CONTEXT = "{{ prompt }}\nWrite exactly this and nothing else: {{ solution }}"


@dataclass(frozen=True)
class Settings:
    """Of the small form, and what every form has.

    rows, noise: of the demonstrations. problems: of the test. held_out: of these, as clean demonstrations for nll.
    n: samples a problem at temperature 1, beside a greedy one, of up to max_new_tokens.
    """

    rows: int = 96
    noise: float = 0.25
    problems: int = 100
    held_out: int = 40
    n: int = 4
    max_new_tokens: int = 14
    eval_seed: int = 0
    context: str = CONTEXT

    # The small form has no choice of these, and so its results do not name them.
    sums: ClassVar[Sums] = PAIRS
    verifier: ClassVar[str] = "real_model.judge:result"
    teachers: ClassVar[dict[str, str]] = {KD: READS, TARGET: READS}
    device: ClassVar[str] = CPU
    answers_at_once: ClassVar[int] = 50

    def training(self) -> dict[str, Any]:
        """What is set otherwise than in train.yaml."""
        return {}


@dataclass(frozen=True)
class LargeSettings(Settings):
    """teacher_rows: of the teacher that is trained, all right. batch: rows a step. device: of training and answers."""

    rows: int = 8000
    noise: float = 0.15
    problems: int = 200
    held_out: int = 100
    n: int = 16
    max_new_tokens: int = 72
    sums: Sums = CHAINS
    teacher_rows: int = 8000
    batch: int = 32
    answers_at_once: int = 850
    device: str = CPU

    verifier: ClassVar[str] = "real_model.judge_worked:result"
    teachers: ClassVar[dict[str, str]] = {KD: TRAINED, TARGET: TRAINED, KD_CONTEXT: READS, TARGET_CONTEXT: READS}

    def training(self) -> dict[str, Any]:
        return {
            "per_device_train_batch_size": self.batch,
            "per_device_eval_batch_size": 100,
            "max_length": 256,
            "warmup_steps": 0.05,
            "logging_steps": min(10, -(-self.rows // self.batch)),
            "bf16": self.device == CUDA,
        }


class Cell(NamedTuple):
    """One training run and its test; seed 0 and clean for the untrained base, which is tested once."""

    seed: int
    condition: str
    arm: str

    @property
    def name(self) -> str:
        return BASE if self.arm == BASE else f"seed{self.seed}_{self.condition}_{self.arm}"

    @property
    def target(self) -> str:
        return self.arm.removesuffix("-context")


@dataclass(frozen=True)
class Form:
    """settings: of every cell. arms, seeds: what is run. results: a folder. compared: {first arm: others}."""

    settings: Settings
    arms: tuple[str, ...]
    seeds: tuple[int, ...]
    results: Path
    compared: dict[str, tuple[str, ...]]

    @property
    def trained(self) -> tuple[str, ...]:
        return tuple(arm for arm in self.arms if arm != BASE)

    def plan(self) -> list[Cell]:
        """In the order in which they run."""
        cells = [Cell(s, c, a) for s in self.seeds for c in CONDITIONS for a in self.trained]
        return [Cell(0, CLEAN, BASE), *cells]


SMALL = Form(
    Settings(),
    ARMS,
    (1, 2, 3),
    HERE.parent / "results" / "real_model",
    {BASE: ARMS[1:], SFT: (DFT, KD, TARGET), DFT: (TARGET,), KD: (TARGET,)},
)
SMALL_QUICK = Form(
    Settings(rows=16, problems=4, held_out=4, n=1), (BASE, SFT, TARGET), (1,), BUILD / "quick", {SFT: (TARGET,)}
)
LARGE = Form(
    LargeSettings(),
    (*ARMS, KD_CONTEXT, TARGET_CONTEXT),
    (1, 2, 3, 4, 5),
    HERE.parent / "results" / "real_model_large",
    {
        BASE: (SFT, DFT, KD, TARGET, KD_CONTEXT, TARGET_CONTEXT),
        SFT: (DFT, KD, TARGET, KD_CONTEXT, TARGET_CONTEXT),
        DFT: (TARGET, TARGET_CONTEXT),
        KD: (TARGET, KD_CONTEXT),
        TARGET: (TARGET_CONTEXT,),
        KD_CONTEXT: (TARGET_CONTEXT,),
    },
)
LARGE_QUICK = Form(
    LargeSettings(rows=16, problems=4, held_out=4, n=1, teacher_rows=16, batch=8),
    (BASE, TARGET, KD_CONTEXT),
    (1,),
    BUILD / "large-quick",
    {BASE: (TARGET, KD_CONTEXT)},
)
