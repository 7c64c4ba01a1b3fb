"""The one place where text becomes HTML: whatever is not marked as HTML already is escaped as it enters a page."""

from __future__ import annotations

import string
from collections.abc import Iterable
from html import escape
from typing import Any


class Html(str):
    """A piece of a page: text that is HTML already, and is not escaped again."""


class _Escaping(string.Formatter):
    def format_field(self, value: Any, spec: str) -> str:
        return value if isinstance(value, Html) and not spec else escape(format(value, spec))


_escaping = _Escaping()


def html(template: str, **values: Any) -> Html:
    """The piece that ``template`` (a literal, as of ``str.format``) makes of ``values``, each of them escaped."""
    return Html(_escaping.vformat(template, (), values))


def joined(parts: Iterable[str], between: str = "") -> Html:
    """The ``parts`` one after the other, those that are no HTML escaped."""
    return Html(between.join(part if isinstance(part, Html) else escape(part) for part in parts))
