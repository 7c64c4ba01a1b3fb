"""What every report page is put together from: the document, sections, figures, tables. All take and give HTML."""

from __future__ import annotations

from gaugekit.pages.style import STYLE


def document(name: str, header: str, *body: str) -> str:
    """One self-contained page about ``name``: no script, no font, no picture from anywhere else."""
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>gaugekit report: {name}</title>
<style>{STYLE}</style>
</head>
<body>
<main>
<header>
<p class="eyebrow">gaugekit report</p>
{header}
</header>
{"".join(body)}
</main>
</body>
</html>
"""


def section(heading: str, *parts: str) -> str:
    return f"<section>\n<h2>{heading}</h2>\n{''.join(parts)}\n</section>\n"


def figure(heading: str, drawing: str, caption: str) -> str:
    return f"<figure><h3>{heading}</h3>{drawing}<figcaption>{caption}</figcaption></figure>"


def table(head: list[str], rows: list[list[str]], right: str, total: bool = False) -> str:
    """A table; the columns whose digits are in ``right`` are right-aligned, the last row may be a total."""

    def cells(row: list[str], tag: str) -> str:
        opening = [f'<{tag} class="n">' if str(i) in right else f"<{tag}>" for i in range(len(row))]
        return "".join(f"{start}{cell}</{tag}>" for start, cell in zip(opening, row, strict=True))

    opening = ["<tr>"] * len(rows)
    if total:
        opening[-1] = '<tr class="total">'
    body = "".join(f"{start}{cells(row, 'td')}</tr>" for start, row in zip(opening, rows, strict=True))
    head_row = f"<thead><tr>{cells(head, 'th')}</tr></thead>"
    return f'<div class="scroll" tabindex="0"><table>{head_row}<tbody>{body}</tbody></table></div>'
