"""The policy-gradient algorithms: what each of them is made of.

All are one loss over the tokens that count,

    sum_t w_t (l_t + kl_coef KL_t - entropy_coef H_t)

and differ in the advantages A, in how l_t takes the ratio to the policy that sampled, and in the
weights w_t. Each l_t has its one definition in `fastrl.reference`.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Algorithm:
    """One row of the table below.

    Attributes:
        advantage: an estimator of `fastrl.group_advantages`, which compares a completion's reward
            with those of the same prompt's others; or "returns": a token's discounted rewards to
            the end, less `PolicyGradientConfig.baseline`.
        loss: "policy_gradient": -log pi A, for one gradient step on a rollout;
            "ppo": the clipped surrogate with each token's ratio, or with "ppo_sequence" its
            sequence's; "cispo": -log pi A times the ratio, clipped and detached, so that every
            token keeps its gradient.
        reduction: of `fastrl.policy_gradient_loss`; or "token_sum": over completions times
            max_new_tokens, a constant, so that a token weighs the same in every completion.
        clip_low, clip_high: distance of the ratio's bounds from 1.
        mask_truncated: completions that reached max_new_tokens are not learned from.
    """

    advantage: str
    loss: str
    reduction: str
    clip_low: float = 0.2
    clip_high: float = 0.2
    mask_truncated: bool = False


ALGORITHMS = {
    # Williams 1992, Machine Learning 8
    "reinforce": Algorithm("returns", "policy_gradient", "token_mean"),
    # Ahmadian et al. 2024, arXiv:2402.14740
    "rloo": Algorithm("rloo", "ppo", "sequence_mean_token_sum"),
    # Shao et al. 2024, arXiv:2402.03300
    "grpo": Algorithm("grpo", "ppo", "sequence_mean"),
    # Liu et al. 2025, arXiv:2503.20783
    "dr_grpo": Algorithm("dr_grpo", "ppo", "token_sum"),
    # Yu et al. 2025, arXiv:2503.14476
    "dapo": Algorithm("grpo", "ppo", "token_mean", clip_high=0.28, mask_truncated=True),
    # Zheng et al. 2025, arXiv:2507.18071
    "gspo": Algorithm("grpo", "ppo_sequence", "sequence_mean", clip_low=3e-4, clip_high=4e-4),
    # MiniMax 2025, arXiv:2506.13585: no bound from below, as they train
    "cispo": Algorithm("grpo", "cispo", "token_mean", clip_low=1.0, clip_high=4.0),
}
