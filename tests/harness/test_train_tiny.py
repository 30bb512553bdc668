"""The recipe of the embedded model: a run that is interrupted is the same run, and the model it ships is described."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from harness.train_tiny import TINY, Recipe, batch, encode, learning_rate, perplexity, train_tokenizer

ROOT = Path(__file__).parents[2]


def test_the_schedule_warms_up_stays_and_falls_to_zero():
    recipe = Recipe(steps=100, warmup_steps=10, decay=0.4, peak_lr=1.0)
    rates = [learning_rate(recipe, step) for step in range(100)]
    assert rates[:10] == pytest.approx([(i + 1) / 10 for i in range(10)])
    assert set(rates[10:60]) == {1.0}
    assert rates[60:] == pytest.approx([1 - i / 40 for i in range(40)])


def test_a_batch_is_a_function_of_seed_and_step():
    recipe = Recipe(steps=10, batch_tokens=64, short_context=8, context=16, core_share=0.5, decay=0.5)
    core, optional = torch.arange(100), torch.arange(1000, 1100)
    first = batch(recipe, 3, core, optional)
    assert torch.equal(first, batch(recipe, 3, core, optional))
    assert not torch.equal(first, batch(recipe, 4, core, optional))
    assert first.shape == (8, 8) and batch(recipe, 5, core, optional).shape == (4, 16)
    assert (first < 100).all(dim=1).sum() == 4  # half of the windows from core text
    assert (first.diff(dim=1) == 1).all()  # consecutive tokens


def test_the_tokenizer_reproduces_any_text():
    from harness.corpus import Document

    documents = [Document("a.py", "def f(x):\n    return x + 1\n" * 50)]
    tokenizer = train_tokenizer(documents, 300)
    text = "def ü():\n\treturn '\U0001f40d'  # 2024\n"
    assert tokenizer.decode(tokenizer.encode(text).ids) == text
    stream = encode(tokenizer, documents)
    assert stream[0] == tokenizer.token_to_id("<|endoftext|>")


def test_perplexity_of_a_uniform_model_is_its_vocabulary():
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=64, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
    )
    model = LlamaForCausalLM(config)
    torch.nn.init.zeros_(model.lm_head.weight)
    assert perplexity(model, torch.arange(64), 16) == pytest.approx(64, rel=1e-5)


@pytest.mark.slow
def test_an_interrupted_training_ends_in_the_same_weights(tmp_path):
    def train(steps: int, out: str, checkpoint: str) -> None:
        options = [f"steps={steps}", f"out={tmp_path}/{out}", f"checkpoint={tmp_path}/{checkpoint}"]
        small = ["layers=1", "batch_tokens=512", "context=64", "short_context=64", "compile=false", "decay=0.0"]
        command = [sys.executable, "-m", "harness.train_tiny", *options, *small, f"hydra.run.dir={tmp_path}"]
        subprocess.run(command, check=True, cwd=ROOT, capture_output=True)

    train(4, "whole", "a.pt")
    train(2, "half", "b.pt")
    train(4, "resumed", "b.pt")
    whole, resumed = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "resumed"))
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_the_shipped_model_is_what_its_facts_say():
    facts = json.loads((TINY / "training.json").read_text())
    config = json.loads((TINY / "config.json").read_text())
    weights = load_file(TINY / "model.safetensors")
    assert sum(w.numel() for w in weights.values()) == facts["parameters"]
    assert all(w.dtype == torch.bfloat16 and w.isfinite().all() for w in weights.values())
    assert (TINY / "model.safetensors").stat().st_size <= 16 * 2**20
    assert config["num_hidden_layers"] >= 8 and config["num_key_value_heads"] < config["num_attention_heads"]
    assert config["hidden_size"] % 128 == config["intermediate_size"] % 128 == 0
    assert all(1 < facts["perplexity"][split] < 15 for split in ("test", "scoring"))
    card = (TINY / "README.md").read_text()
    assert all(f"{facts['perplexity'][split]:.2f}" in card for split in ("test", "scoring"))
    assert math.isclose(facts["recipe"]["steps"] * facts["recipe"]["batch_tokens"] / 1e6, 19.7, abs_tol=0.1)
