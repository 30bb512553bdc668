"""Every file in conf/model fills the schema, and the shipped models are what they say."""

from __future__ import annotations

from pathlib import Path

import hydra
import pytest
import torch
from hydra.core.config_store import ConfigStore
from omegaconf import OmegaConf

from harness.models import ModelConfig, load
from harness.outliers import Outliers

CONF = Path(__file__).parents[2] / "conf"


def compose_model(*overrides: str) -> ModelConfig:
    ConfigStore.instance().store(group="model", name="base_model", node=ModelConfig)
    with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
        config = OmegaConf.to_object(hydra.compose(overrides=list(overrides)).model)
    assert isinstance(config, ModelConfig)
    return config


@pytest.mark.parametrize("file", sorted((CONF / "model").glob("*.yaml")), ids=lambda file: file.stem)
def test_every_file_fills_the_schema(file: Path) -> None:
    config = compose_model(f"+model={file.stem}")
    general = {"local": "", "hub": ""}  # need a path or name from the command line
    assert config.name == general.get(file.stem, file.stem)
    assert file.stem in general or bool(config.path) != bool(config.hub)


def test_local_and_hub_from_the_command_line() -> None:
    assert compose_model("+model=local", "model.path=some/where").name == "where"
    config = compose_model("+model=hub", "model.name=meta-llama/Llama-2-7b-hf")
    assert (config.name, config.hub) == ("meta-llama/Llama-2-7b-hf", "meta-llama/Llama-2-7b-hf")
    assert compose_model("+model=opt-125m", "model.outliers.channels=2").outliers == Outliers(channels=2)


def test_tiny_and_its_outliers_are_one_function() -> None:
    plain, planted = (load(compose_model(f"+model={name}")) for name in ("tiny", "tiny_outliers"))
    tokens = torch.randint(plain.vocab_size, (2, 64), generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(planted.network.logits(tokens), plain.network.logits(tokens), rtol=0, atol=1e-4)
    name = plain.network.linears[0]
    assert not torch.equal(planted.network.weight(name), plain.network.weight(name))
    assert planted.digest != plain.digest
