"""The registry of trainers. A trainer is a class with a loop, a `placement` and a `place`."""

from pathlib import Path

from preflab.modeling.parallelism import Placement
from utils import ConfigError, load_module, nearest

TRAINERS: dict[str, type] = {}


def register_trainer(cls: type) -> type:
    """Register a trainer class under its name, for `trainer=NAME`."""
    TRAINERS[cls.__name__] = cls
    return cls


def find_trainer(name: str) -> type:
    """The trainer class of `trainer=name`.

    name: a registered name, or `my_module.MyTrainer` or `path/to/file.py:MyTrainer` for your own
    class. Raises ConfigError for an unknown name, and for a class without a placement.
    """
    if name in TRAINERS:
        return TRAINERS[name]
    module, separator, cls_name = str(name).rpartition(":" if ".py:" in str(name) else ".")
    if not separator:
        raise ConfigError(
            f"trainer={name}; {nearest(str(name), TRAINERS)}; or my_module.MyTrainer or"
            " path/to/file.py:MyTrainer for your own class"
        )
    loaded = load_module(module, "trainer")
    cls = getattr(loaded, cls_name, None)
    if cls is None:
        raise ConfigError(f"trainer={name}: {Path(module).name} has no class {cls_name}")
    if not isinstance(getattr(cls, "placement", None), Placement):
        raise ConfigError(
            f"trainer={name}: {cls_name} declares no placement; derive it from"
            " trainers.BasicTrainer and set placement = Placement(...)"
        )
    return cls
