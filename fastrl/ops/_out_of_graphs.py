"""`linear_token_loss` where Dynamo may look on, which cannot trace it.

In a file of its own: torch.compiler.disable imports Dynamo, which takes more than a second.
"""

from typing import Any

import torch
from torch import Tensor

from fastrl.ops.linear_token_loss import _LinearTokenLoss


@torch.compiler.disable
def linear_token_loss(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    return _LinearTokenLoss.apply(*arguments)
