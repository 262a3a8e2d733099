"""Small random models of transformers, twice: on fastrl's attention and on one of transformers'."""

import torch
from transformers import AutoConfig, AutoModelForCausalLM

import fastrl.hf

VOCAB = 97
_WIDTHS = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
_LLAMA = dict(**_WIDTHS, num_key_value_heads=2, head_dim=8, attention_dropout=0.0)
_ROPE = dict(rope_type="default", rope_theta=1e4)
_GEMMA = dict(**_LLAMA, sliding_window=4, layer_types=["sliding_attention", "full_attention"])
CONFIGS = {
    "llama": _LLAMA,
    "qwen2": dict(**_WIDTHS, num_key_value_heads=2),
    "qwen3": _LLAMA,
    "mistral": dict(**_LLAMA, sliding_window=4),
    # A softcap this low bends most scores.
    "gemma2": dict(**_GEMMA, query_pre_attn_scalar=8, attn_logit_softcapping=1.5),
    "gemma3_text": dict(**_GEMMA, query_pre_attn_scalar=8),
    "gpt_oss": dict(**_GEMMA, num_local_experts=4, num_experts_per_tok=2, rope_parameters=_ROPE),
    "gpt2": dict(n_embd=32, n_layer=2, n_head=4, attn_pdrop=0.0, resid_pdrop=0.0, embd_pdrop=0.0),
    "gpt_neox": dict(**_WIDTHS, rotary_pct=0.5, hidden_dropout=0.0, attention_dropout=0.0),
    "phi": dict(**_WIDTHS, resid_pdrop=0.0, embd_pdrop=0.0, attention_dropout=0.0),
    "opt": dict(
        hidden_size=32, ffn_dim=48, num_hidden_layers=2, num_attention_heads=4, dropout=0.0
    ),
}
_EAGER = {"gemma2", "gemma3_text", "gpt_oss"}  # sdpa has no softcap and no sinks


def build(name, attention="fastrl", **changes):
    """A model in which attention matters: with transformers' own weights it is all but uniform."""
    fastrl.hf.register()
    widths = dict(vocab_size=VOCAB, max_position_embeddings=64, bos_token_id=1, eos_token_id=None)
    given = CONFIGS.get(name, {}) | widths | dict(pad_token_id=0) | changes
    config = AutoConfig.for_model(name, **given)
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.dim() > 1:
                weight.normal_(std=0.3, generator=generator)
            elif name.endswith("sinks"):
                weight.copy_(torch.linspace(-1.0, 2.0, len(weight)))
    return model.eval()


def build_pair(name, **changes):
    """Ours, and the same weights on transformers' attention."""
    ours, theirs = build(name, **changes), build(name, "eager" if name in _EAGER else "sdpa")
    theirs.load_state_dict(ours.state_dict())
    return ours, theirs


def log_probs(model, token_ids, **kwargs):
    """[B, T, V] of a forward that keeps no cache."""
    kwargs.setdefault("use_cache", False)
    return model(token_ids, **kwargs).logits.log_softmax(-1)


def gradients(model, loss):
    """Of each parameter, by its name."""
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_equal_gradients(ours, theirs, atol=1e-5):
    assert ours.keys() == theirs.keys() and len(ours) > 10
    for name, grad in ours.items():
        torch.testing.assert_close(
            grad, theirs[name], rtol=0, atol=atol, msg=f"the gradient of {name} differs"
        )
    assert max(grad.abs().max() for grad in ours.values()) > 0.01  # not all but zero
