"""Causal language models: the configuration that names one, `load`, and the digest that identifies it.

`weights_digest` reads files only and never imports transformers, so the key of a cell is known before
anything is loaded. `load` hands the model over as the methods see it: in eval mode, its blocks made of
`nn.Linear`, and with its structure.
"""

from __future__ import annotations

import hashlib
import json
import logging
import pickle
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from harness import checkpoints
from harness.outliers import Outliers, plant
from methods.network import Network, discover

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

log = logging.getLogger(__name__)

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass
class ModelConfig:
    """Which model, in which precision. Exactly one of `path` and `hub` says where it lies."""

    name: str = ""
    """Label in tables; by default the directory's name."""
    path: str | None = None
    """Directory with config.json, safetensors and a tokenizer; `package:NAME` is one in this package."""
    hub: str | None = None
    """Identifier on the Hugging Face hub, such as `EleutherAI/pythia-70m`."""
    revision: str | None = None
    """Branch, tag or commit on the hub."""
    dtype: str = "float32"
    """Precision of the unquantized model: float32, bfloat16 or float16."""
    outliers: Outliers = field(default_factory=Outliers)
    """Activation outliers to plant; none by default."""
    allow_pickle: bool = False
    """Read the weights from a pickle where there are no safetensors."""
    trust_remote_code: bool = False
    """Run Python code that comes with the checkpoint."""

    def __post_init__(self) -> None:
        if not self.name and self.path:
            self.name = Path(self.path).resolve().name
        if self.dtype not in DTYPES:
            raise ValueError(f"model.dtype={self.dtype} is not one of {', '.join(DTYPES)}")

    def directory(self) -> Path:
        """Where the checkpoint lies on disk, after a download if need be; ValueError if there is none."""
        if bool(self.path) == bool(self.hub):
            raise ValueError(
                "a model comes from one place: model=local model.path=DIRECTORY, or model=hub "
                "model.name=ORGANIZATION/MODEL"
            )
        if self.path:
            return checkpoints.locate(self.path)
        return checkpoints.download(str(self.hub), self.revision, self.allow_pickle)


@dataclass
class Loaded:
    """A model ready to be quantized.

    Attributes:
        network: the model, in eval mode and without gradients, and its structure.
        tokenizer: the tokenizer that belongs to it.
        context: most tokens in a sequence; a huge number where the model sets no limit.
        vocab_size: logits of a position; token ids are below it.
        digest: its `weights_digest`.
    """

    network: Network
    tokenizer: PreTrainedTokenizerBase
    context: int
    vocab_size: int
    digest: str


def weights_digest(config: ModelConfig) -> str:
    """SHA-256 of what determines the loaded model: the checkpoint's files, precision and planted outliers.

    Raises:
        ValueError: there is no complete checkpoint; one sentence says what is missing.
    """
    files = checkpoints.digest(config.directory(), config.allow_pickle, config.trust_remote_code)
    outliers = asdict(config.outliers) if config.outliers.channels else None
    return hashlib.sha256(json.dumps([files, config.dtype, outliers], sort_keys=True).encode()).hexdigest()


def load(config: ModelConfig, device: str = "cpu") -> Loaded:
    """Build the model on `device`.

    Raises:
        ValueError: the checkpoint is missing, damaged or no causal language model; one sentence says which.
    """
    directory = config.directory()
    settings, model = _pretrained(directory, config)
    with _one_sentence(f"no tokenizer can be read from {directory}; add its tokenizer.json"):
        tokenizer = _tokenizer(directory, config)
    _require_finite(model, config)
    _convert_to_linear(model)
    model.to(device).eval().requires_grad_(False)
    network = discover(model, settings.vocab_size)
    _require_causal(network, settings.vocab_size)
    _report_untouched(network)
    if config.outliers.channels:
        plant(network, config.outliers)
    context = getattr(settings, "max_position_embeddings", None) or tokenizer.model_max_length
    return Loaded(network, tokenizer, context, settings.vocab_size, weights_digest(config))


def _pretrained(directory: Path, config: ModelConfig) -> tuple[PretrainedConfig, nn.Module]:
    """The language model and its configuration, as transformers builds them."""
    # transformers takes seconds to import, and only processes that load a model need it.
    import transformers

    transformers.logging.set_verbosity_error()  # what matters of its warnings is checked here
    transformers.logging.disable_progress_bar()
    weights = checkpoints.weight_files(directory, config.allow_pickle)
    with _one_sentence(f"transformers {transformers.__version__} cannot read {directory} as a causal language model"):
        settings = _settings(directory, config)
        # The default attention is sdpa where the architecture has it, eager where not.
        loaded: Any = transformers.AutoModelForCausalLM.from_pretrained(
            directory,
            config=settings,
            dtype=DTYPES[config.dtype],
            use_safetensors=weights[0].suffix == ".safetensors",
            trust_remote_code=config.trust_remote_code,
            ignore_mismatched_sizes=True,  # reported below, by name
            output_loading_info=True,
        )
    model, report = loaded
    _require_complete(report, directory)
    return settings.get_text_config(), model


def _settings(directory: Path, config: ModelConfig) -> PretrainedConfig:
    from transformers import CONFIG_MAPPING, AutoConfig, PretrainedConfig

    raw, _ = PretrainedConfig.get_config_dict(directory)
    if "auto_map" in raw and raw.get("model_type") not in CONFIG_MAPPING and not config.trust_remote_code:
        raise ValueError("it brings its own Python code; set model.trust_remote_code=true if you trust that")
    if "quantization_config" in raw:
        raise ValueError("it is quantized already; name the checkpoint that it was made from")
    return AutoConfig.from_pretrained(directory, trust_remote_code=config.trust_remote_code)


def _tokenizer(directory: Path, config: ModelConfig) -> PreTrainedTokenizerBase:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(directory, trust_remote_code=config.trust_remote_code)


@contextmanager
def _one_sentence(failure: str) -> Iterator[None]:
    """Turn what transformers raises about a bad checkpoint, often screens of text, into one ValueError."""
    from huggingface_hub.errors import StrictDataclassError
    from safetensors import SafetensorError

    known = (OSError, ValueError, KeyError, RuntimeError, ImportError, pickle.UnpicklingError)
    try:
        yield
    except (*known, SafetensorError, StrictDataclassError) as error:
        raise ValueError(f"{failure}: {textwrap.shorten(str(error), 240, placeholder=' …')}") from error


def _require_complete(report: dict[str, Any], directory: Path) -> None:
    """Refuse tensors that transformers would have left at random values; mention those it did not use."""
    kinds = ("missing", "mismatched", "unexpected")
    absent, misfits, unused = (sorted(report[f"{kind}_keys"]) for kind in kinds)
    if misfits:
        name, stored, wanted = misfits[0]
        raise ValueError(
            f"{name} in {directory} is {list(stored)} where its config.json asks for {list(wanted)}; "
            "put the config.json that belongs to these weights beside them"
        )
    if absent:
        raise ValueError(
            f"the weights in {directory} lack {len(absent)} tensors of the model, such as {absent[0]}; "
            "fetch the complete checkpoint, with its own config.json"
        )
    if unused:
        log.warning("the model does not use %d tensors of %s, such as %s", len(unused), directory, unused[0])


def _require_finite(model: nn.Module, config: ModelConfig) -> None:
    for name, parameter in model.named_parameters():
        if not torch.isfinite(parameter).all():
            raise ValueError(
                f"{name} of {config.name} holds NaN or infinity in {config.dtype}; "
                "take an undamaged checkpoint, or a wider model.dtype"
            )


def _convert_to_linear(model: nn.Module) -> None:
    """Replace GPT-2's Conv1D, a linear that stores its weight as [in, out], by the equal `nn.Linear`."""
    from transformers.pytorch_utils import Conv1D

    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, Conv1D):
                linear = nn.Linear(child.nx, child.nf, device="meta")  # no memory, no random numbers
                linear.weight = nn.Parameter(child.weight.detach().T.contiguous())
                linear.bias = nn.Parameter(child.bias.detach())
                setattr(parent, name, linear)


@torch.no_grad()
def _require_causal(network: Network, vocab_size: int) -> None:
    """Refuse encoders such as BERT, which transformers also builds with a language modeling head."""
    first = torch.randint(vocab_size, (1, 8), generator=torch.Generator().manual_seed(0))
    second = first.clone()
    second[0, -1] = (first[0, -1] + 1) % vocab_size
    device = next(network.model.parameters()).device
    a, b = (network.logits(tokens.to(device))[:, :-1].float() for tokens in (first, second))
    if (a - b).abs().max() > 1e-2 * a.abs().max():
        raise ValueError(
            f"{type(network.model).__name__} is no causal language model: its logits depend on later tokens; "
            "name a decoder such as Llama or OPT"
        )


def _report_untouched(network: Network) -> None:
    """Mention weight matrices inside the blocks that are not quantized, such as fused experts."""
    quantized = {f"{name}.weight" for name in network.linears}
    blocks = tuple(f"{block.name}." for block in network.blocks)
    others = {
        name: parameter.numel()
        for name, parameter in network.model.named_parameters()
        if name.startswith(blocks) and parameter.dim() > 1 and name not in quantized
    }
    if others:
        log.warning(
            "%d weight tensors of the blocks, such as %s, are not linears that the model runs: "
            "they stay in full precision and are no part of effective bits",
            len(others),
            max(others, key=lambda name: others[name]),
        )
