"""What is said where transformers is missing, or is a version that these integrations were not tried with."""

from __future__ import annotations

import importlib.metadata


def unfit(module: str, error: ImportError) -> ImportError:
    """The ImportError to raise where ``module`` failed to import a name: it says what is installed, and what fits."""
    try:
        version = importlib.metadata.version("transformers")
    except importlib.metadata.PackageNotFoundError:
        return ImportError(f"{module} needs transformers: pip install gaugekit[hf]")
    return ImportError(
        f"{module} does not fit transformers {version}: {error}; pip install gaugekit[hf] brings a version that does"
    )
