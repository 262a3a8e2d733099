"""The inputs of each op's cases, what they count, and what is right in float64."""

from bench.workloads import attention, decode_attention, linear, returns, token_logprobs

WORKLOADS = {
    **returns.WORKLOADS,
    **token_logprobs.WORKLOADS,
    **linear.WORKLOADS,
    **attention.WORKLOADS,
    **decode_attention.WORKLOADS,
}
