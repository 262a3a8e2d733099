"""Reward models of preferences: Bradley-Terry on pairs, with a value for every token."""

from fastrl.rewards.preference.calibration import Calibration, calibrate
from fastrl.rewards.preference.config import PreferenceConfig
from fastrl.rewards.preference.cross_validation import CrossValidation, cross_validate
from fastrl.rewards.preference.ensemble import PreferenceEnsemble
from fastrl.rewards.preference.evaluation import evaluate_preferences
from fastrl.rewards.preference.model import PreferenceModel
from fastrl.rewards.preference.reward import PreferenceReward
from fastrl.rewards.preference.training import PreferenceResult, train_preference_model

__all__ = [
    "Calibration",
    "CrossValidation",
    "PreferenceConfig",
    "PreferenceEnsemble",
    "PreferenceModel",
    "PreferenceResult",
    "PreferenceReward",
    "calibrate",
    "cross_validate",
    "evaluate_preferences",
    "train_preference_model",
]
