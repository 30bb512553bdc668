"""Train the embedded model `tiny` from scratch on the embedded corpus, on a CPU.

    python -m harness.train_tiny                      # hours on 2 cores; resumes from its checkpoint
    python -m harness.train_tiny steps=20 out=DIR     # a smoke run

The recipe: a Llama with grouped-query attention, byte-level BPE, AdamW for embeddings and norms, Muon for the
matrices (Jordan et al. 2024), and a warmup-stable-decay schedule whose decay phase reads mostly core text.
"""

from __future__ import annotations

import json
import logging
import math
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import hydra
import torch
from hydra.core.config_store import ConfigStore
from omegaconf import OmegaConf
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from harness import corpus

log = logging.getLogger(__name__)

END_OF_TEXT = "<|endoftext|>"
TINY = Path(__file__).parent / "assets" / "tiny"


@dataclass
class Recipe:
    """Everything that determines the trained weights."""

    steps: int = 2400
    """Optimizer steps of `batch_tokens` tokens each."""
    seed: int = 0
    vocab_size: int = 2048
    hidden_size: int = 256
    intermediate_size: int = 768
    layers: int = 8
    heads: int = 8
    kv_heads: int = 4
    batch_tokens: int = 8192
    short_context: int = 256
    """Context of the first `1 - decay` of all steps; the decay phase uses the full context."""
    context: int = 512
    peak_lr: float = 4e-3
    weight_decay: float = 0.1
    warmup_steps: int = 100
    decay: float = 0.4
    """Fraction of the steps over which the learning rate falls linearly to zero, at the end."""
    core_share: float = 0.5
    """Fraction of windows drawn from core (rather than optional) text while the learning rate is constant."""
    core_share_decay: float = 0.9
    """The same fraction in the decay phase."""
    out: str = str(TINY)
    checkpoint: str = ".cache/train_tiny.pt"
    compile: bool = True


def train_tokenizer(documents: list[corpus.Document], vocab_size: int) -> Tokenizer:
    """Byte-level BPE (no unknown token exists); digits one by one, runs of spaces kept for indentation."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((d.text for d in documents), trainer)
    return tokenizer


def encode(tokenizer: Tokenizer, documents: list[corpus.Document]) -> torch.Tensor:
    """All documents in one int64 vector, each preceded by the end-of-text token."""
    bos = tokenizer.token_to_id(END_OF_TEXT)
    batches = tokenizer.encode_batch([d.text for d in documents])
    return torch.tensor([i for encoding in batches for i in (bos, *encoding.ids)])


def build_model(recipe: Recipe) -> LlamaForCausalLM:
    """A randomly initialized Llama in fp32."""
    torch.manual_seed(recipe.seed)  # transformers initializes from the global generator
    config = LlamaConfig(
        vocab_size=recipe.vocab_size,
        hidden_size=recipe.hidden_size,
        intermediate_size=recipe.intermediate_size,
        num_hidden_layers=recipe.layers,
        num_attention_heads=recipe.heads,
        num_key_value_heads=recipe.kv_heads,
        max_position_embeddings=recipe.context,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
    )
    return LlamaForCausalLM(config)


def learning_rate(recipe: Recipe, step: int) -> float:
    """Warmup, then constant, then linear decay to zero (WSD)."""
    warm = min(1.0, (step + 1) / recipe.warmup_steps)
    cool = min(1.0, (recipe.steps - step) / max(1, round(recipe.decay * recipe.steps)))
    return recipe.peak_lr * min(warm, cool)


def optimizers(recipe: Recipe, model: LlamaForCausalLM) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the decoder layers; AdamW for the embedding and the norms."""
    matrices = [p for p in model.model.layers.parameters() if p.dim() == 2]
    others = [p for p in model.parameters() if all(p is not m for m in matrices)]
    return [
        torch.optim.Muon(matrices, lr=recipe.peak_lr, weight_decay=recipe.weight_decay, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=recipe.peak_lr, betas=(0.9, 0.95), weight_decay=0.0),
    ]


def windows(stream: torch.Tensor, count: int, length: int, generator: torch.Generator) -> torch.Tensor:
    """`count` random crops of `length` tokens: [count, length]."""
    starts = torch.randint(0, len(stream) - length, (count,), generator=generator)
    return torch.stack([stream[s : s + length] for s in starts])


def batch(recipe: Recipe, step: int, core: torch.Tensor, optional: torch.Tensor) -> torch.Tensor:
    """The windows of one step: a function of the seed and the step alone, so that a resumed run is the same run."""
    decaying = step >= round((1 - recipe.decay) * recipe.steps)
    context = recipe.context if decaying else recipe.short_context
    share = recipe.core_share_decay if decaying else recipe.core_share
    rows = recipe.batch_tokens // context
    from_core = round(share * rows) if len(optional) else rows
    generator = torch.Generator().manual_seed(recipe.seed * 1_000_003 + step)
    parts = [windows(core, from_core, context, generator)]
    if from_core < rows:
        parts.append(windows(optional, rows - from_core, context, generator))
    return torch.cat(parts)


@torch.no_grad()
def perplexity(model: LlamaForCausalLM, stream: torch.Tensor, context: int) -> float:
    """exp(mean token NLL) over consecutive windows of `context` tokens."""
    rows = stream[: len(stream) // context * context].view(-1, context)
    losses = [model(input_ids=chunk, labels=chunk).loss.item() * len(chunk) for chunk in rows.split(16)]
    return math.exp(sum(losses) / len(rows))


def train(
    recipe: Recipe, model: LlamaForCausalLM, core: torch.Tensor, optional: torch.Tensor, scoring: torch.Tensor
) -> None:
    """Run the recipe, resuming from `recipe.checkpoint` when it exists."""
    opts = optimizers(recipe, model)
    start = _resume(recipe, model, opts)

    def loss_of(tokens: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return model(input_ids=tokens, labels=tokens, use_cache=False).loss

    compiled = torch.compile(loss_of, dynamic=False) if recipe.compile else loss_of
    began, average = time.monotonic(), float("nan")
    for step in range(start, recipe.steps):
        loss = compiled(batch(recipe, step, core, optional))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for opt in opts:
            for group in opt.param_groups:
                group["lr"] = learning_rate(recipe, step)
            opt.step()
            opt.zero_grad(set_to_none=True)
        average = loss.item() if math.isnan(average) else 0.95 * average + 0.05 * loss.item()
        if (step + 1) % 50 == 0 or step + 1 == recipe.steps:
            rate = (step + 1 - start) * recipe.batch_tokens / (time.monotonic() - began)
            log.info("step %d/%d  loss %.3f  %.0f tokens/s", step + 1, recipe.steps, average, rate)
            _save(recipe, model, opts, step + 1)
        if (step + 1) % 500 == 0:
            log.info(
                "step %d  scoring perplexity %.2f",
                step + 1,
                perplexity(model, scoring[:32768], recipe.context),
            )


def _resume(recipe: Recipe, model: LlamaForCausalLM, opts: list[torch.optim.Optimizer]) -> int:
    if not Path(recipe.checkpoint).exists():
        return 0
    state = torch.load(recipe.checkpoint, weights_only=True)
    model.load_state_dict(state["model"])
    for opt, opt_state in zip(opts, state["optimizers"], strict=True):
        opt.load_state_dict(opt_state)
    log.info("resuming at step %d from %s", state["step"], recipe.checkpoint)
    return state["step"]


def _save(recipe: Recipe, model: LlamaForCausalLM, opts: list[torch.optim.Optimizer], step: int) -> None:
    path = Path(recipe.checkpoint)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    torch.save({"step": step, "model": model.state_dict(), "optimizers": [o.state_dict() for o in opts]}, partial)
    partial.replace(path)


def export(recipe: Recipe, model: LlamaForCausalLM, tokenizer: Tokenizer, facts: dict[str, object]) -> None:
    """Write a Hugging Face model directory (bf16 safetensors) and `training.json`, the facts of the run."""
    out = Path(recipe.out)
    out.mkdir(parents=True, exist_ok=True)
    model.config.dtype = "bfloat16"
    model.config.save_pretrained(out)
    state = {name: p.detach().to(torch.bfloat16).contiguous() for name, p in model.named_parameters()}
    save_file(state, out / "model.safetensors", metadata={"format": "pt"})
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        model_max_length=recipe.context,
        clean_up_tokenization_spaces=False,
    )
    fast.save_pretrained(out)
    (out / "training.json").write_text(json.dumps(facts, indent=2) + "\n")


ConfigStore.instance().store(name="train_tiny", node=Recipe)


@hydra.main(version_base="1.3", config_path=None, config_name="train_tiny")
def main(config: Recipe) -> None:
    recipe = OmegaConf.to_object(config)
    assert isinstance(recipe, Recipe)
    documents, extra = corpus.core_documents(), corpus.optional_documents()
    training = [d for d in documents if d.split == "train"]
    tokenizer = train_tokenizer(training, recipe.vocab_size)
    core, optional = encode(tokenizer, training), encode(tokenizer, extra) if extra else torch.empty(0)
    held_out = {s: encode(tokenizer, [d for d in documents if d.split == s]) for s in ("scoring", "test")}
    log.info("tokens: core %d, optional %d, %s", len(core), len(optional), {k: len(v) for k, v in held_out.items()})
    model = build_model(recipe)
    train(recipe, model, core, optional, held_out["scoring"])
    for parameter in model.parameters():  # evaluate what is shipped
        parameter.data = parameter.data.to(torch.bfloat16).float()
    facts = {
        "recipe": {k: v for k, v in asdict(recipe).items() if k not in ("out", "checkpoint", "compile")},
        "parameters": sum(p.numel() for p in model.parameters()),
        "python": corpus.python_version(),
        "core_sha256": corpus.digest(documents),
        "optional_sha256": corpus.digest(extra),
        "core_tokens": len(core),
        "optional_tokens": len(optional),
        "perplexity": {name: round(perplexity(model, tokens, recipe.context), 3) for name, tokens in held_out.items()},
    }
    export(recipe, model, tokenizer, facts)
    log.info("%s", json.dumps(facts["perplexity"]))


if __name__ == "__main__":
    main()
