// The one list of ops, and the pybind11 module `fastrl._C`, which tells how it was built.
//
// The list knows nothing of Python; loading the module runs the static registrations.

// torch's own copy of pybind11, which serves where the package is missing, refuses the stable ABI
// before torch 2.13, as if it were torch's API.
#pragma push_macro("TORCH_TARGET_VERSION")
#undef TORCH_TARGET_VERSION
#include <pybind11/pybind11.h>
#pragma pop_macro("TORCH_TARGET_VERSION")

#include <torch/csrc/stable/library.h>
#include <torch/headeronly/version.h>

#include <string>

#include "cpu/kernels.h"
#include "cpu/large_memory.h"

namespace py = pybind11;

namespace fastrl {
#ifdef FASTRL_WITH_CUDA
std::string cuda_architectures();  // csrc/cuda/architectures.cu
#else
std::string cuda_architectures() { return ""; }
#endif
}  // namespace fastrl

#define VISIBLE                                                                       \
  "Tensor? key_start, Tensor? key_end, Tensor? position_ids, Tensor? visible_until, " \
  "Tensor[] schedule, bool causal, float scale, int? window, float? softcap"
#define PATH                                                                  \
  "Tensor? terminated, Tensor? truncated, Tensor? mask, Tensor? cu_seqlens, " \
  "Tensor? gamma_per_step, Tensor? lambda_per_step, float gamma, float gae_lambda"
#define STEPS "Tensor? bootstrap_value, Tensor? next_values, " PATH

STABLE_TORCH_LIBRARY(fastrl, m) {
  m.def(
      "token_logprobs_fwd(Tensor logits, Tensor token_ids, float temperature, int ignore_index, "
      "bool return_entropy, bool inplace_backward) "
      "-> (Tensor logprobs, Tensor entropy, Tensor row_max, Tensor log_total)");
  m.def(
      "token_logprobs_bwd(Tensor? grad_logprobs, Tensor? grad_entropy, Tensor logits, "
      "Tensor token_ids, Tensor logprobs, Tensor? entropy, Tensor row_max, Tensor log_total, float "
      "temperature, "
      "int ignore_index, int vocab_start) -> Tensor");
  m.def(
      "token_logprobs_bwd_(Tensor? grad_logprobs, Tensor? grad_entropy, Tensor(a!) logits, "
      "Tensor token_ids, Tensor logprobs, Tensor? entropy, Tensor row_max, Tensor log_total, float "
      "temperature, "
      "int ignore_index, int vocab_start) -> ()");
  m.def(
      "token_logprobs_state(Tensor logits, Tensor token_ids, float temperature, int ignore_index, "
      "int vocab_start, bool return_entropy) -> Tensor");
  m.def("empty_matrix(Tensor like, int rows, int columns) -> Tensor");
  m.def(
      "linear_token_logprobs_state(Tensor hidden, Tensor weight, Tensor token_ids, Tensor? bias, "
      "float temperature, float? softcap, int ignore_index, int vocab_start, bool return_entropy) "
      "-> Tensor");
  m.def(
      "linear_token_logprobs_fwd(Tensor hidden, Tensor weight, Tensor token_ids, Tensor? bias, "
      "float temperature, float? softcap, int ignore_index, bool return_entropy) "
      "-> (Tensor logprobs, Tensor entropy, Tensor row_max, Tensor log_total)");
  m.def(
      "linear_token_logprobs_frozen(Tensor hidden, Tensor weight, Tensor token_ids, Tensor? bias, "
      "float temperature, float? softcap, int ignore_index, bool return_entropy) "
      "-> (Tensor logprobs, Tensor entropy, Tensor row_max, Tensor log_total, Tensor slope)");
  m.def(
      "linear_token_logprobs_bwd(Tensor? grad_logprobs, Tensor? grad_entropy, Tensor hidden, "
      "Tensor weight, Tensor token_ids, Tensor? bias, Tensor logprobs, Tensor? entropy, "
      "Tensor row_max, Tensor log_total, float temperature, float? softcap, int ignore_index, "
      "int vocab_start, bool needs_hidden, bool needs_weight, bool needs_bias) "
      "-> (Tensor grad_hidden, Tensor grad_weight, Tensor grad_bias)");
  m.def(
      "token_stats(Tensor hidden, Tensor weight, Tensor token_ids, Tensor? bias, float "
      "temperature, "
      "float? softcap, int ignore_index) -> (Tensor logprobs, Tensor entropy, "
      "Tensor log_sum_sq_probs, Tensor mean_logits, Tensor is_top1)");
  m.def(
      "kept_logprobs_fwd(Tensor logits, Tensor token_ids, Tensor kept_ids, Tensor cu_seqlens, "
      "float temperature, int ignore_index, bool return_entropy) "
      "-> (Tensor logprobs, Tensor entropy, Tensor row_max, Tensor log_total)");
  m.def(
      "kept_logprobs_bwd(Tensor? grad_logprobs, Tensor? grad_entropy, Tensor logits, "
      "Tensor token_ids, Tensor kept_ids, Tensor cu_seqlens, Tensor logprobs, Tensor? entropy, "
      "Tensor row_max, Tensor log_total, float temperature, int ignore_index) -> Tensor");
  m.def(
      "sample_tokens(Tensor logits, Tensor seeds, SymInt step, float temperature, int? top_k, "
      "float? top_p) -> (Tensor token_ids, Tensor logprobs, Tensor lowest, Tensor last_id)");
  m.def(
      "kept_ids(Tensor logits, Tensor lowest, Tensor last_id) -> (Tensor ids, Tensor cu_seqlens)");
  // Attention. schedule: PackedLayout.schedule, on a CPU [parts], on a GPU [query_tiles, segments,
  // key_tiles, key_sums]; empty without a layout. An lse is [B, Hq, T], -inf for a query that sees
  // no key. A gradient that is not needed comes back empty. residue: what rounding took from the
  // output, or empty: for the backward pass of a device that would not find it again.
  m.def("attention_fwd(Tensor query, Tensor key, Tensor value, " VISIBLE
        ", bool needs_residue) -> (Tensor output, Tensor lse, Tensor residue)");
  m.def(
      "attention_bwd(Tensor? grad_output, Tensor? grad_lse, Tensor query, Tensor key, Tensor "
      "value, "
      "Tensor output, Tensor lse, Tensor residue, " VISIBLE
      ", bool needs_query, bool needs_key, bool needs_value) "
      "-> (Tensor grad_query, Tensor grad_key, Tensor grad_value)");
  // prefix_cu_rows: the rows of each prefix.
  m.def(
      "decode_attention(Tensor query, Tensor key, Tensor value, Tensor? key_start, "
      "Tensor? key_end, Tensor? prefix_key, Tensor? prefix_value, Tensor? prefix_end, "
      "Tensor? prefix_cu_rows, float scale, int? window, float? softcap) "
      "-> (Tensor output, Tensor lse)");
  // projected: [R, (Hq + 2 Hkv) D], queries, keys and values of a token a row, which becomes key
  // number key_end - 1 of its row of the cache.
  m.def(
      "decode_attention_step(Tensor projected, Tensor cos, Tensor sin, Tensor? query_norm, "
      "Tensor? key_norm, float eps, Tensor rows, Tensor(a!) key, Tensor(b!) value, Tensor key_end, "
      "Tensor prefix_key, Tensor prefix_value, Tensor prefix_end, Tensor prefix_cu_rows, "
      "float scale, int? window, float? softcap) -> Tensor");
  // Returns and advantages. What all of them take after their own tensors, each [..., T] or packed:
  // bootstrap_value, next_values, terminated, truncated, mask, cu_seqlens, gamma and lambda per
  // step (or none, and then the two numbers count).
  m.def("gae(Tensor rewards, Tensor values, " STEPS ") -> (Tensor advantages, Tensor returns)");
  m.def("lambda_returns(Tensor rewards, Tensor values, " STEPS ") -> Tensor");
  m.def("discounted_returns(Tensor rewards, " STEPS ") -> Tensor");
  m.def("n_step_returns(Tensor rewards, Tensor values, " STEPS ", int n) -> Tensor");
  // keep: td_error and carried are what the gradient of log_ratio needs; empty without.
  m.def("vtrace(Tensor rewards, Tensor values, Tensor log_ratio, " STEPS
        ", float rho_clip, float c_clip, bool keep) "
        "-> (Tensor advantages, Tensor value_targets, Tensor td_error, Tensor carried)");
  m.def("retrace_returns(Tensor rewards, Tensor values, Tensor q_values, Tensor log_ratio, " STEPS
        ", float c_clip, bool keep) -> (Tensor returns, Tensor td_error)");
  // The backward passes. grad_rewards decides all others but those of log_ratio and q_values:
  // value_grads makes of it what flows to values (own: through v_t itself, as well as through
  // v_{t+1}), next_values and bootstrap_value. grad_next is given where it is not c_t
  // grad_rewards_t.
  m.def("td_bwd(Tensor? grad_first, Tensor? grad_second, " PATH ") -> Tensor grad_rewards");
  m.def(
      "vtrace_bwd(Tensor? grad_advantages, Tensor? grad_targets, Tensor log_ratio, "
      "Tensor? td_error, Tensor? carried, " PATH
      ", float rho_clip, float c_clip) "
      "-> (Tensor grad_rewards, Tensor grad_log_ratio)");
  m.def("retrace_returns_bwd(Tensor grad, Tensor log_ratio, Tensor? td_error, " PATH
        ", float c_clip, bool needs_q_values) "
        "-> (Tensor grad_rewards, Tensor grad_log_ratio, Tensor grad_q_values)");
  m.def("n_step_returns_bwd(Tensor grad, " PATH
        ", int n) "
        "-> (Tensor grad_rewards, Tensor grad_next)");
  m.def(
      "value_grads(Tensor grad_rewards, Tensor? grad_returns, Tensor? grad_next, bool own, "
      "bool only_at_cuts, bool needs_values, bool has_next_values, " PATH
      ") "
      "-> (Tensor grad_values, Tensor grad_next_values, Tensor grad_bootstrap_value)");
}

namespace {

py::dict build_facts() {
  py::dict facts;
  py::list levels;
  for (const fastrl::KernelTable* table :
       {fastrl::kernels_avx512(), fastrl::kernels_avx2(), fastrl::kernels_plain()}) {
    if (table) levels.append(table->name);
  }
#if defined(__clang__)
  facts["compiler"] = __VERSION__;  // names itself
#else
  facts["compiler"] = "GCC " __VERSION__;
#endif
  facts["torch"] = TORCH_VERSION;
  facts["torch_abi"] = "stable, torch >= 2.10";
  facts["cuda_architectures"] = fastrl::cuda_architectures();
  facts["simd_levels"] = levels;
  return facts;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Registers the ops torch.ops.fastrl.* and tells how this binary was built.";
  m.def("build_facts", &build_facts, "What this binary was built with, and for.");
  m.def("simd_level", [] { return fastrl::kernels().name; }, "The CPU kernels in use.");
  m.def("select_simd_level", &fastrl::select_kernels, py::arg("name"),
        "For tests: use another level from now on; False where this processor cannot run it.");
  m.def("release_memory", &fastrl::release_memory,
        "Gives back the pages of large outputs that were freed and wait to be used again.");
}
