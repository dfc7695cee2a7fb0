"""What to learn: names, parameters, compositions, schedules, a user's own code."""

from __future__ import annotations

import sys
from typing import Any

from bench import Bench, Case, setting


def target(id: str, wrong: str, value: Any, *says: str) -> Case:
    return Case(id, wrong, lambda bench: bench.train(target=value), says)


def module(id: str, wrong: str, code: str, value: str, *says: str, part: str | None = None) -> Case:
    """A target, or a part of one, in a module of the user's own."""

    def do(bench: Bench) -> list[object]:
        name = f"own_{id.replace('-', '_')}"
        bench.file(f"{name}.py", code)
        sys.dont_write_bytecode = True
        path = value.replace("MODULE", name)
        return bench.train(target=path if part is None else {part: path})

    return Case(id, wrong, do, says)


def rule(id: str, wrong: str, code: str, *says: str) -> Case:
    """A trust function that fails when it is given statistics."""
    return module(
        id, wrong, f"import torch\n\ndef mine(stats):\n    return {code}\n", "MODULE:mine", *says, part="trust"
    )


CASES = [
    target("a-typo", "a name that is nearly right", "target-stf", "target is 'target-stf'; did you mean 'target-sft'?"),
    target("a-number", "a number", 3, "target is 3; use a name such as 'dft'"),
    target("an-empty-mapping", "nothing in it", {}, "target is {}; give preset: NAME"),
    target("a-list-of-targets", "a list", ["dft"], "target is ['dft']; use a name such as 'dft'"),
    target(
        "an-unknown-parameter",
        "a typo in a parameter",
        {"preset": "eaft", "topk": 3},
        "parameter of eaft is 'topk'; did you mean 'top_k'",
    ),
    target(
        "a-preset-and-a-trust",
        "two ways at once",
        {"preset": "dft", "trust": 1},
        "names the preset 'dft' and also trust; use one or the other",
    ),
    target("eta-out-of-range", "eta 1.5", {"preset": "target-sft", "eta": 1.5}, "eta is 1.5; use a number from 0 to 1"),
    target("eta-that-is-nan", "NaN", {"preset": "target-sft", "eta": float("nan")}, "eta is nan; use a number"),
    target("eta-in-words", "a word", {"preset": "target-sft", "eta": "half"}, "eta is 'half'; use a number"),
    target("eta-true", "a boolean", {"preset": "target-sft", "eta": True}, "eta is True; use a number"),
    target("eta-in-a-list", "a list", {"preset": "target-sft", "eta": [0.5]}, "eta is [0.5]; use a number"),
    target(
        "no-temperature", "temperature 0", {"preset": "kd", "temperature": 0}, "temperature is 0; use a number above 0"
    ),
    target(
        "an-infinite-temperature",
        "temperature infinity",
        {"preset": "kd", "temperature": float("inf")},
        "temperature is inf; use a finite number",
    ),
    target(
        "an-infinite-weight",
        "kl_weight infinity",
        {"preset": "asft", "kl_weight": float("inf")},
        "kl_weight is inf; use a finite number",
    ),
    target(
        "a-negative-weight", "kl_weight -1", {"preset": "asft", "kl_weight": -1}, "kl_weight is -1; use a number from 0"
    ),
    target(
        "smoothing-of-two",
        "more than all",
        {"preset": "label-smoothing", "smoothing": 2},
        "smoothing is 2; use a number from 0 to 1",
    ),
    target("no-top-k", "the 0 likeliest", {"preset": "eaft", "top_k": 0}, "top_k is 0; use"),
    target("half-a-top-k", "the 2.5 likeliest", {"preset": "eaft", "top_k": 2.5}, "top_k is 2.5; use a whole number"),
    target(
        "an-unknown-direction", "sideways", {"preset": "profit", "direction": "sideways"}, "direction is 'sideways'"
    ),
    target("beta-zero", "beta 0", {"preset": "gem", "beta": 0}, "beta is 0; use a number above 0"),
    target("alpha-negative", "a legal alpha below 0: trains", {"preset": "beyond-log", "alpha": -1}),
    target("clip-negative", "a clip below 0", {"preset": "psft", "clip": -0.1}, "clip is -0.1; use a number"),
    target("a-share-of-two", "share 2", {"preset": "dft", "share": 2}, "share is 2; use a number from 0 to 1"),
    target("an-unknown-trust", "no such rule", {"trust": "entropi"}, "trust is 'entropi'; did you mean 'entropy'?"),
    target(
        "an-unknown-residual",
        "no such pool",
        {"trust": 0.5, "residual": "techer"},
        "residual is 'techer'; did you mean 'teacher'?",
    ),
    target(
        "an-unknown-part",
        "no such key",
        {"trust": 0.5, "residuals": "teacher"},
        "key of target is 'residuals'; did you mean 'residual'?",
    ),
    target(
        "two-trusts",
        "two names in one mapping",
        {"trust": {"entropy": {}, "probability": {}}},
        "trust is",
        "write one name with its parameters",
    ),
    target("residuals-of-numbers", "numbers for pools", {"trust": 0.5, "residual": [1, 2]}, "residual"),
    target(
        "residual-weight-in-words",
        "a word for a weight",
        {"trust": 0.5, "residual": [{"uniform": {}, "weight": "much"}]},
        "weight of a residual is 'much'; use a number",
    ),
    target(
        "parameters-in-words",
        "text for parameters",
        {"trust": {"entropy": "twenty"}},
        "trust.entropy is 'twenty'; write its parameters as name: value",
    ),
    target(
        "a-schedule-without-an-end",
        "no to",
        {"preset": "target-sft", "eta": {"schedule": "linear", "from": 0}},
        "the schedule of eta has no to",
    ),
    target(
        "an-unknown-schedule",
        "no such shape",
        {"preset": "target-sft", "eta": {"schedule": "sine", "from": 0, "to": 1}},
        "schedule of eta is 'sine'",
    ),
    target(
        "a-schedule-out-of-range",
        "it ends at 2",
        {"preset": "target-sft", "eta": {"schedule": "linear", "from": 0, "to": 2}},
        "on the schedule eta 0 → 2",
        "eta is 2.0; use a number from 0 to 1",
    ),
    target(
        "an-infinite-schedule",
        "it ends at infinity",
        {"preset": "kd", "temperature": {"schedule": "linear", "from": 1, "to": float("inf")}},
        "temperature",
        "finite",
    ),
    target(
        "no-warm-up",
        "0 steps",
        {"preset": "dft", "warmup_from_sft": 0},
        "warmup_from_sft is 0; use the number of steps",
    ),
    target(
        "a-module-that-is-not-there",
        "no such module",
        "nowhere.at_all:mine",
        "target is 'nowhere.at_all:mine', but importing nowhere.at_all failed",
    ),
    target("no-module", "nothing before the colon", ":mine", "target is ':mine'", "my_pkg.my_module:name"),
    target("no-name", "nothing after the colon", "math:", "target is {'math': None}; give preset: NAME"),
    target("a-relative-module", "a dot in front", ".mine:target", "target is '.mine:target'", "my_pkg.my_module:name"),
    target(
        "a-name-that-is-not-there", "no such name", "math:target", "target is 'math:target', but math has no 'target'"
    ),
    target(
        "not-a-target",
        "a number for a target",
        "math:pi",
        "target is 'math:pi', which is neither a Target nor a function",
    ),
    target("not-returning-a-target", "a function of something else", "math:floor", "math:floor"),
    module("a-module-that-does-not-parse", "a syntax error", "def (:\n", "MODULE:mine", "failed: SyntaxError"),
    module(
        "a-module-that-raises",
        "an error on import",
        "raise RuntimeError('no licence')\n",
        "MODULE:mine",
        "failed: RuntimeError: no licence",
    ),
    module(
        "a-module-that-exits", "sys.exit on import", "import sys\nsys.exit(7)\n", "MODULE:mine", "failed: SystemExit: 7"
    ),
    module(
        "a-module-that-imports-nothing-there",
        "it imports a module that is not there",
        "import nowhere_at_all\n",
        "MODULE:mine",
        "failed: No module named 'nowhere_at_all'; fix that",
    ),
    module("a-name-nearly-right", "a typo in the name", "mine = 1\n", "MODULE:mime", "no 'mime'; did you mean 'mine'?"),
    Case(
        "named-as-an-installed-module",
        "a file beside the config that an installed module comes before",
        lambda bench: (bench.file("statistics.py", "mine = 1\n"), bench.train(target="statistics:mine"))[1],
        ("statistics is an installed module, which comes before", "statistics.py; rename that file"),
    ),
    target("a-file-for-a-module", "a file's name", "mine.py:target", "is named without folder and .py"),
    target("a-folder-for-a-module", "a path", "./mine:target", "is named without folder and .py"),
    Case(
        "shown-but-not-there",
        "targets show of no module",
        lambda bench: ["targets", "show", "nowhere:mine"],
        ("importing nowhere failed: No module named 'nowhere' among installed packages or in ",),
    ),
    module(
        "a-function-that-raises",
        "an error in the function",
        "def mine():\n    return 1 / 0\n",
        "MODULE:mine",
        "ZeroDivisionError: division by zero",
    ),
    rule("a-rule-with-a-typo", "a name that is not there", "stats.log_p_y.exq()", "no attribute 'exq'"),
    rule("a-rule-of-no-name", "a name nobody defined", "gamma", "failed with NameError: name 'gamma' is not defined"),
    rule(
        "a-rule-that-declares-nothing",
        "a statistic that is not declared",
        "stats.entropy",
        "add 'entropy' to the rule's needs",
    ),
    rule(
        "a-rule-of-one-number", "a number for all tokens", "0.5", "the trust rule gave 0.5; return one number per token"
    ),
    rule("a-rule-of-another-length", "a tensor of another shape", "torch.ones(7)", "gave a tensor of shape [7]"),
    rule(
        "a-rule-that-asks-one-token", "item() of several", "stats.log_p_y.item()", "tried on two tokens", "RuntimeError"
    ),
    module(
        "a-scale-of-no-name",
        "a scale that fails",
        "def mine(stats):\n    return gamma\n",
        "MODULE:mine",
        "NameError: name 'gamma' is not defined; fix its rule",
        part="scale",
    ),
    setting("targets-in-words", "text", "targets", target=None, targets="dft"),
    setting("no-targets", "an empty mapping", "targets is {}; write a target for each source", target=None, targets={}),
    setting(
        "target-and-targets",
        "both",
        "the settings name targets and also target; keep one of them",
        targets={"a": "dft"},
    ),
    setting(
        "a-faulty-target-of-many",
        "one is wrong",
        "targets.b: target is 'dftt'",
        target=None,
        targets={"a": "dft", "b": "dftt"},
    ),
    setting(
        "two-spellings",
        "a target and a peer's key",
        ("target is 'sft', but use_eaft", "keep one of them"),
        use_eaft=True,
    ),
    target(
        "a-typo-beside-a-peer-s-key",
        "a key that no reader of mode knows",
        {"mode": "asft", "kl_weights": 0.5},
        "key next to mode is 'kl_weights'; did you mean 'kl_weight'?",
    ),
    setting(
        "a-typo-of-a-peer-s-key",
        "the same at the top of the config",
        "'kl_weights'; did you mean kl_weight?",
        target=None,
        mode="asft",
        kl_weights=0.5,
    ),
    setting(
        "beta-alone",
        "distillation's number beside a target that says nothing of it",
        "beta is 0.5 without lmbda: 0, which makes it TRL's GKD on a fixed dataset; add it, or write a preset's own",
        beta=0.5,
    ),
    setting("a-contradiction", "two names of an objective", "the settings contradict each other", loss_type="dft"),
    setting(
        "an-unknown-loss-type",
        "no such loss",
        "loss_type is 'nlll'; did you mean 'nll'?",
        target=None,
        loss_type="nlll",
    ),
    setting(
        "smoothing-in-trl-s-name",
        "a share of 3",
        "smoothing is 3.0; use a number from 0 to 1",
        target=None,
        label_smoothing_factor=3.0,
    ),
    setting("psft-that-is-sft", "a policy that is never old", "psft_refresh is 1", target="psft", psft_refresh=1),
    setting(
        "psft-refreshed-sometimes",
        "a word",
        "psft_refresh is 'sometimes'; use a number",
        target="psft",
        psft_refresh="sometimes",
    ),
]
