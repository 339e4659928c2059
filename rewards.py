"""The names that a file with your own rewards imports: `from rewards import register_reward`."""

from preflab.readers.messages import Chat
from preflab.rewards import RewardError, Score, register_reward

__all__ = ["Chat", "RewardError", "Score", "register_reward"]
