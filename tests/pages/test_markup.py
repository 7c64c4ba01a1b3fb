"""Text is escaped in one place, and nothing goes past it."""

import ast
from pathlib import Path

import pytest

import gaugekit
from gaugekit.pages.document import document, figure, section, table
from gaugekit.pages.markup import Html, html, joined

WILD, TAME = "<b title='x'>&", "&lt;b title=&#x27;x&#x27;&gt;&amp;"
PACKAGE = Path(gaugekit.__file__).parent
FILES = [*(PACKAGE / "pages").glob("*.py"), *(PACKAGE / "demo").glob("*.py"), PACKAGE / "rank" / "page.py"]


def test_values_are_escaped_and_html_is_not():
    assert html("<p>{text} {number:,}</p>", text=WILD, number=1234) == f"<p>{TAME} 1,234</p>"
    assert html("{piece}", piece=Html("<i>")) == "<i>" and joined([Html("<i>"), "<i>"]) == "<i>&lt;i&gt;"
    assert html("{row[name]}", row={"name": WILD}) == TAME
    assert isinstance(html("{piece}", piece="x"), Html)


@pytest.mark.parametrize("make", [
    lambda text: document(text, Html("<h1></h1>")),
    lambda text: section(text, text),
    lambda text: figure(text, Html("<svg/>"), text),
    lambda text: table([text], [[text]], "0"),
])  # fmt: skip
def test_what_a_page_is_put_together_from_escapes_its_words(make):
    page = make(WILD)
    assert WILD not in page and TAME in page


@pytest.mark.parametrize("path", FILES, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_templates_are_literals(path):
    """``html`` and ``Html`` trust what they are given: a string that was put together first would go past them."""
    for node in ast.walk(ast.parse(path.read_text())):
        if (
            isinstance(node, ast.Call)
            and isinstance(node.func, ast.Name)
            and node.func.id in ("html", "Html")
        ):
            if path.name in ("markup.py", "document.py"):
                continue
            assert not any(
                isinstance(part, ast.JoinedStr) for argument in node.args for part in ast.walk(argument)
            )
