"""The text that language models are measured on: Python's own documentation, the same on every machine of a version."""

from __future__ import annotations

from pydoc_data.topics import topics

MEASURED = 60_000  # characters, the first ones


def learnt_and_measured() -> tuple[str, str]:
    """(what calibration and training may read, what perplexity is measured on): two parts that share nothing."""
    text = " ".join(topics[name] for name in sorted(topics))
    return text[MEASURED:], text[:MEASURED]
