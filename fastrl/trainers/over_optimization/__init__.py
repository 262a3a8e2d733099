"""An alarm for the moment when the reward that is learned from and the true one part."""

from fastrl.trainers.over_optimization.monitor import OverOptimizationMonitor
from fastrl.trainers.over_optimization.sequential_test import PartingTest, Verdict

__all__ = ["OverOptimizationMonitor", "PartingTest", "Verdict"]
