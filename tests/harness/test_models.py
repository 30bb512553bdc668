"""Loading: equality with transformers' own model, the digest, and errors in one sentence."""

from __future__ import annotations

import json
import logging
import math
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from torch import Tensor, nn

from harness.models import ModelConfig, load, weights_digest
from harness.outliers import Outliers

STORIES = Path(__file__).parents[3] / "shared/models/stories260K"
STORIES_TEXT = Path(__file__).parents[3] / "shared/data/tinystories/valid.jsonl"
VOCAB = 96
SIZES = {
    "vocab_size": VOCAB,
    "max_position_embeddings": 64,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
GQA = {**SIZES, "intermediate_size": 48, "num_key_value_heads": 2}
CONFIGS: dict[str, Callable[[], transformers.PretrainedConfig]] = {
    "llama": lambda: transformers.LlamaConfig(**GQA),
    "llama-tied": lambda: transformers.LlamaConfig(**GQA, tie_word_embeddings=True),
    "gpt2": lambda: transformers.GPT2Config(**SIZES),
    "opt": lambda: transformers.OPTConfig(**SIZES, ffn_dim=48, word_embed_proj_dim=32),
    "neox": lambda: transformers.GPTNeoXConfig(**SIZES, intermediate_size=48),
    "qwen3": lambda: transformers.Qwen3Config(**GQA, head_dim=8),
    "mistral": lambda: transformers.MistralConfig(**GQA),
}


def save_tokenizer(directory: Path) -> None:
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    trainer = trainers.BpeTrainer(vocab_size=VOCAB, special_tokens=["<unk>"], show_progress=False)
    tokenizer.train_from_iterator(["a small vocabulary of a few dozen tokens is all that is needed here"], trainer)
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>").save_pretrained(directory)


def save(config: transformers.PretrainedConfig, directory: Path, **options: Any) -> Path:
    """A checkpoint with random weights, biases and gains."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(config)
        for parameter in model.parameters():
            parameter.data.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(directory, **options)
    save_tokenizer(directory)
    return directory


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("checkpoints")
    return {name: save(config(), root / name) for name, config in CONFIGS.items()}


@pytest.fixture
def copy(checkpoints: dict[str, Path], tmp_path: Path) -> Path:
    """A Llama to damage."""
    return shutil.copytree(checkpoints["llama"], tmp_path / "copy")


@pytest.fixture
def tokens() -> Tensor:
    return torch.randint(VOCAB, (2, 24), generator=torch.Generator().manual_seed(3))


def local(path: Path, **options: Any) -> ModelConfig:
    return ModelConfig(path=str(path), **options)


def edit_config(directory: Path, **changes: Any) -> None:
    file = directory / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def edit_weights(directory: Path, edit: Callable[[dict[str, Tensor]], object]) -> None:
    weights = load_file(directory / "model.safetensors")
    edit(weights)
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})


# Loading


@pytest.mark.parametrize("name", CONFIGS)
def test_logits_equal_those_of_transformers(name: str, checkpoints: dict[str, Path], tokens: Tensor) -> None:
    directory = checkpoints[name]
    reference = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    loaded = load(local(directory))
    with torch.no_grad():
        expected = reference(tokens).logits
    torch.testing.assert_close(loaded.network.logits(tokens), expected, rtol=0, atol=1e-5)
    assert expected.std() > 0.1
    assert (loaded.context, loaded.vocab_size) == (64, VOCAB)
    assert len(loaded.tokenizer("a few tokens")["input_ids"]) == 3


@pytest.mark.parametrize("name", CONFIGS)
def test_what_is_handed_over(name: str, checkpoints: dict[str, Path]) -> None:
    network = load(local(checkpoints[name])).network
    model: Any = network.model
    blocks = [m for block in network.blocks for m in network.module(block.name).modules()]
    matrices = [m for m in blocks if any(p.dim() == 2 for p in m.parameters(recurse=False))]
    assert matrices and all(type(m) is nn.Linear for m in matrices)
    assert len(matrices) == len(network.linears)
    assert not model.training and not any(p.requires_grad for p in model.parameters())
    assert model.config._attn_implementation == "sdpa"
    tied = model.get_input_embeddings().weight is model.get_output_embeddings().weight
    assert tied == (name in ("llama-tied", "gpt2", "opt"))


def test_structure_of_gpt2(checkpoints: dict[str, Path]) -> None:
    groups = load(local(checkpoints["gpt2"])).network.blocks[1].groups
    assert {group.linears: group.producer for group in groups} == {
        ("transformer.h.1.attn.c_attn",): "transformer.h.1.ln_1",
        ("transformer.h.1.attn.c_proj",): None,
        ("transformer.h.1.mlp.c_fc",): "transformer.h.1.ln_2",
        ("transformer.h.1.mlp.c_proj",): None,
    }


def test_dtype(checkpoints: dict[str, Path]) -> None:
    network = load(local(checkpoints["llama"], dtype="bfloat16")).network
    assert {p.dtype for p in network.model.parameters()} == {torch.bfloat16}
    with pytest.raises(ValueError, match=r"model\.dtype=int4 is not one of float32, bfloat16"):
        ModelConfig(dtype="int4")


def test_sharded_checkpoint(checkpoints: dict[str, Path], tmp_path: Path, tokens: Tensor) -> None:
    directory = save(CONFIGS["llama"](), tmp_path / "shards", max_shard_size="20KB")
    shards = sorted(directory.glob("model-*.safetensors"))
    assert len(shards) > 2
    whole = load(local(checkpoints["llama"])).network.logits(tokens)
    assert torch.equal(load(local(directory)).network.logits(tokens), whole)
    before = weights_digest(local(directory))
    edit_weights(shards[1].rename(directory / "model.safetensors").parent, lambda w: [t.add_(1) for t in w.values()])
    (directory / "model.safetensors").rename(shards[1])
    assert weights_digest(local(directory)) != before
    shards[1].unlink()
    with pytest.raises(ValueError, match=f"missing \\({shards[1].name}\\)"):
        load(local(directory))


def test_pickle_only_on_request(checkpoints: dict[str, Path], copy: Path, tokens: Tensor) -> None:
    torch.save(load_file(copy / "model.safetensors"), copy / "pytorch_model.bin")
    (copy / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"as a pickle.*model\.allow_pickle=true"):
        load(local(copy))
    expected = load(local(checkpoints["llama"])).network.logits(tokens)
    assert torch.equal(load(local(copy, allow_pickle=True)).network.logits(tokens), expected)


def test_unused_tensors_are_mentioned(copy: Path, caplog: pytest.LogCaptureFixture) -> None:
    edit_config(copy, num_hidden_layers=1)
    with caplog.at_level(logging.WARNING, "harness"):
        load(local(copy))
    assert "does not use 9 tensors" in caplog.text and "model.layers.1." in caplog.text


def test_unquantized_matrices_are_mentioned(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    directory = save(transformers.MixtralConfig(**GQA, num_local_experts=2), tmp_path / "mixtral")
    with caplog.at_level(logging.WARNING, "harness"):
        load(local(directory))
    assert "experts" in caplog.text and "stay in full precision" in caplog.text


@pytest.mark.skipif(not STORIES.is_dir(), reason="../shared is absent")
def test_perplexity_of_a_real_checkpoint() -> None:
    """Its card says 4.1 to 4.8, depending on the text."""
    loaded = load(local(STORIES))
    with STORIES_TEXT.open() as lines:
        stories = [json.loads(next(lines))["text"] for _ in range(20)]
    stream = torch.cat([torch.tensor(loaded.tokenizer(story)["input_ids"]) for story in stories])
    windows = stream[: len(stream) // loaded.context * loaded.context].view(-1, loaded.context)
    logits = loaded.network.logits(windows)[:, :-1].flatten(0, 1)
    loss = nn.functional.cross_entropy(logits, windows[:, 1:].flatten()).item()
    assert len(windows) >= 5
    assert 3.5 < math.exp(loss) < 5.5


# The digest


def test_digest_needs_no_transformers(checkpoints: dict[str, Path]) -> None:
    program = (
        "import sys; from harness.models import ModelConfig, weights_digest; "
        f"config = ModelConfig(path={str(checkpoints['llama'])!r}); "
        "print(weights_digest(config), 'transformers' in sys.modules)"
    )
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert run.stdout.split() == [load(local(checkpoints["llama"])).digest, "False"]


def test_digest_ignores_name_and_place(checkpoints: dict[str, Path], copy: Path) -> None:
    assert weights_digest(local(copy, name="another")) == weights_digest(local(checkpoints["llama"]))


def test_digest_sees_what_changes_the_model(copy: Path) -> None:
    original = weights_digest(local(copy))
    digests = {
        original,
        weights_digest(local(copy, dtype="bfloat16")),
        weights_digest(local(copy, outliers=Outliers(channels=4))),
        weights_digest(local(copy, outliers=Outliers(channels=4, seed=1))),
    }
    edit_weights(copy, lambda w: w["model.norm.weight"].add_(1))  # the same file size
    digests.add(weights_digest(local(copy)))
    edit_config(copy, rms_norm_eps=1e-3)
    digests.add(weights_digest(local(copy)))
    tokenizer = copy / "tokenizer.json"
    tokenizer.write_text(tokenizer.read_text() + "\n")
    digests.add(weights_digest(local(copy)))
    assert len(digests) == 7


# Errors


def damage_nan(directory: Path) -> None:
    edit_weights(directory, lambda w: w["model.layers.1.mlp.up_proj.weight"][3, 4].fill_(math.nan))


def damage_truncate(directory: Path) -> None:
    file = directory / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def damage_tokenizer(directory: Path) -> None:
    for file in directory.glob("tokenizer*"):
        file.unlink()


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "nan": (damage_nan, r"model\.layers\.1\.mlp\.up_proj\.weight .* holds NaN or infinity in float32"),
    "truncated": (damage_truncate, "as a causal language model: .*not fully covered"),
    "no tokenizer": (damage_tokenizer, "no tokenizer can be read from .*add its tokenizer.json"),
    "unknown": (lambda d: edit_config(d, model_type="foo"), "as a causal language model: .*`foo`"),
    "encoder-decoder": (lambda d: edit_config(d, model_type="t5"), "as a causal language model: .*T5Config"),
    "bad value": (lambda d: edit_config(d, hidden_size="wide"), "hidden_size.* expected int"),
    "misfit": (lambda d: edit_config(d, intermediate_size=40), r"proj\.weight .* is \[.*48.* asks for .*40"),
    "absent": (lambda d: edit_config(d, num_hidden_layers=3), r"lack 9 tensors .*model\.layers\.2\."),
    "no head": (lambda d: edit_weights(d, lambda w: w.pop("lm_head.weight")), r"lack 1 .*lm_head\.weight"),
    "quantized": (
        lambda d: edit_config(d, quantization_config={"quant_method": "gptq"}),
        "quantized already",
    ),
    "code": (lambda d: edit_config(d, model_type="foo", auto_map={"AutoConfig": "a.B"}), "trust_remote_code"),
}


@pytest.mark.parametrize(("damage", "message"), DAMAGES.values(), ids=list(DAMAGES))
def test_damaged_checkpoint(damage: Callable[[Path], object], message: str, copy: Path) -> None:
    damage(copy)
    with pytest.raises(ValueError, match=message) as caught:
        load(local(copy))
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 500


def test_float16_overflow_names_the_tensor(copy: Path) -> None:
    edit_weights(copy, lambda w: w["model.norm.weight"].fill_(1e6))
    with pytest.raises(ValueError, match=r"model\.norm\.weight .* in float16; .*wider model\.dtype"):
        load(local(copy, dtype="float16"))


def test_encoder_is_refused(tmp_path: Path) -> None:
    directory = save(transformers.BertConfig(**SIZES, intermediate_size=48), tmp_path / "bert")
    with pytest.raises(ValueError, match="BertLMHeadModel is no causal language model"):
        load(local(directory))


@pytest.mark.parametrize("config", [ModelConfig(), ModelConfig(path="x", hub="y/z"), ModelConfig(name="x", hub="")])
def test_a_model_comes_from_one_place(config: ModelConfig) -> None:
    for function in (weights_digest, load):
        with pytest.raises(ValueError, match=r"model=local model\.path=.* or model=hub model\.name="):
            function(config)
