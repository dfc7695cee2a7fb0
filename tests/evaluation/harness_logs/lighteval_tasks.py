"""The two tasks for lighteval."""

from lighteval.metrics.metrics import Metrics
from lighteval.tasks.lighteval_task import LightevalTaskConfig
from lighteval.tasks.requests import Doc


def sums(line: dict, task_name: str) -> Doc:
    return Doc(task_name=task_name, query=f"What is {line['question']}?", choices=[line["answer"]], gold_index=0)


def birds(line: dict, task_name: str) -> Doc:
    return Doc(task_name=task_name, query=line["question"], choices=line["choices"], gold_index=line["answer"])


def task(name: str, prompt, metrics: list, **more) -> LightevalTaskConfig:
    return LightevalTaskConfig(
        name=name,
        prompt_function=prompt,
        hf_repo=f"tasks/{name}",
        hf_subset="default",
        hf_avail_splits=["test"],
        evaluation_splits=["test"],
        metrics=metrics,
        **more,
    )


TASKS_TABLE = [
    task("sums", sums, [Metrics.exact_match], generation_size=12, stop_sequence=["\n"]),
    task("birds", birds, [Metrics.loglikelihood_acc]),
]
