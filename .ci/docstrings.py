"""Docstrings as Markdown, for mkdocstrings: a reference such as :class:`Method` becomes code."""

from __future__ import annotations

import re

import griffe

ROLE = re.compile(r":(?:class|func|meth|data|attr|mod|exc):`~?([^`]+)`")


class Roles(griffe.Extension):
    """Replaces the roles of reStructuredText in every docstring that is read."""

    def on_object(self, *, obj: griffe.Object, **_: object) -> None:
        """Called for each module, class, function and attribute."""
        if obj.docstring:
            obj.docstring.value = ROLE.sub(r"`\1`", obj.docstring.value)
