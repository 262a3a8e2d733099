"""Rewards: functions of a completion, one number per token or per completion.

Metrics: BLEU, ChrF, ROUGE, TER, DistinctN, Repetition, LengthReward, FormatReward, and any
  function of text and references as MetricReward; each also as its rise from token to token
  (immediate=True); ContinuationReward from token to token alone, BERTScore for the whole alone
People: HumanReward, FileRatings; preference models: PreferenceReward and the training behind it
Elsewhere: HTTPReward, ChatJudge
Intrinsic: CountNovelty, PredictionError
Made of others: WeightedSum, NormalizedSum, Minimum, Product, Clipped, Scaled, RunningNormalized,
  with StepSchedule and SaturationSchedule as weights; PotentialShaping
"""

from fastrl.rewards.agreement import agreement_share, cohens_kappa, krippendorffs_alpha
from fastrl.rewards.bert_score import BERTScore
from fastrl.rewards.bleu import BLEU
from fastrl.rewards.chat_judge import ChatJudge
from fastrl.rewards.chrf import ChrF
from fastrl.rewards.composition import (
    Clipped,
    Minimum,
    NormalizedSum,
    Product,
    RunningNormalized,
    SaturationSchedule,
    Scaled,
    StepSchedule,
    WeightedSum,
)
from fastrl.rewards.continuation import ContinuationReward
from fastrl.rewards.diversity import DistinctN, Repetition
from fastrl.rewards.file_ratings import FileRatings
from fastrl.rewards.format import FormatReward
from fastrl.rewards.http_reward import HTTPReward
from fastrl.rewards.human import HumanReward
from fastrl.rewards.length import LengthReward
from fastrl.rewards.metric import Metric, MetricReward
from fastrl.rewards.novelty import CountNovelty
from fastrl.rewards.prediction_error import PredictionError
from fastrl.rewards.preference import (
    Calibration,
    CrossValidation,
    PreferenceConfig,
    PreferenceEnsemble,
    PreferenceModel,
    PreferenceResult,
    PreferenceReward,
    calibrate,
    cross_validate,
    evaluate_preferences,
    train_preference_model,
)
from fastrl.rewards.rouge import ROUGE
from fastrl.rewards.shaping import PotentialShaping
from fastrl.rewards.ter import TER
from fastrl.rewards.token_bytes import byte_level_token_bytes
from fastrl.rewards.token_pieces import TokenPieces

__all__ = [
    "BERTScore",
    "BLEU",
    "Calibration",
    "ChatJudge",
    "ChrF",
    "Clipped",
    "ContinuationReward",
    "CountNovelty",
    "CrossValidation",
    "DistinctN",
    "FileRatings",
    "FormatReward",
    "HTTPReward",
    "HumanReward",
    "LengthReward",
    "Metric",
    "MetricReward",
    "Minimum",
    "NormalizedSum",
    "PotentialShaping",
    "PredictionError",
    "PreferenceConfig",
    "PreferenceEnsemble",
    "PreferenceModel",
    "PreferenceResult",
    "PreferenceReward",
    "Product",
    "ROUGE",
    "Repetition",
    "RunningNormalized",
    "SaturationSchedule",
    "Scaled",
    "StepSchedule",
    "TER",
    "TokenPieces",
    "WeightedSum",
    "agreement_share",
    "byte_level_token_bytes",
    "calibrate",
    "cohens_kappa",
    "cross_validate",
    "evaluate_preferences",
    "krippendorffs_alpha",
    "train_preference_model",
]
