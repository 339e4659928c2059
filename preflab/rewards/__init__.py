"""Rewards that score samples. Importing this package registers all of them."""

from preflab.rewards import arithmetic, d2po, http_client, llm_rater, models, text  # noqa: F401
from preflab.rewards.registry import RewardError, Score, build_rewards, register_reward

__all__ = ["RewardError", "Score", "build_rewards", "register_reward"]
