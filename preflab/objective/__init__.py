"""What is optimised: the inputs of a loss, and the registry of losses."""

from preflab.objective.registry import BoundLoss, bind_loss, register_loss
from preflab.objective.types import LossOutput, Pair, Target

__all__ = ["BoundLoss", "LossOutput", "Pair", "Target", "bind_loss", "register_loss"]
