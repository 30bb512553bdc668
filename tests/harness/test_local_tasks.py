"""The tasks of conf/tasks ask what lm-eval's own tasks ask: compared on the same questions in both shapes."""

from __future__ import annotations

import importlib.util
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset, DatasetDict
from lm_eval.api.task import ConfigurableTask
from lm_eval.tasks import TaskManager
from lm_eval.tasks._yaml_loader import load_yaml
from lm_eval.tasks.hellaswag.utils import preprocess
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from harness.local_tasks import FOLDER, hellaswag_query, read
from harness.tasks import run_tasks
from methods.network import Network

REAL = Path(__file__).parents[3] / "shared" / "data"
THEIRS = Path(next(iter(importlib.util.find_spec("lm_eval").submodule_search_locations))) / "tasks"  # type: ignore

PIQA = [
    {"goal": "dresser", "sol1": "a drawer ", "sol2": "a pin", "label": 1},
    {"goal": "How do I\u2028fold?", "sol1": "Once.", "sol2": "Twice,\n then once.", "label": 0},
    {"goal": "warm it", "sol1": "ice", "sol2": "fire", "label": 1},
    {"goal": "cool it", "sol1": "ice", "sol2": "fire", "label": 0},
]
ARC = [
    {"question": "What is hot?", "choices": {"text": ["ice", "fire", "a fog"], "label": ["A", "B", "C"]}, "key": "B"},
    {"question": "What is wet? ", "choices": {"text": ["rain", "sand"], "label": ["1", "2"]}, "key": "1"},
]
LAMBADA = ["The dog was  barking at the dog", "\"I saw a sign.\nA\u0085sign?\" It was two signs"]  # fmt: skip
WINOGRANDE = [
    {"sentence": "Ann met Eve, so _ was glad to see her.", "option1": "Ann", "option2": "Eve", "answer": "2"},
    {"sentence": "The box holds the ball as the _ is big.", "option1": "box", "option2": "ball", "answer": "1"},
]
HELLASWAG = [
    ("Clean and jerk", "A lady bends down. She grabs the pole.", "the lady", 3),
    ("Ice fishing", ".", "a man from Rome and his Dog", 0),
    ("Fencing", "Does he know? He is on a platform, fencing!", "two men", 1),
    ("Baking", "[header] How to bake [title] Take flour. [step] e.g. rye, or wheat. is fine.", "", 2),
]
ENDINGS = ["runs.", "gets [step] up [title] Stands", "lifts  it", "  sings."]


def hellaswag(label: str, first: str, second: str, answer: int) -> dict[str, Any]:
    return {"activity_label": label, "ctx_a": first, "ctx_b": second, "endings": ENDINGS, "label": str(answer)}


def plain(label: str, first: str, second: str, answer: int) -> dict[str, Any]:
    """As the file of plain text was made of the original."""
    ctx = preprocess(f"{label}: {first} {second}")
    return {"ind": answer, "ctx": ctx, "endings": [preprocess(ending) for ending in ENDINGS], "label": answer}


def arc(row: dict[str, Any]) -> dict[str, Any]:
    choices = row["choices"]
    return {
        "query": f"Question: {row['question']}",
        "choices": choices["text"],
        "gold": choices["label"].index(row["key"]),
    }


ARC_HUB = [{**row, "answerKey": row["key"]} for row in ARC]
TASKS: dict[str, tuple[str, str, list[Any], list[Any]]] = {
    "piqa_local": ("piqa/piqa", "piqa/valid", PIQA, [{**row, "label": None} for row in PIQA]),
    "arc_easy_local": ("arc/arc_easy", "arc/arc_easy", ARC_HUB, [arc(row) for row in ARC]),
    "arc_challenge_local": ("arc/arc_challenge", "arc/arc_challenge", ARC_HUB, [arc(row) for row in ARC]),
    "lambada_openai_local": (
        "lambada/lambada_openai",
        "lambada_openai/lambada_openai",
        [{"text": text} for text in LAMBADA],
        [dict(zip(("context", "continuation"), text.rsplit(" ", 1), strict=True)) for text in LAMBADA],
    ),
    "winogrande_local": ("winogrande/default", "winogrande/winogrande_dev", WINOGRANDE, WINOGRANDE),
    "hellaswag_local": (
        "hellaswag/hellaswag",
        "hellaswag/hellaswag_val",
        [hellaswag(*row) for row in HELLASWAG],
        [hellaswag(*row) for row in HELLASWAG],
    ),
    "hellaswag_2000_local": (
        "hellaswag/hellaswag",
        "hellaswag/hellaswag_val_2000",
        [hellaswag(*row) for row in HELLASWAG],
        [plain(*row) for row in HELLASWAG],
    ),
}
"""lm-eval's task file, our JSONL file, the hub's rows and the file's rows of the same questions."""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for _, file, _, rows in TASKS.values():
        path = tmp_path / f"{file}.jsonl"
        path.parent.mkdir(exist_ok=True)
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    (tmp_path / "piqa/valid-labels.lst").write_text("".join(f"{row['label']}\n" for row in PIQA))
    return tmp_path


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(Path(__file__).parents[2] / "harness/assets/tiny")


def ours(name: str, folder: Path) -> ConfigurableTask:
    manager = TaskManager(include_path=[FOLDER], include_defaults=False, metadata={"folder": str(folder)})
    return manager.load([name])["tasks"][name]


def theirs(file: str, rows: list[dict[str, Any]]) -> ConfigurableTask:
    """lm-eval's own task, with `rows` in place of the hub's."""
    config = load_yaml(THEIRS / f"{file}.yaml")
    for key in ("training_split", "validation_split", "test_split", "tag", "dataset_path", "dataset_name"):
        config.pop(key, None)
    rows = [{name: value for name, value in row.items() if name != "key"} for row in rows]
    dataset = DatasetDict({"test": Dataset.from_list(rows)})
    return ConfigurableTask(config=config | {"test_split": "test", "custom_dataset": lambda **_: dataset})


def requests(task: ConfigurableTask) -> list[Any]:
    """What a model is asked, and the right answer: for each request."""
    task.build_all_requests(rank=0, world_size=1)
    return [(one.request_type, one.args, task.doc_to_target(one.doc)) for one in task.instances]


def test_every_task_file_is_compared() -> None:
    assert set(TASKS) == {path.stem for path in FOLDER.glob("*.yaml")}


@pytest.mark.parametrize("name", TASKS)
def test_the_questions_are_those_of_lm_eval(name: str, folder: Path) -> None:
    file, _, rows, _ = TASKS[name]
    mine, original = ours(name, folder), theirs(file, rows)
    asked = requests(original)
    assert len(asked) >= len(rows)
    found = requests(mine)
    assert [(kind, args) for kind, args, _ in found] == [(kind, args) for kind, args, _ in asked]
    assert [str(target) for *_, target in found] == [str(target) for *_, target in asked]
    for option in ("output_type", "metric_list", "num_fewshot", "target_delimiter", "description"):
        assert getattr(mine.config, option) == getattr(original.config, option)


def test_the_numbers_come_with_standard_errors(
    folder: Path, small_llama: Callable[..., Network], tokenizer: PreTrainedTokenizerBase
) -> None:
    model: Any = small_llama(vocab_size=len(tokenizer), max_position_embeddings=256).model
    results = run_tasks(model, tokenizer, [*TASKS], limit=4, data=str(folder))
    assert set(results) == set(TASKS)
    for name, (_, _, rows, _) in TASKS.items():
        accuracy = results[name]["acc"]
        assert accuracy * len(rows) == pytest.approx(round(accuracy * len(rows)))
        assert results[name]["acc_stderr"] == pytest.approx(math.sqrt(accuracy * (1 - accuracy) / (len(rows) - 1)))
    assert results["lambada_openai_local"].keys() == {"acc", "acc_stderr", "perplexity", "perplexity_stderr"}


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("piqa_local", 1838),
        ("arc_easy_local", 2376),
        ("arc_challenge_local", 1172),
        ("lambada_openai_local", 5153),
        ("winogrande_local", 1267),
        ("hellaswag_2000_local", 2000),
    ],
)
def test_the_published_files_are_whole(name: str, count: int) -> None:
    if not REAL.exists():
        pytest.skip("needs the benchmarks' files in ../shared/data")
    task = ours(name, REAL)
    documents = list(task.test_docs())
    assert len(documents) == count  # of the published set
    first = documents[0]
    assert isinstance(task.doc_to_text(first), int if name == "winogrande_local" else str)
    assert isinstance(task.doc_to_target(first), str if task.OUTPUT_TYPE == "loglikelihood" or "wino" in name else int)


@pytest.mark.parametrize(
    ("ctx", "query"),
    [
        ("Skiing: A hill. He stops. the OLD man", "Skiing: A hill. He stops. The old man"),
        ("Skiing: A hill. he stops.", "Skiing: A hill. he stops."),
        ("Skiing: a hill of snow", "Skiing: a hill of snow"),
    ],
)
def test_the_last_sentence_begins_with_a_capital(ctx: str, query: str) -> None:
    assert hellaswag_query({"ctx": ctx}) == query


def remove(folder: Path) -> None:
    (folder / "piqa/valid.jsonl").unlink()


def take_another_file(folder: Path) -> None:
    (folder / "piqa/valid.jsonl").write_text('{"goal": "g", "sol1": "a", "sol2": "b"}\n{"query": "q"}\n')


def cut(folder: Path) -> None:
    (folder / "piqa/valid-labels.lst").write_text("0\n1\n")


def misspell(folder: Path) -> None:
    (folder / "piqa/valid-labels.lst").write_text("0\none\n")


@pytest.mark.parametrize(
    ("harm", "sentence"),
    [
        (remove, r"eval\.data=.* holds no piqa/valid\.jsonl; conf/tasks says where to get it"),
        (take_another_file, r"piqa/valid\.jsonl, line 2 is no JSON object with goal, sol1, sol2"),
        (cut, r"valid-labels\.lst has 2 lines and piqa/valid\.jsonl 4"),
        (misspell, r"valid-labels\.lst, line 2 is no"),
    ],
)
def test_a_wrong_folder_is_one_sentence(harm: Callable[[Path], None], sentence: str, folder: Path) -> None:
    harm(folder)
    with pytest.raises(ValueError, match=sentence):
        ours("piqa_local", folder)


def test_a_folder_must_be_named(small_llama: Callable[..., Network], tokenizer: PreTrainedTokenizerBase) -> None:
    model: Any = small_llama(vocab_size=len(tokenizer)).model
    with pytest.raises(ValueError, match=r"piqa/valid\.jsonl: name the folder that holds it with eval\.data=DIR"):
        run_tasks(model, tokenizer, ["piqa_local"])


def test_lines_end_where_json_lines_end(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"a": "x\u2028y"}\n\n', encoding="utf-8")
    assert read(file="a.jsonl", fields=["a"], folder=str(tmp_path))["test"]["a"] == ["x\u2028y"]
