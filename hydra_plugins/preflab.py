"""The sweepers and the launcher of preflab.sweeps, where hydra looks for plugins.

Hydra imports this module at every start; what takes time to import stays inside functions.
"""

from hydra.plugins.launcher import Launcher

from preflab.sweeps.grid import Grids
from preflab.sweeps.pool import Pool
from preflab.sweeps.search import OptunaSearch


class GridSweeper(Grids):
    """`hydra/sweeper=grid`, the default."""


class OptunaSweeper(OptunaSearch):
    """`hydra/sweeper=optuna`"""


class LocalLauncher(Pool, Launcher):
    """`hydra/launcher=local`"""
