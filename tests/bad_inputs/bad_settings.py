"""Numbers and words of a training config."""

from __future__ import annotations

from typing import Any

from bench import Bench, Case, setting


def renamed(old: str, says: str, value: Any = "x") -> Case:
    """A name of another version or program."""
    return setting(f"renamed-{old}", "a name of another version", f"{old!r}; it is {says}", **{old: value})


def in_use(id: str, wrong: str, world: str, *says: str, **settings: Any) -> Case:
    """The world's folder for an output_dir, with somebody's notes in it."""

    def do(bench: Bench) -> list[object]:
        bench.copy(world).rename(bench.folder / "run")
        bench.file("run/notes.txt", "years of work")
        return bench.train(**settings)

    return Case(id, wrong, do, says)


REFERENCE = "reference_model_name_or_path"
LORA: dict[str, Any] = {"use_peft": True, "lora_target_modules": ["q_proj"]}
EVALUATED = {"dataset_test_split": "test", "eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps"}

CASES = [
    # numbers
    setting("a-rate-in-words", "a word", "learning_rate is 'fast'; use a number", learning_rate="fast"),
    setting("a-rate-that-is-nan", "NaN", "learning_rate is nan; use a number", learning_rate=float("nan")),
    setting("an-infinite-rate", "infinity", "learning_rate is inf; use a finite number", learning_rate=float("inf")),
    setting("a-negative-rate", "below zero", "learning_rate is -0.001; use a number from 0", learning_rate=-1e-3),
    setting("infinite-steps", "infinity steps", "max_steps is inf; use a whole number", max_steps=float("inf")),
    setting("nan-steps", "NaN steps", "max_steps is nan; use a whole number", max_steps=float("nan")),
    setting("half-a-step", "1.5 steps", "max_steps is 1.5; use a whole number", max_steps=1.5),
    setting(
        "no-rows-in-a-batch",
        "batch of 0",
        "per_device_train_batch_size is 0; use a whole number from 1",
        per_device_train_batch_size=0,
    ),
    setting(
        "a-negative-batch",
        "batch of -2",
        "per_device_train_batch_size is -2; use a whole number from 1",
        per_device_train_batch_size=-2,
    ),
    setting(
        "no-accumulation",
        "0 accumulations",
        "gradient_accumulation_steps is 0; use a whole number from 1",
        gradient_accumulation_steps=0,
    ),
    setting("no-length", "length 0", "max_length is 0; use a whole number from 2", max_length=0),
    setting(
        "a-length-of-one",
        "one token has nothing to predict",
        "max_length is 1; use a whole number from 2",
        max_length=1,
    ),
    setting("a-negative-length", "length -5", "max_length is -5; use a whole number from 2", max_length=-5),
    setting("a-negative-norm", "clipping at -1", "max_grad_norm is -1.0; use a number from 0", max_grad_norm=-1),
    setting("a-nan-norm", "clipping at NaN", "max_grad_norm is nan; use a number", max_grad_norm=float("nan")),
    setting("a-nan-decay", "weight decay NaN", "weight_decay is nan; use a number", weight_decay=float("nan")),
    setting(
        "nan-epochs", "NaN epochs", "num_train_epochs is nan; use a number", num_train_epochs=float("nan"), max_steps=-1
    ),
    setting(
        "no-epochs",
        "no epoch and no step",
        "num_train_epochs is 0.0; use a number above 0",
        num_train_epochs=0,
        max_steps=-1,
    ),
    setting("a-negative-warmup", "warm-up of -3", "warmup_steps", warmup_steps=-3),
    setting("a-negative-seed", "seed -1", "seed is -1; use a whole number from 0 to 4294967295", seed=-1),
    setting("a-large-seed", "seed 2^40", "seed is 1099511627776; use a whole number from 0 to 4294967295", seed=2**40),
    setting("log-every-zero", "logging every 0 steps", "logging_steps", logging_steps=0),
    setting("save-every-zero", "saving every 0 steps", "save_steps", save_steps=0, save_strategy="steps"),
    setting(
        "maps-every-zero",
        "a map every 0 steps",
        "lens_every is 0; use a whole number from 1",
        lens_every=0,
    ),
    # words
    setting("an-unknown-scheduler", "no such shape", "lr_scheduler_type", lr_scheduler_type="linea"),
    setting("an-unknown-optimiser", "no such optimiser", "optim", optim="adamq"),
    setting("an-unknown-tracker", "no such tracker", "report_to", report_to="wandbb"),
    setting("an-unknown-eval-strategy", "no such strategy", "eval_strategy", eval_strategy="often"),
    setting("an-unknown-denominator", "no such denominator", "denominator is 'tokens'", denominator="tokens"),
    setting("an-unknown-dtype", "no such precision", "dtype", dtype="float31"),
    setting(
        "an-unknown-packing", "no such strategy", "packing_strategy is 'tight'", packing=True, packing_strategy="tight"
    ),
    setting("an-unknown-truncation", "no such mode", "truncation_mode is 'keep_middle'", truncation_mode="keep_middle"),
    setting("maybe", "neither true nor false", "packing is 'maybe'; use true or false", packing="maybe"),
    setting(
        "a-list-for-a-word",
        "a list for a folder",
        "model_name_or_path is ['a', 'b']; use text",
        model_name_or_path=["a", "b"],
    ),
    setting(
        "a-mapping-for-a-word", "a mapping for a dataset", "dataset_name is {'a': 1}; use text", dataset_name={"a": 1}
    ),
    setting(
        "kwargs-in-words",
        "text for a mapping",
        "teacher_model_init_kwargs is 'float16'; write",
        teacher_model_init_kwargs="float16",
    ),
    # names
    renamed("torch_dtype", "dtype", "float32"),
    renamed("max_seq_length", "max_length", 64),
    renamed("evaluation_strategy", "eval_strategy", "no"),
    renamed("no_cuda", "use_cpu", True),
    renamed("tokenizer", "read from the folder of model_name_or_path"),
    renamed("warmup_ratio", "warmup_steps, where a number below 1 is a share of all steps", 0.1),
    renamed("per_gpu_train_batch_size", "per_device_train_batch_size", 2),
    # packages
    setting(
        "an-optimiser-without-its-package",
        "bitsandbytes is not installed",
        ("optim is 'paged_adamw_8bit', whose package is not installed", "pip install -U bitsandbytes"),
        optim="paged_adamw_8bit",
    ),
    setting(
        "kernels-without-their-package",
        "liger-kernel is not installed",
        "use_liger_kernel is true, but its package is not installed; pip install liger-kernel",
        use_liger_kernel=True,
    ),
    setting(
        "a-tracker-without-its-package",
        "tensorboard is not installed",
        "report_to is 'tensorboard', whose package is not installed; pip install tensorboard",
        report_to="tensorboard",
    ),
    setting(
        "an-attention-without-its-package",
        "flash-attn is not installed",
        "attn_implementation is 'flash_attention_2', whose package is not installed; pip install flash-attn",
        attn_implementation="flash_attention_2",
    ),
    # what would show late in a run
    setting(
        "a-schedule-without-its-numbers",
        "no lowest rate",
        "lr_scheduler_type is 'cosine_with_min_lr' with lr_scheduler_kwargs None",
        lr_scheduler_type="cosine_with_min_lr",
    ),
    setting(
        "a-metric-that-will-not-exist",
        "a typo in the metric",
        "metric_for_best_model is 'acuracy'; did you mean 'accuracy'?",
        metric_for_best_model="acuracy",
        load_best_model_at_end=True,
        save_steps=1,
        **EVALUATED,
    ),
    setting(
        "a-metric-that-exists",
        "nothing: a statistic of the target",
        (),
        metric_for_best_model="eval_kl_q",
        load_best_model_at_end=True,
        save_steps=1,
        **EVALUATED,
    ),
    setting(
        "the-best-of-none",
        "nothing is evaluated",
        "load_best_model_at_end is true, but nothing is evaluated",
        load_best_model_at_end=True,
    ),
    setting(
        "evaluation-of-nothing",
        "no evaluation data",
        "eval_strategy is 'steps', but there is no evaluation data",
        eval_strategy="steps",
        eval_steps=1,
    ),
    setting(
        "a-hub-that-says-no",
        "an upload to nobody's account",
        "push_to_hub is True, but the hub refuses it",
        push_to_hub=True,
        hub_model_id="nobody/nothing",
    ),
    # settings that others, or the machine, rule out
    setting("an-unknown-level", "no such level", "log_level is 'loud'", log_level="loud"),
    setting(
        "an-unknown-sampler",
        "no such order",
        "train_sampling_strategy is 'by_heart'",
        train_sampling_strategy="by_heart",
    ),
    setting(
        "workers-that-stay-without-workers",
        "no workers",
        "dataloader_persistent_workers is true without workers",
        dataloader_persistent_workers=True,
    ),
    setting(
        "an-unknown-start",
        "no such way to start",
        "dataloader_multiprocessing_context is 'thread'",
        dataloader_multiprocessing_context="thread",
        dataloader_num_workers=1,
    ),
    setting(
        "offloading-from-nowhere",
        "activations offloaded from a CPU",
        "activation_offloading is true, but there is no accelerator",
        activation_offloading=True,
    ),
    setting(
        "unknown-kwargs-of-checkpointing",
        "no such argument",
        "gradient_checkpointing_kwargs' key is 'reentrant'; did you mean 'use_reentrant'?",
        gradient_checkpointing=True,
        gradient_checkpointing_kwargs={"reentrant": False},
    ),
    setting(
        "negative-noise", "noise below zero", "neftune_noise_alpha is -1.0; use a number from 0", neftune_noise_alpha=-1
    ),
    setting("padding-to-a-number", "nothing: a number beside a word", (), pad_to_multiple_of=8),
    setting(
        "padding-to-nothing",
        "multiples of 0",
        "pad_to_multiple_of is 0; use a whole number from 1",
        pad_to_multiple_of=0,
    ),
    setting(
        "an-unknown-backend", "no such compiler", "torch_compile_backend is 'quick'", torch_compile_backend="quick"
    ),
    setting(
        "the-old-name-of-a-dtype", "it is taken for dtype", "float31", model_init_kwargs={"torch_dtype": "float31"}
    ),
    # adapters
    setting(
        "no-alpha", "a scale of 0 trains nothing", "lora_alpha is 0; use a number above 0", use_peft=True, lora_alpha=0
    ),
    setting(
        "all-dropped", "dropout of 2", "lora_dropout is 2.0; use a number from 0 below 1", use_peft=True, lora_dropout=2
    ),
    setting(
        "a-module-to-save-that-is-not-there",
        "PEFT passes it over",
        "modules_to_save holds 'nowhere', which the model does not have",
        use_peft=True,
        lora_modules_to_save=["nowhere"],
    ),
    setting("a-module-to-save", "the head", (), use_peft=True, lora_modules_to_save=["lm_head"]),
    setting("one-target-module", "one module in a list: PEFT would take it for a pattern", (), **LORA),
    setting("a-target-module-in-words", "one module as text", (), **LORA | {"lora_target_modules": "q_proj"}),
    # nothing where a name stands
    setting(
        "an-empty-teacher",
        "an empty text",
        "target kd(temperature=1.0) needs a teacher and got none",
        target="kd",
        teacher_model_name_or_path="",
    ),
    setting(
        "an-empty-cache", "an empty text", "needs a teacher and got none", target="kd", teacher_cache=" ", teacher=""
    ),
    setting("an-empty-model", "an empty text", "model_name_or_path is not set", model_name_or_path=""),
    setting("an-empty-reference", "an empty text: the model as it starts", (), target="asft", **{REFERENCE: ""}),
    # another run's folder
    in_use("in-use", "another run's folder", "stopped", "start from scratch with --overwrite_output_dir"),
    in_use(
        "overwriting-a-model",
        "a folder that no run wrote",
        "model",
        "holds model.safetensors and nothing that a run wrote",
        overwrite_output_dir=True,
    ),
    in_use(
        "overwriting-what-is-resumed",
        "both at once",
        "stopped",
        "overwrite_output_dir and resume_from_checkpoint are both set",
        overwrite_output_dir=True,
        resume_from_checkpoint="true",
        target="psft",
    ),
    setting("no-deepspeed-file", "a file that is not there", "deepspeed", deepspeed="nowhere.json"),
]
