"""Tasks of lm-eval (Gao et al., EleutherAI/lm-evaluation-harness) on a model in memory.

`pydocs_next` needs no download: which of four passages of the embedded corpus comes next? `piqa_local` and the other
tasks of `conf/tasks` read JSONL files of one's own.
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness import corpus, local_tasks

if TYPE_CHECKING:
    from datasets import DatasetDict
    from lm_eval.tasks import TaskManager
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Results = dict[str, dict[str, float]]
"""Task to metric to value. The standard error of `acc` is called `acc_stderr`."""


def run_tasks(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[str],
    limit: int | None = None,
    include_path: str | None = None,
    data: str | None = None,
    batch: int = 8,
) -> Results:
    """Evaluate tasks, few-shot examples and prompts as their files say.

    Args:
        tasks: names of tasks or groups: of `include_path`, of `conf/tasks`, of lm-eval, or `pydocs_next`.
        limit: documents a task; all by default.
        include_path: a folder with task files; they take precedence over all others.
        data: the folder with the JSONL files that the tasks of `conf/tasks` read.
        batch: sequences a forward pass.

    Raises:
        ValueError: a task is unknown, its data are neither cached nor reachable, or `data` lacks its file.
    """
    os.environ.setdefault("DISABLE_MULTIPROC", "1")  # lm-eval would fork this process to bootstrap a perplexity
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    manager = _task_manager([name for name in tasks if name not in EMBEDDED], include_path, data)
    specs = [EMBEDDED[name]() if name in EMBEDDED else name for name in tasks]
    try:
        outcome = simple_evaluate(
            model=HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch),
            tasks=specs,
            task_manager=manager,
            limit=limit,
            bootstrap_iters=1000,
            log_samples=False,
            random_seed=None,  # global generators stay as they are
            numpy_random_seed=None,
            torch_random_seed=None,
        )
    except OSError as error:
        raise ValueError(
            f"the data of eval.tasks={','.join(tasks)} are neither cached nor reachable ({error}); take the embedded "
            "pydocs_next, or name a folder of your own with eval.include_path"
        ) from error
    return {task: _numbers(metrics) for task, metrics in outcome["results"].items()}


def _task_manager(tasks: Sequence[str], include_path: str | None, data: str | None) -> TaskManager:
    from lm_eval.tasks import TaskManager

    folders: list[str | Path] = [local_tasks.FOLDER, *([include_path] if include_path else [])]  # the last one wins
    metadata = {"folder": data} if data else None  # which lm-eval passes to `local_tasks.read`
    manager = TaskManager(include_path=folders, include_defaults=False, metadata=metadata)
    if set(tasks) <= set(manager.all_tasks):
        return manager  # lm-eval has 14 000 task files: reading them takes many seconds
    manager = TaskManager(include_path=folders, metadata=metadata)
    for name in tasks:
        if name not in manager.all_tasks:
            near = get_close_matches(name, [*manager.all_tasks, *EMBEDDED], n=3)
            hint = f"did you mean {' or '.join(near)}?" if near else "`lm-eval ls tasks` lists them."
            raise ValueError(f"unknown task {name!r} in eval.tasks: {hint}")
    return manager


def _numbers(metrics: dict[str, Any]) -> dict[str, float]:
    """Without the name of lm-eval's default filter, which is part of every key, and without what is not a number."""
    return {
        key.removesuffix(",none"): float(value)
        for key, value in metrics.items()
        if "," in key and isinstance(value, int | float)
    }


def pydocs_next_questions(count: int = 200, context: int = 240, passage: int = 80) -> list[dict[str, Any]]:
    """Questions from the corpus' test documents, the same for every model.

    Each has a `context` of so many characters, which ends with a line; four `choices` of `passage` characters that
    begin a line, three of them from other documents; and the `label` of the one that follows.
    """
    rng = random.Random(0)
    documents = [d.text for d in corpus.core_documents("test") if len(d.text) > 2 * (context + passage)]

    def line_start(text: str) -> int:
        """Where a random line begins, with room before and after it."""
        while True:
            start = text.find("\n", rng.randrange(context, len(text) - passage)) + 1
            if 0 < start <= len(text) - passage and text[start : start + passage].strip():
                return start

    questions = []
    for _ in range(count):
        right, *others = rng.sample(range(len(documents)), 4)
        text, start = documents[right], line_start(documents[right])
        choices = [text[start : start + passage]]
        for other in others:
            begin = line_start(documents[other])
            choices.append(documents[other][begin : begin + passage])
        order = rng.sample(range(4), 4)
        questions.append(
            {
                "context": text[start - context : start],
                "choices": [choices[i] for i in order],
                "label": order.index(0),
            }
        )
    return questions


def _pydocs_next() -> dict[str, Any]:
    """The task as lm-eval configures one."""

    def dataset(**_: object) -> DatasetDict:
        from datasets import Dataset, DatasetDict

        return DatasetDict({"test": Dataset.from_list(pydocs_next_questions())})

    return {
        "task": "pydocs_next",
        "custom_dataset": dataset,
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "context",
        "doc_to_choice": "choices",
        "doc_to_target": "label",
        "target_delimiter": "",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    }


EMBEDDED: dict[str, Callable[[], dict[str, Any]]] = {"pydocs_next": _pydocs_next}
