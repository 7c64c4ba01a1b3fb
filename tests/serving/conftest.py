"""A model directory of every kind that is served."""

import pytest


@pytest.fixture(scope="session")
def served(tmp_path_factory):
    """{kind: directory} of small models, each with a tokenizer of one letter a token."""
    pytest.importorskip("fastapi")
    from serveable import write

    return write(tmp_path_factory.mktemp("served"))
