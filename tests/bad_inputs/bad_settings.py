"""Numbers and words of a training config."""

from __future__ import annotations

from bench import setting

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
    setting("an-unknown-packing", "no such strategy", "packing strategy", packing=True, packing_strategy="tight"),
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
    setting("no-deepspeed-file", "a file that is not there", "deepspeed", deepspeed="nowhere.json"),
]
