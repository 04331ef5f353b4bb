"""Methods and tuners by name: what is read from their sources is what the classes say; others bring their own."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import pytest

from holdfast import methods, tuners
from holdfast.api.declared import DeclaredClass, Page, Source, Unreadable
from holdfast.api.method import Method
from holdfast.api.registry import Registry
from holdfast.api.tuner import Tuner
from holdfast.config.section import Named
from holdfast.errors import ConfigError
from holdfast.methods import METHODS
from holdfast.tuners import TUNERS
from support.installed import install

OTHERS = '''
from holdfast.api.method import Method
from holdfast.api.registry import Registry
from holdfast.config.section import Section
from holdfast.tuners.full import Full


class Halves(Full):
    """Train half of the weights."""

    name = "halves"

    class Options(Section):
        share: float = 0.5


class Noise(Method):
    """Adds noise."""

    name = "noise"
'''
GROUPS = {
    "holdfast.tuners": {"halves": "others:Halves"},
    "holdfast.methods": {"other-name": "others:Noise"},
}


@pytest.fixture
def others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An installed package that registers a tuner and a method."""
    for base in (Method, Tuner):
        monkeypatch.setattr(base, "registry", dict(base.registry))
    monkeypatch.delitem(sys.modules, "others", raising=False)
    monkeypatch.syspath_prepend(install(tmp_path, "others", OTHERS, GROUPS))
    return tmp_path


@pytest.mark.parametrize(
    ("registry", "name"), [(registry, name) for registry in (METHODS, TUNERS) for name in sorted(registry.own)]
)
def test_a_source_says_what_the_class_says(registry, name):
    assert registry.own[name].page() == Page.of(registry.find(name))


def test_nothing_of_holdfast_is_missing_among_the_sources():
    for registry in (METHODS, TUNERS):
        classes = {name for name, cls in registry.known().items() if cls.__module__.startswith("holdfast.")}
        assert classes == set(registry.own)


def test_what_an_installed_package_registers_is_imported_once_it_is_named(others: Path):
    assert "halves" in TUNERS.names() and "others" not in sys.modules
    assert tuners.build(Named(name="lora")).name == "lora" and "others" not in sys.modules
    TUNERS.check("halves", {"share": 1})
    assert "others" not in sys.modules
    assert tuners.build(Named(name="halves", share=0.25)).options.share == 0.25
    assert "halves" in tuners.known() and TUNERS.page("halves").options == [("share", "0.5", "")]


def test_an_installed_package_may_register_under_another_name(others: Path):
    assert methods.find("noise").__module__ == "others"
    assert "noise" in [page.name for page in METHODS.pages()]
    with pytest.raises(ConfigError, match="there is no method 'nois'; did you mean 'noise'"):
        methods.find("nois")


def test_a_package_that_cannot_be_imported_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    groups = {"holdfast.tuners": {"broken": "broken_package:Broken"}}
    monkeypatch.syspath_prepend(install(tmp_path, "broken_package", "import no_such_module", groups))
    assert tuners.find("lora").name == "lora"
    with pytest.raises(ConfigError, match=r"holdfast\.tuners: broken_package registers 'broken'.*no_such_module"):
        tuners.find("broken")


def test_two_packages_cannot_register_the_same_name(others: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    folder = install(tmp_path / "more", "more", OTHERS, {"holdfast.tuners": {"halves": "more:Halves"}})
    monkeypatch.syspath_prepend(folder)
    with pytest.raises(ConfigError, match=r"(others|more):Halves and (others|more):Halves are both registered"):
        tuners.find("halves")
    assert tuners.find("lora").name == "lora"


def test_without_sources_the_modules_are_imported(monkeypatch: pytest.MonkeyPatch):
    def absent(module: str) -> Source:
        raise Unreadable(module)

    monkeypatch.setattr("holdfast.api.registry.read", absent)
    compiled = Registry(Method, "holdfast.methods")
    assert not compiled.own and compiled.find("ewc") is METHODS.find("ewc")
    assert compiled.page("ewc") == METHODS.page("ewc")
    with pytest.raises(ConfigError, match="there is no method 'ewcc'; did you mean 'ewc'"):
        compiled.check("ewcc", {})


def test_an_unknown_name_or_option_is_refused_with_the_near_one():
    with pytest.raises(ConfigError, match="tuner: there is no tuner 'lroa'; did you mean 'lora'"):
        TUNERS.check("lroa", {})
    with pytest.raises(ConfigError, match="method ewc: strenght: unknown key; did you mean 'strength'"):
        METHODS.check("ewc", {"strenght": 3})
    with pytest.raises(ConfigError, match="method ewc: strenght: unknown key; did you mean 'strength'"):
        methods.find("ewc")(strenght=3)  # the class says the same
    TUNERS.check("lora", {"use_qalora": True})  # any field of PEFT's configuration may be given


def declared(text: str) -> DeclaredClass:
    return Source("holdfast.methods.written", ast.parse(text)).classes()[-1]


HEAD = """
from holdfast.api import Method, Section
from pydantic import Field
DEFAULTS = {"weight": 2.0}

class Written(Method):
    \"\"\"What is written.\"\"\"

    name = "written"
    not_with = dict.fromkeys(("ewc", "si"), "no") | {"mas": "never"}
"""


def test_constants_and_other_defaults_are_read():
    text = (
        HEAD
        + """
    class Options(Section):
        weight: float = Field(1.0, gt=0, description="of the term, "
                              "in all")
        path: str = Field(description="of texts")
        counted: ClassVar[int] = 3

class Heavier(Written):
    name = "heavier"
    Options = preset(**DEFAULTS, path="there")
"""
    )
    page = declared(text).page()
    assert page.name == "heavier" and page.doc == "What is written." and page.facts["default_tuner"] == "lora"
    assert page.facts["not_with"] == {"ewc": "no", "si": "no", "mas": "never"}
    assert page.options == [("weight", "2.0", "of the term, in all"), ("path", '"there"', "of texts")]
    assert not page.open


@pytest.mark.parametrize(
    "options",
    [
        "    class Options(Section):\n        weight: float = Field(default_factory=float)",
        "    class Options(Section):\n        weight: float = 1.0 + EPSILON",
        "    class Options(Elsewhere):\n        weight: float = 1.0",
        "    Options = [Section][0]",
        "    class Options(Section):\n        words: set[str] = Field({'a'}, description='of it')",
    ],
)
def test_what_is_no_literal_is_left_to_an_import(options: str):
    with pytest.raises(Unreadable):
        print(declared(HEAD + options).page())


def test_a_page_that_cannot_be_read_is_that_of_the_class(monkeypatch: pytest.MonkeyPatch):
    def unreadable(self: DeclaredClass) -> Page:
        raise Unreadable

    monkeypatch.setattr(DeclaredClass, "page", unreadable)
    assert METHODS.page("ewc") == Page.of(methods.find("ewc"))
