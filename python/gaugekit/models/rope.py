"""What a config says of rotary positions: today in ``rope_parameters``, before in ``rope_scaling`` and beside them."""

from __future__ import annotations


def base(
    config: dict, default: float = 10_000.0, older: str = "rope_theta", kind: str | None = None
) -> float:
    """The base of the angles; ``older`` names the entry that older files have, ``kind`` the kind of layer where the
    parameters stand by kind ("sliding_attention", ...).
    """
    return float(_parameters(config, kind).get("rope_theta") or config.get(older) or default)


def channels(config: dict, width: int, default: float, older: str = "partial_rotary_factor") -> int:
    """How many of the ``width`` channels of a head turn; ``default`` is the family's share of them.

    Raises ValueError where the config's share is no even number of channels.
    """
    share = _parameters(config).get("partial_rotary_factor", config.get(older, default))
    rotary = int(width * share)
    check(rotary, width, older)
    return rotary


def check(rotary: int, width: int, entry: str) -> None:
    """ValueError, naming ``entry``, unless ``rotary`` is an even number from 0 to ``width``."""
    if rotary % 2 or not 0 <= rotary <= width:
        raise ValueError(f"{entry}: expected an even number of {width} channels, got {rotary}")


def _parameters(config: dict, kind: str | None = None) -> dict:
    parameters = config.get("rope_scaling") or config.get("rope_parameters") or {}
    return parameters.get(kind) or parameters
