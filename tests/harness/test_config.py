"""Every config composes into a cell; bad input gets one sentence that names the problem and the remedy."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override

from harness.config import cell_from_dict, named_budgets, register_configs, to_cell, to_run
from methods.base import METHODS, Budget

ROOT = Path(__file__).parents[2]
CONF = ROOT / "conf"


@pytest.fixture(autouse=True)
def hydra():
    register_configs()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        yield


def cell(*overrides: str):
    return to_cell(compose("config", list(overrides)))


def choices(group: str) -> list[str]:
    return sorted(path.stem for path in (CONF / group).glob("*.yaml"))


@pytest.mark.parametrize("group", ["data", "eval", "method", "model"])
def test_every_config_file_makes_a_cell(group):
    assert choices(group)
    for name in choices(group):
        extra = ["model.path=somewhere"] if name == "local" else []
        extra += ["model.name=org/name"] if name == "hub" else []
        assert cell(f"{group}={name}", *extra)


def test_every_run_config_is_typed():
    for name in choices("run"):
        assert to_run(compose("config", [f"run={name}"])).time_limit > 0


@pytest.mark.parametrize("experiment", choices("experiment"))
def test_every_experiment_composes_and_all_that_it_sweeps_makes_a_cell(experiment):
    config = compose("config", [f"experiment={experiment}"], return_hydra_config=True)
    assert config.experiment_name == experiment
    given = [f"{name}={values}" for name, values in config.hydra.sweeper.params.items()]
    swept = [
        [f"{name.key_or_group}={value}" for value in _values(name)]
        for name in OverridesParser.create().parse_overrides(given)
    ]
    first = [f"experiment={experiment}", *(values[0] for values in swept)]
    for i, values in enumerate(swept):
        for value in values:
            assert cell(*first[: i + 1], value, *first[i + 2 :])


def _values(override: Override) -> list[str]:
    return list(override.sweep_string_iterator()) if override.is_sweep_override() else [override.get_value_string()]


def test_every_method_is_an_option_with_its_own_defaults():
    for name, cls in METHODS.items():
        assert cell(f"method={name}").method == cls()


def test_a_method_option_changes_label_and_identity():
    plain, changed = cell("method=gptq"), cell("method=gptq", "method.act_order=true")
    assert changed.method.act_order is True
    assert (plain.labels["method"], changed.labels["method"]) == ("gptq", "gptq act_order=true")
    assert plain.as_dict() != changed.as_dict()


def test_a_variant_is_its_method_with_options():
    assert cell("method=hawq_v2_gptq").method == cell("method=hawq_v2", "method.rounding=gptq").method


def test_a_cell_survives_json():
    original = cell("method=hawq_v2", "budget=b3.25", "model=tiny_outliers", "method.bits=[2,4]")
    assert cell_from_dict(json.loads(json.dumps(original.as_dict()))) == original


def test_named_budgets():
    budgets = named_budgets()
    assert budgets["w3g32"] == Budget(bits=3, group_size=32)
    assert budgets["w8channel"] == Budget(bits=8, group_size=0)
    assert budgets["b3.25"] == Budget(effective_bits=3.25)
    assert cell("budget=b3.25").budget == budgets["b3.25"]
    assert all(b.name == name or b.effective_bits for name, b in budgets.items())


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["+method.clipp=1"], r"unknown option method\.clipp: did you mean clip\?"),
        (["+data.lenght=5"], r"unknown option data\.lenght: did you mean length\?"),
        (["budget.bits=9"], r"budget\.bits=9 is outside 2 to 8"),
        (["budget.bits=1"], r"outside 2 to 8"),
        (["budget.group_size=-3"], r"group_size=-3 is not positive"),
        (["budget.effective_bits=3"], r"names one of budget\.bits, .*, not bits and effective_bits"),
        (["data.length=1"], r"data\.length=1"),
        (["method=hawq_v2", "method.rounding=gptqq"], r"unknown rounding 'gptqq': did you mean gptq\?"),
    ],
)
def test_bad_values_are_refused_with_the_remedy(overrides, message):
    with pytest.raises(ValueError, match=message):
        cell(*overrides)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["method=gptqq"], "unknown method 'gptqq': did you mean gptq?"),
        (
            ["method=gptq", "method.act_oder=true"],
            "unknown option 'method.act_oder': did you mean act_order?",
        ),
        (["methd=gptq"], "unknown option 'methd': did you mean method?"),
        (["budget=w9g128"], "unknown budget 'w9g128': did you mean"),
        (["method=gptq", "method.damping=abc"], "method.damping=abc"),
        (["model=local", "model.path=nowhere"], "nowhere"),
        (["data=text", "data.path=nowhere.txt"], "nowhere.txt"),
    ],
)
def test_the_command_line_answers_in_one_sentence(arguments, message):
    done = subprocess.run(
        [sys.executable, "-m", "harness", *arguments], capture_output=True, text=True, cwd=ROOT, timeout=60
    )
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert len(done.stderr.strip().splitlines()) <= 3


def test_options_of_a_part_need_no_plus_sign():
    mixed = cell("method=mixed", "method.metric=hutchinson", "method.metric_options.tolerance=0.5")
    assert mixed.method.sensitivity().tolerance == 0.5
    assert cell_from_dict(json.loads(json.dumps(mixed.as_dict()))) == mixed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["metrics=[hutchinsen]"], "unknown sensitivity metric 'hutchinsen': did you mean hutchinson?"),
        (["metricss=all"], "unknown option 'metricss': did you mean metrics?"),
        (["options.kfac.sequence=1"], "unknown option 'options.kfac.sequence': did you mean sequences"),
    ],
)
def test_the_sensitivity_command_answers_in_one_sentence(arguments, message):
    command = [sys.executable, "-m", "harness.sensitivity", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert message in done.stdout
    assert not done.stderr
