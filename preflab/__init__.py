"""Preference optimisation of language models: `from preflab import train, evaluate`."""

from typing import Any

__all__ = ["Result", "evaluate", "train"]


def __getattr__(name: str) -> Any:
    """Import the Python entry when it is used: most of the package works without torch."""
    if name in __all__:
        from preflab import api

        return getattr(api, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
