"""A task's `input:` is searched for in bounded time, and means what Python's own engine takes it for."""

from __future__ import annotations

import re

import pytest

from holdfast.config.pattern import check_pattern, group_span
from holdfast.errors import ConfigError


@pytest.mark.parametrize("pattern", ["((?:a+)+$)", "(^(?:a|aa)+$)", "(.*)*.*.*.*.*.*x$", "((?:a?){40}a{40}b)"])
def test_a_search_without_an_end_is_stopped(pattern):
    if "(.*)" in pattern:
        pattern = pattern.replace("(.*)*", "((?:.*)*)")
    check_pattern(pattern)
    try:
        assert group_span(pattern, "a" * 60 + "c") is None  # the engine may see at once that there is no match
    except ConfigError as told:
        assert "finds no end" in str(told)


def test_a_search_that_never_ends_names_pattern_and_prompt():
    with pytest.raises(ConfigError, match=r"input: '\(.*' finds no end on a prompt of 41 characters \('aaaa"):
        group_span(r"((?:a|a)*\d)$", "a" * 40 + "!")


@pytest.mark.parametrize(
    ("pattern", "text"),
    [
        (r"Question: (.*?)\n", "a Question: what?\nb"),
        (r"(?s)<(.*)>", "x<a\nb>c>"),
        (r"\d{4}-(\d{2})-\d{2}", "on 2024-05-06"),
        (r"[^]({]+([]x]{1,3})", "ab]]x"),
        (r"(?i)TEXT: (.+)$", "text: ä ß"),
        (r"a(b)?", "xa"),
        (r"\((.{0,500})\)", "f(x) (y)"),
    ],
)
def test_it_finds_what_re_finds(pattern, text):
    check_pattern(pattern)
    found = re.search(pattern, text)
    assert found is not None and group_span(pattern, text) == found.span(1)
    assert group_span(pattern, "") is None


@pytest.mark.parametrize(
    ("pattern", "said"),
    [
        ("(", "is no regular expression"),
        ("a", "exactly one group"),
        ("(a)(b)", "exactly one group"),
        ("(?:(?:(?:a{99}){99}){99}){99}(b)", "parts with its repetitions written out"),
        ("(a{4294967296})", "parts with its repetitions"),
        ("(" + "(?:" * 5000 + "a" + ")" * 5001, "is no regular expression"),
        (r"(\p{L})", "is no regular expression"),
    ],
)
def test_what_is_refused(pattern, said):
    with pytest.raises(ValueError, match=said) as told:
        check_pattern(pattern)
    assert len(str(told.value)) < 400
