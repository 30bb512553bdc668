"""lm-eval on a model in memory, against log-probabilities computed directly."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer, LlamaForCausalLM

from harness import corpus
from harness.tasks import pydocs_next_questions, run_tasks

STORIES = Path(__file__).parents[3] / "shared" / "models" / "stories260K"
QUESTIONS = [
    ("Once upon a time, there was a little", "girl named Lily", "therefore of seven"),
    ("Lily was very happy and said, \"Thank", "you, mom!\"", "house big ran"),
    ("Tom went to the park to", "purple is dark", "play with his friends"),
    ("The dog was very", "said went to the", "happy"),
    ("One day, a cat saw a big", "tree", "jumped of and was"),
]  # fmt: skip

YAML = """
task: local_stories
dataset_path: json
dataset_kwargs:
  data_files: {{test: {path}/stories.jsonl}}
  cache_dir: {path}/cache
test_split: test
output_type: multiple_choice
doc_to_text: context
doc_to_choice: choices
doc_to_target: label
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
"""


@pytest.fixture(scope="module")
def stories() -> tuple[LlamaForCausalLM, Any]:
    if not STORIES.exists():
        pytest.skip("needs the checkpoint ../shared/models/stories260K")
    return LlamaForCausalLM.from_pretrained(STORIES, dtype=torch.float32).eval(), AutoTokenizer.from_pretrained(STORIES)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    # The first choice is always "right", though for two questions it is the less likely one: accuracy is not 0 or 1.
    rows = [{"context": c, "choices": choices, "label": 0} for c, *choices in QUESTIONS]
    (tmp_path / "stories.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "local_stories.yaml").write_text(YAML.format(path=tmp_path))
    return tmp_path


@torch.no_grad()
def log_likelihood(model: LlamaForCausalLM, tokenizer: Any, context: str, choice: str) -> float:
    prefix, whole = (tokenizer(text)["input_ids"] for text in (context, f"{context} {choice}"))
    log_p = model(input_ids=torch.tensor([whole])).logits[0].log_softmax(-1)
    return sum(log_p[i - 1, whole[i]].item() for i in range(len(prefix), len(whole)))


def test_a_local_task_scores_as_log_likelihoods_say(stories: tuple[LlamaForCausalLM, Any], folder: Path) -> None:
    model, tokenizer = stories
    right = [
        log_likelihood(model, tokenizer, c, first) > log_likelihood(model, tokenizer, c, second)
        for c, first, second in QUESTIONS
    ]
    state = torch.get_rng_state()
    results = run_tasks(model, tokenizer, ["local_stories"], include_path=str(folder), batch=2)
    assert 0 < sum(right) < len(right)
    assert set(results) == {"local_stories"}
    assert results["local_stories"]["acc"] == pytest.approx(sum(right) / len(right))
    assert results["local_stories"]["acc_stderr"] == pytest.approx(
        torch.tensor(right).float().std() / len(right) ** 0.5
    )
    assert torch.equal(torch.get_rng_state(), state)


def test_the_embedded_task_runs_offline(stories: tuple[LlamaForCausalLM, Any]) -> None:
    results = run_tasks(*stories, ["pydocs_next"], limit=4)
    assert results["pydocs_next"]["acc"] in (0, 0.25, 0.5, 0.75, 1)


def test_an_unknown_task(stories: tuple[LlamaForCausalLM, Any], folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from lm_eval import tasks

    class OwnTasksOnly(tasks.TaskManager):  # lm-eval's own files take many seconds to index
        def __init__(self, **options: Any) -> None:
            super().__init__(**options | {"include_defaults": False})

    monkeypatch.setattr(tasks, "TaskManager", OwnTasksOnly)
    with pytest.raises(ValueError, match=r"unknown task 'local_storys' in eval\.tasks: did you mean local_stories"):
        run_tasks(*stories, ["local_storys"], include_path=str(folder))


def test_data_that_cannot_be_reached(
    stories: tuple[LlamaForCausalLM, Any], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import datasets

    def unreachable(*_: Any, **__: Any) -> None:
        raise ConnectionError("Couldn't reach it")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    with pytest.raises(ValueError, match=r"eval.tasks=local_stories are neither cached nor reachable"):
        run_tasks(*stories, ["local_stories"], include_path=str(folder))


def test_questions_continue_test_documents(monkeypatch: pytest.MonkeyPatch) -> None:
    documents = corpus.core_documents("test")
    monkeypatch.setattr(corpus, "core_documents", {"test": documents}.get)  # read the files once
    questions = pydocs_next_questions(count=40)
    assert questions == pydocs_next_questions(count=40)
    texts = [d.text for d in documents]
    for question in questions:
        context, choices, label = question["context"], question["choices"], question["label"]
        assert len(context) == 240 and context.endswith("\n")
        assert len(choices) == 4 and {len(choice) for choice in choices} == {80}
        assert any(context + choices[label] in text for text in texts)
    assert {question["label"] for question in questions} == {0, 1, 2, 3}
