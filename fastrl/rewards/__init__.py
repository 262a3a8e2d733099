"""Rewards: functions of a completion, one number per token or per completion."""

from fastrl.rewards.continuation import ContinuationReward
from fastrl.rewards.token_bytes import byte_level_token_bytes

__all__ = ["ContinuationReward", "byte_level_token_bytes"]
