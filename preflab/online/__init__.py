"""Online learning: rounds, labelers, the ledger of bought labels, and the service."""

from preflab.online import selections  # noqa: F401  registers them
from preflab.online.selection import Pool, register_selection

__all__ = ["Pool", "register_selection"]
