"""fastrl's attention inside Hugging Face models, with packed batches and shared prompts.

    fastrl.hf.register()
    model = AutoModelForCausalLM.from_pretrained(name, attn_implementation="fastrl")
    model(token_ids, attention_mask=mask)                                   # as with any other
    model(token_ids, position_ids=restarting)                               # padding-free
    layout = batch.layout                                                   # of pack_groups
    model(batch.token_ids[None], position_ids=layout.position_ids[None], layout=layout)

Which keys exist comes from our mask function (`_masks`), which tokens belong together from the
layout, from cu_seq_lens_q or from position_ids (`_packing`), and `_models` refuses models
that would not hand these on.
"""

import inspect

from torch import nn

from fastrl.hf._attention import attention_function
from fastrl.hf._masks import mask_function
from fastrl.hf._models import NAME, check_model, refuse_models, tell_dynamo
from fastrl.ops._checks import fail

__all__ = ["check", "register"]

_MISSING = "hf: expected transformers >= 5.4, got {found}. Use pip install 'fastrl[hf]'."


def register() -> None:
    """Makes attn_implementation="fastrl" known to transformers. Calling it again does nothing.

    Works: batches without padding or padded on either side, dynamic and static caches, generate,
    sliding windows, softcap, sinks of each head, gradient checkpointing, 16-bit weights, autocast,
    torch.compile. Nothing of the size [tokens, tokens] is built.

    Three ways to keep sequences of one row apart, of which the first also shares prompts:
      - layout=: a PackedLayout of the row's tokens, with position_ids=layout.position_ids[None].
      - cu_seq_lens_q=: the boundaries of independent sequences, as for flash attention.
      - position_ids that restart at 0, one independent sequence each; in any number of rows.
    The cache of such a forward cannot be continued: pass use_cache=False.

    What cannot be honoured is a ValueError: dropout in attention while training, attention that is
    not causal, is chunked or chooses the keys of each query, a bias on scores, masks of four
    dimensions or with holes, mask functions of one's own, layout with padding, position_ids that
    disagree with the layout or that restart elsewhere than at 0, layers that are not told
    position_ids (token_positions=, their copy, reaches these), attention weights as an output, and
    layouts in models with layers that are no attention. A model that does not promise, by
    `_supports_attention_backend`, to hand its arguments on to its attention is refused when it is
    built. For that, and for nothing else, PreTrainedModel's choice of an attention is wrapped: some
    such models take layout= and drop it.

    On a GPU, a forward waits for it once for each padding mask that the model makes and once for
    the position_ids beside it (twice more where they restart; never while decoding, nor with a view
    of layout.position_ids). Under torch.compile nothing waits: what the values would make a
    ValueError fails as an assertion on the device, and so do position_ids that restart: pass
    layout= there.

    Raises:
        ImportError: transformers is not installed, or is older than 5.4.
    """
    try:
        from transformers import AttentionInterface, AttentionMaskInterface
        from transformers.masking_utils import sdpa_mask
    except ImportError as error:
        raise ImportError(_MISSING.format(found="none")) from error
    if "q_offset" not in inspect.signature(sdpa_mask).parameters:
        found = "one that tells a mask function cache positions"
        raise ImportError(_MISSING.format(found=found))
    AttentionInterface.register(NAME, attention_function)
    AttentionMaskInterface.register(NAME, mask_function)
    refuse_models()
    tell_dynamo()


def check(model: nn.Module) -> None:
    """Refuses a model that would take layout= and drop it. For trainers, before the first step.

    With another attention transformers hands a layout to every layer, and none looks at it.

    Args:
        model: from transformers, bare or inside other modules.
    Raises:
        ValueError: a model of transformers in it is not on fastrl's attention, or none is.
    """
    from transformers import PreTrainedModel

    remedy = "Call fastrl.hf.register(), and load the model with attn_implementation='fastrl'."
    models = [x for x in model.modules() if isinstance(x, PreTrainedModel)]
    if not models:
        got = type(model).__name__
        raise fail("hf", "a model of transformers with attn_implementation='fastrl'", got, remedy)
    for part in models:
        where, attention = type(part).__name__, part.config._attn_implementation
        if attention != NAME:
            raise fail("hf", f"attn_implementation='{NAME}' in {where}", attention, remedy)
        check_model(type(part))
