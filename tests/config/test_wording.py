"""A value that cannot be used gets one line, in the words of YAML, with its key and what would be right."""

from __future__ import annotations

from typing import get_args

import pytest

from holdfast.config.evaluation import GeneralConfig
from holdfast.config.reading import load, read_yaml
from holdfast.config.run import RunConfig, load_config
from holdfast.config.section import Section, section_of
from holdfast.errors import ConfigError, did_you_mean
from holdfast.methods import build

SMALLEST = {"model": "m", "stream": "trace", "output": "o"}

REFUSED = {
    "seed=yes": "seed: must be a whole number, not true",
    "training.batch_size=true": "training.batch_size: must be a whole number, not true",
    "training.epochs=true": "training.epochs: must be a number, not true",
    "training.epochs=[true,1]": "training.epochs: must be a number, not true",
    "gate.max_forgetting=true": "gate.max_forgetting: must be a number, not true",
    "training.epochs=one": "training.epochs: must be a number or a list of numbers, not 'one'",
    "training.epochs=": "training.epochs: must be a number or a list of numbers, not null",
    "training.epochs=[1,x]": "training.epochs.1: must be a number, not 'x'",
    "method=": "method: must be a name or a section, such as {name: ...}, not null",
    "method=[replay,null]": "method.1: must be a name or a section, such as {name: ...}, not null",
    "method={ratio: 3}": "method.name: is required but absent",
    "tuner=[lora]": "tuner: must be a name or a section, such as {name: ...}, not ['lora']",
    "keep=2%": "keep: must be a section, such as {general: 2%}, not '2%'",
    "stream=[3]": "stream.tasks.0: must be a section, such as {name: july, path: july.jsonl}, not 3",
    "stream.order=[null]": "stream.order: must be names of tasks, not [null]",
    "gate.on_fail=no": "gate.on_fail: must be 'stop', 'rollback' or 'continue', not false",
    "training.arguments=3": "training.arguments: must be a mapping of keys to values, not 3",
    "learning_rate=3": "learning_rate: unknown key; did you mean 'training.learning_rate'?",
    "training.max_length=3": "training.max_length: unknown key; did you mean 'data.max_length'?",
    "training.epoch=3": "training.epoch: unknown key; did you mean 'epochs'?",
    "keep.tasks=2": "keep.tasks: no probability falls by 2; two in a hundred are 0.02 of the mean probability of the "
    "answers, or 2% more of their loss",
    "keep.general=0": "keep.general: a budget must be above 0, as 0.5% is; 0.0 leaves no room to learn",
    "gate.max_forgetting=500%": "gate.max_forgetting: a share of a score must be from 0% to 100%, not 500%",
    "gate.max_forgetting=-1": "gate.max_forgetting: what may be lost at most must be 0 or more, such as 5%, not -1",
    "gate.max_general_loss_increase=-2%": "gate.max_general_loss_increase: what may be lost at most must be 0 or "
    "more, such as 5%, not -2%",
    "gate.min_average=101%": "gate.min_average: a share of a score must be from 0% to 100%, not 101%",
}


def test_a_list_with_too_few_entries():
    with pytest.raises(ConfigError, match=r"alpha: must have at least 2 entries, not \[0\.5\]"):
        build([("wise_ft", {"alpha": [0.5]})])


def test_a_name_in_other_letters_is_suggested():
    assert did_you_mean("OSF", ["clora", "osf", "lines"]) == "; did you mean 'osf'?"


@pytest.mark.parametrize("override", REFUSED)
def test_one_line_says_what_would_be_right(override):
    with pytest.raises(ConfigError) as told:
        load_config(SMALLEST, [override])
    assert str(told.value) == f"the configuration: {REFUSED[override]}"


@pytest.mark.parametrize(
    "override",
    ["keep.tasks=0.02", "keep.tasks=200%", "keep.general=2", "gate.max_general_loss_increase=500%",
     "gate.min_average=7", "gate.max_forgetting=2", "gate.min_learned=-5%", "gate.max_general_drop=0",
     "training.epochs=[1, 0.5]"],
)  # fmt: skip
def test_what_a_loss_or_a_share_may_need_is_accepted(override):
    load_config(SMALLEST, [override])


def test_true_is_no_number_in_any_key_of_any_section():
    below = [section_of(field.annotation) for field in RunConfig.model_fields.values()]
    numbers = [
        (section, key)
        for section in [RunConfig, GeneralConfig, *filter(None, below)]
        for key, field in section.model_fields.items()
        if {int, float} & {field.annotation, *get_args(field.annotation)}
    ]
    assert len(numbers) > 25
    for section, key in numbers:
        with pytest.raises(ConfigError, match=rf"{key}: must be a (whole )?number, not true"):
            load(section, {key: True})


def test_options_of_a_method_are_told_alike():
    for weight, said in (("dyn", "must be a number or 'dynamic', not 'dyn'"), (True, "must be a number, not true")):
        with pytest.raises(ConfigError, match=f"^method gere_ce: weight: {said}$"):
            build([("gere_ce", {"path": "x", "weight": weight})])


def test_a_section_without_an_example():
    class Inner(Section):
        key: int = 1

    class Outer(Section):
        inner: Inner = Inner()

    with pytest.raises(ConfigError, match=r"^the configuration: inner: must be a section of keys and values, not 3$"):
        load(Outer, {"inner": 3})


def test_a_file_that_is_no_mapping(tmp_path):
    for text, said in (("", "is empty; it must hold keys"), ("- true\n- a\n", r"not \[true, 'a'\]$")):
        (tmp_path / "c.yaml").write_text(text)
        with pytest.raises(ConfigError, match=said):
            read_yaml(tmp_path / "c.yaml")
