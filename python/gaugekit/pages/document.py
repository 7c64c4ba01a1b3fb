"""What every report page is put together from: the document, sections, figures, tables.

Every argument that is no ``Html`` is escaped (``pages.markup``).
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from gaugekit.pages.markup import Html, html, joined
from gaugekit.pages.style import STYLE


def document(name: str, header: Html, *body: Html) -> Html:
    """One self-contained page about ``name``: no script, no font, no picture from anywhere else."""
    return html(
        """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>gaugekit report: {name}</title>
<style>{style}</style>
</head>
<body>
<main>
<header>
<p class="eyebrow">gaugekit report</p>
{header}
</header>
{body}
</main>
</body>
</html>
""",
        name=name,
        style=Html(STYLE),
        header=header,
        body=joined(body),
    )


def section(heading: str, *parts: str) -> Html:
    return html("<section>\n<h2>{heading}</h2>\n{body}\n</section>\n", heading=heading, body=joined(parts))


def figure(heading: str, drawing: Html, caption: str) -> Html:
    return html(
        "<figure><h3>{heading}</h3>{drawing}<figcaption>{caption}</figcaption></figure>",
        heading=heading,
        drawing=drawing,
        caption=caption,
    )


def table(head: Sequence[str], rows: Sequence[Sequence[str]], right: str, total: bool = False) -> Html:
    """A table; the columns whose digits are in ``right`` are right-aligned, the last row may be a total.

    On a phone each row becomes a block of its own in which every cell stands beside its column's heading.
    """
    kinds = [Html(' class="n"') if str(place) in right else Html("") for place in range(len(head))]
    names = [Html(re.sub("<[^>]*>", "", joined([column]))) for column in head]
    titles = joined(
        html("<th{kind}>{title}</th>", kind=kind, title=title)
        for kind, title in zip(kinds, head, strict=True)
    )
    body = []
    for place, row in enumerate(rows):
        cells = joined(
            html('<td{kind} data-column="{name}"><span>{cell}</span></td>', kind=kind, name=name, cell=cell)
            for kind, name, cell in zip(kinds, names, row, strict=True)
        )
        last = Html(' class="total"') if total and place == len(rows) - 1 else Html("")
        body.append(html("<tr{last}>{cells}</tr>", last=last, cells=cells))
    return html(
        '<div class="scroll" tabindex="0"><table><thead><tr>{titles}</tr></thead><tbody>{body}</tbody></table></div>',
        titles=titles,
        body=joined(body),
    )


def small(text: str) -> Html:
    """A line of explanation under the name in a cell or a tile."""
    return html('<span class="why">{text}</span>', text=text)
