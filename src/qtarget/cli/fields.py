"""The settings that most runs touch, for a --help that answers without importing TRL.

A test holds this table against ``QTargetConfig``, TRL's ``ModelConfig`` and ``ScriptArguments``.
"""

from __future__ import annotations

# (group, [(field, default, what it is)])
COMMON: list[tuple[str, list[tuple[str, object, str]]]] = [
    (
        "target",
        [
            (
                "target",
                None,
                "what to learn: a name, {preset: eaft, top_k: 20}, or my_pkg.my_module:my_target; unset: sft",
            ),
            ("targets", None, "in place of target: one for each data source, {math: target-sft, chat: sft}"),
            ("source_column", "source", "the dataset column that names a row's source, for targets"),
            ("eval_target", None, "the target evaluation reports; unset: target"),
            ("denominator", "all_labels", "what the summed loss is divided by: all_labels, kept, micro_batch"),
            ("loss_backend", "auto", "who computes the loss's passes over logits: auto, torch, triton, compiled"),
            ("teacher_model_name_or_path", None, "the teacher: a folder or hub id with the same tokenizer"),
            ("teacher_model_revision", None, "branch, tag or commit of the teacher"),
            ("teacher_model_init_kwargs", None, "keyword arguments for the teacher's from_pretrained"),
            ("teachers", None, "in place of one teacher: several in a log-linear pool, {org/a: 0.7, org/b: 0.3}"),
            ("teacher_cache", None, "a folder of qtarget cache build: the teacher is read from it and not loaded"),
            ("teacher_tail", "student", "shape of a cached teacher's mass outside its k tokens: student or even"),
            ("teacher_ema_decay", None, "the teacher is the average of the student's own weights; 0: as they are"),
            (
                "teacher_context",
                None,
                "what the teacher reads in place of the prompt: a template over the row's columns",
            ),
            ("teacher_end_token", "label", "where teacher and data end differently: label (alone), map or keep"),
            ("teacher_check_rows", 16, "rows on which student and teacher are compared before training; 0: none"),
            ("reference_model_name_or_path", None, "the reference; unset: the model as it starts, or adapters off"),
            ("reference_model_revision", None, "branch, tag or commit of the reference"),
            ("reference_model_init_kwargs", None, "keyword arguments for the reference's from_pretrained"),
            ("weights", "column", "iw-sft's weights: column, or online (the model against its reference)"),
            ("weights_temperature", 1.0, "the factor in the exponent of the online weights"),
            ("psft_refresh", 8, "steps between two copies of psft's old policy, or never (column old_logps)"),
            ("lens_every", None, "steps between two maps of (p_y, entropy) for the lens; unset: none"),
            ("loss_type", None, "TRL's name: nll is target sft, dft is target dft"),
        ],
    ),
    (
        "model",
        [
            ("model_name_or_path", None, "the model to train: a folder or hub id"),
            ("model_revision", "main", "branch, tag or commit of the model"),
            ("dtype", "float32", "precision of the weights"),
            ("attn_implementation", None, "such as flash_attention_2"),
            ("use_peft", False, "train LoRA adapters instead of all weights"),
            ("lora_r", 16, "rank of the adapters"),
            ("lora_alpha", 32, "scale of the adapters"),
            ("lora_dropout", 0.05, "dropout of the adapters"),
            ("lora_target_modules", None, "modules that get adapters"),
        ],
    ),
    (
        "data",
        [
            ("dataset_name", None, "a folder of json, csv or parquet files, one such file, or a hub id"),
            ("dataset_config", None, "configuration of the dataset"),
            ("dataset_train_split", "train", "rows to train on"),
            ("dataset_test_split", "test", "rows to evaluate before and after; a missing split is left out"),
            ("dataset_streaming", False, "read the dataset as it comes"),
            ("max_length", 1024, "longest sequence, in tokens; the rest is cut"),
            ("packing", False, "several rows in one sequence"),
            ("completion_only_loss", None, "train the completion only; unset: yes for prompt and completion rows"),
            ("assistant_only_loss", False, "train the assistant's turns only"),
            ("chat_template_path", None, "another chat template"),
        ],
    ),
    (
        "training",
        [
            ("output_dir", None, "where the model goes"),
            ("learning_rate", 2e-5, "peak learning rate"),
            ("lr_scheduler_type", "linear", "shape of the learning rate over time"),
            ("warmup_steps", 0, "steps to the peak; below 1: share of all steps"),
            ("num_train_epochs", 3.0, "passes over the data"),
            ("max_steps", -1, "optimiser steps; above 0 it wins over epochs"),
            ("per_device_train_batch_size", 8, "rows per device and forward pass"),
            ("gradient_accumulation_steps", 1, "forward passes per optimiser step"),
            ("max_grad_norm", 1.0, "gradient clipping; 0 turns it off"),
            ("weight_decay", 0.0, "AdamW's weight decay"),
            ("gradient_checkpointing", True, "recompute activations to save memory"),
            ("bf16", None, "bfloat16 autocast; unset: where the device has it"),
            ("seed", 42, "of the order of rows and of everything random"),
        ],
    ),
    (
        "watching and saving",
        [
            ("logging_steps", 10, "steps between two log lines"),
            ("eval_strategy", "no", "evaluate in between: no, steps, epoch"),
            ("eval_steps", None, "steps between two evaluations"),
            ("per_device_eval_batch_size", 8, "rows per device in evaluation"),
            ("save_strategy", "steps", "checkpoints: no, steps, epoch, best"),
            ("save_steps", 500, "steps between two checkpoints"),
            ("save_total_limit", None, "checkpoints kept"),
            ("resume_from_checkpoint", None, "a checkpoint folder, or true for the latest"),
            ("report_to", "none", "tracker: wandb, tensorboard, trackio, mlflow, ..."),
            ("run_name", None, "name of the run in the tracker"),
            ("push_to_hub", False, "upload the model"),
        ],
    ),
]


def names() -> list[str]:
    """Fields of the table, in order."""
    return [name for _, rows in COMMON for name, _, _ in rows]
