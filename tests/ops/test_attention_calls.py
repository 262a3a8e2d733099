"""How attention is called: compiled, checkpointed, under autocast, in part, and wrongly."""

import pytest
import torch
from torch import library
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

import fastrl
from fastrl.layout import PackedLayout

HIDDEN = torch.randn(1, 4, 30, 8, generator=torch.Generator().manual_seed(0))


def layout_of(lengths, prefix, device="cpu"):
    bounds = torch.tensor([0, *lengths]).cumsum(0).int()
    return PackedLayout(bounds, torch.tensor(prefix, dtype=torch.int32)).to(device)


def leaves(*shapes, device="cpu", dtype=torch.float32):
    return [torch.randn(s, device=device, dtype=dtype).requires_grad_() for s in shapes]


def qkv(tokens, device="cpu", dtype=torch.float32):
    return leaves((1, 4, tokens, 16), *[(1, 2, tokens, 16)] * 2, device=device, dtype=dtype)


def arguments(device, kind):
    """Of the op itself: what comes after query, key and value."""
    layout = layout_of([9, 4, 5], [-1, 0, 0], device)
    numbers = (True, 0.25)
    if kind == "layout":
        visible = (None, None, layout.position_ids, layout.visible_until, layout.schedule)
        return 18, (*visible, *numbers, 5, 2.0)
    if kind == "padded":
        row = torch.tensor([3], dtype=torch.int32, device=device)
        return 18, (row, row + 14, None, None, [], *numbers, None, None)
    return 18, (None, None, None, None, [], *numbers, None, None)


@pytest.mark.parametrize("kind", ["dense", "padded", "layout"])
def test_opcheck(device, kind):
    tokens, rest = arguments(device, kind)
    tensors = qkv(tokens, device)
    library.opcheck(torch.ops.fastrl.attention_fwd.default, (*tensors, *rest, True))
    with torch.no_grad():
        output, lse, residue = torch.ops.fastrl.attention_fwd(*tensors, *rest, False)
        for grads, needs in (
            ((torch.randn_like(output), None), (True, True, True)),
            ((None, torch.randn_like(lse)), (False, True, False)),
        ):
            saved = (*grads, *(x.detach() for x in tensors), output, lse, residue)
            library.opcheck(
                torch.ops.fastrl.attention_bwd.default, (*saved, *rest, *needs),
                test_utils=("test_schema", "test_faketensor"),
            )  # fmt: skip


def test_keys_without_queries_have_gradients_of_zero():
    query, key, value = leaves((2, 4, 0, 16), *[(2, 2, 5, 16)] * 2)
    output, lse = fastrl.attention(query, key, value, return_lse=True)
    (output.sum() + lse.sum()).backward()
    assert query.grad.shape == query.shape and not key.grad.any() and not value.grad.any()


def test_compiled_once_for_every_layout(device):
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")

    @torch.compile(backend=counter, fullgraph=True)
    def step(q, k, v, layout):
        return fastrl.attention(q * 2, k, v, layout=layout, window=6).sum()

    layouts = [
        layout_of([9, 4, 5], [-1, 0, 0], device),
        layout_of([3, 4, 5, 2, 2, 2], [-1, 0, 0, -1, 3, 3], device),
        layout_of([18], [-1], device),
        layout_of([31], [-1], device),
        layout_of([8, 0, 8, 8], [-1, 0, 1, 2], device),
    ]
    for layout in layouts:
        tensors = qkv(layout.num_tokens, device)
        step(*tensors, layout).backward()
        plain = [x.detach().requires_grad_() for x in tensors]
        fastrl.attention(plain[0] * 2, *plain[1:], layout=layout, window=6).sum().backward()
        for a, b in zip(tensors, plain, strict=True):
            torch.testing.assert_close(a.grad, b.grad)
        # Of as many tokens: once. Of others: what torch does for any tensor of a second size.
        assert counter.frame_count == (1 if layout.num_tokens == 18 else 2)


def test_compiled_once_for_every_padding(device):
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")

    @torch.compile(backend=counter, fullgraph=True, dynamic=True)
    def step(q, k, v, start, end):
        output, lse = fastrl.attention(q, k, v, key_start=start, key_end=end, return_lse=True)
        return (output.sum(-1) + lse).sum()

    for queries, keys in ((6, 7), (5, 5), (9, 40)):
        tensors = leaves((3, 4, queries, 16), *[(3, 2, keys, 16)] * 2, device=device)
        start = torch.tensor([0, 1, 0], dtype=torch.int32, device=device)
        end = torch.tensor([keys, keys, keys - 1], dtype=torch.int32, device=device)
        loss = step(*tensors, start, end)
        output, lse = fastrl.attention(*tensors, key_start=start, key_end=end, return_lse=True)
        torch.testing.assert_close(loss, (output.sum(-1) + lse).sum())
    assert counter.frame_count == 1


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing(device, reentrant):
    layout = layout_of([9, 4, 5], [-1, 0, 0], device)
    tensors = qkv(18, device)

    def attend(q, k, v):
        return fastrl.attention(q, k, v, layout=layout)

    plain = torch.autograd.grad(attend(*tensors).square().sum(), tensors)
    kept = checkpoint(attend, *tensors, use_reentrant=reentrant)
    kept.square().sum().backward()
    assert all(torch.equal(x.grad, y) for x, y in zip(tensors, plain, strict=True))


@pytest.mark.parametrize("needed", range(1, 8))
@pytest.mark.parametrize("options", [{}, {"window": 4}], ids=str)
def test_any_of_the_inputs_may_require_grad(device, needed, options):
    tensors = qkv(18, device)
    upstream = torch.randn_like(tensors[0])
    layout = layout_of([9, 4, 5], [-1, 0, 0], device)
    all_of_them = torch.autograd.grad(
        fastrl.attention(*tensors, layout=layout, **options), tensors, upstream
    )
    some = [x.detach().requires_grad_(bool(needed >> i & 1)) for i, x in enumerate(tensors)]
    fastrl.attention(*some, layout=layout, **options).backward(upstream)
    for x, expected in zip(some, all_of_them, strict=True):
        assert x.grad is None if not x.requires_grad else torch.equal(x.grad, expected)


def test_a_gradient_through_one_output_only(device):
    tensors = qkv(18, device)
    output, lse = fastrl.attention(*tensors, return_lse=True)
    both = torch.autograd.grad(output.sum() + lse.sum(), tensors, retain_graph=True)
    first = torch.autograd.grad(output.sum(), tensors, retain_graph=True)
    second = torch.autograd.grad(lse.sum(), tensors)
    for a, b, c in zip(both, first, second, strict=True):
        torch.testing.assert_close(a, b + c)


def test_no_second_derivative_that_is_silently_zero(device):
    tensors = qkv(5, device)
    first = torch.autograd.grad(fastrl.attention(*tensors).sum(), tensors, create_graph=True)
    with pytest.raises(NotImplementedError, match="differentiated once"):
        torch.autograd.grad(sum(x.square().sum() for x in first), tensors)


@pytest.mark.parametrize("num_queries", [2, 20])  # of decoding, and not
def test_a_window_wider_than_any_text_is_none(device, num_queries):
    q, k, v = (torch.randn(2, 2, n, 16, device=device) for n in (num_queries, 21, 21))
    whole = fastrl.attention(q, k, v)
    for window in (2**31, 2**63, 2**70):
        assert torch.equal(fastrl.attention(q, k, v, window=window), whole)
    options = {"layout": layout_of([9, 4, 8], [-1, 0, 0], device)}
    trees = [x[:1] for x in (k, k, v)]
    narrow = fastrl.attention(*trees, window=2**70, **options)
    assert torch.equal(narrow, fastrl.attention(*trees, **options))


def test_autocast_casts_as_for_torchs_attention(device):
    q, k, v = qkv(18, device)
    with torch.autocast(device, torch.bfloat16):
        ours = fastrl.attention(q, k, v)
        theirs = torch.nn.functional.scaled_dot_product_attention(
            q, k, v, is_causal=True, enable_gqa=True
        )
    assert ours.dtype == theirs.dtype == torch.bfloat16
    torch.testing.assert_close(ours, theirs, rtol=2e-2, atol=2e-2)
    ours.sum().backward()
    assert q.grad.dtype == torch.float32
    with torch.autocast(device, torch.bfloat16):
        q, k, v = (x.detach().bfloat16() for x in (q, k, v))
        assert torch.equal(fastrl.attention(q, k, v), ours)
        with pytest.raises(TypeError, match="key of dtype .* got torch.int64"):
            fastrl.attention(q, k.long(), v)
        with pytest.raises(TypeError, match="value as a tensor, got list"):
            fastrl.attention(q, k, v.tolist())


@pytest.mark.parametrize("num_queries", [2, 20])  # of decoding, and not
def test_bounds_of_any_strides(device, num_queries):
    q, k, v = (torch.randn(2, 2, n, 16, device=device) for n in (num_queries, 21, 21))
    start, end = (torch.tensor([[a, 99], [b, 99]], dtype=torch.int32, device=device).T[0]
                  for a, b in ((1, 0), (7, 20)))  # fmt: skip
    options = {"key_start": start.contiguous(), "key_end": end.contiguous()}
    views = {"key_start": start, "key_end": end}
    assert torch.equal(fastrl.attention(q, k, v, **views), fastrl.attention(q, k, v, **options))
    alike = torch.tensor([9], dtype=torch.int32, device=device)
    ours = fastrl.attention(q, k, v, key_end=alike.expand(2))
    assert torch.equal(ours, fastrl.attention(q, k, v, key_end=alike.repeat(2)))


def test_any_strides(device):
    base = torch.randn(2, 20, 8, 24, device=device)
    plain = fastrl.attention(*[base[:, :, :, i : i + 8].permute(0, 2, 1, 3).contiguous()
                               for i in (0, 8, 16)])  # fmt: skip
    views = [base[:, :, :, i : i + 8].permute(0, 2, 1, 3) for i in (0, 8, 16)]
    torch.testing.assert_close(fastrl.attention(*views), plain)
    turned = [x.transpose(2, 3).contiguous().transpose(2, 3) for x in views]  # not dense along D
    torch.testing.assert_close(fastrl.attention(*turned), plain)
    last = fastrl.attention(turned[0][:, :, -1:], *turned[1:])  # one query: as in decoding
    torch.testing.assert_close(last, plain[:, :, -1:])
    expanded = [x[:1].expand(2, -1, -1, -1) for x in views]
    assert torch.equal(fastrl.attention(*expanded)[0], fastrl.attention(*expanded)[1])


@pytest.mark.parametrize("shape", [(0, 4, 3, 8), (2, 4, 0, 8)], ids=str)
def test_nothing_to_do(device, shape):
    tensors = leaves(shape, *[(shape[0], 2, 5, 8)] * 2, device=device)
    output, lse = fastrl.attention(*tensors, return_lse=True)
    assert output.shape == shape and lse.shape == shape[:3]
    output.sum().backward()
    assert all((x.grad == 0).all() and x.grad.shape == x.shape for x in tensors)


def test_no_keys_and_no_tokens(device):
    tensors = leaves((2, 4, 3, 8), (2, 2, 0, 8), (2, 2, 0, 8), device=device)
    output, lse = fastrl.attention(*tensors, return_lse=True)
    assert (output == 0).all() and (lse == -torch.inf).all()
    output.sum().backward()
    assert (tensors[0].grad == 0).all()
    layout = layout_of([0, 0], [-1, 0], device)
    empty = qkv(0, device)
    fastrl.attention(*empty, layout=layout).sum().backward()
    assert empty[1].grad.shape == (1, 2, 0, 16)


Q, K = torch.zeros(2, 4, 5, 8), torch.zeros(2, 2, 6, 8)
ROW, ONE = torch.zeros(2, dtype=torch.int32), torch.zeros(1, 4, 18, 8)
LAYOUT = layout_of([9, 4, 5], [-1, 0, 0])
BAD = [
    ((Q[0], K, K), {}, ValueError, r"query \[B, H, T, D\], got \(4, 5, 8\)"),
    ((Q.long(), K, K), {}, TypeError, "query of dtype float32"),
    ((Q, K.double(), K), {}, TypeError, "key of dtype torch.float32, got torch.float64"),
    ((Q, K, K[:, :, :5]), {}, ValueError, r"value \(2, 2, 6, 8\) like key"),
    ((Q, K[:1], K[:1]), {}, ValueError, "with B = 2 and D = 8 like query"),
    ((Q, K[..., :4], K[..., :4]), {}, ValueError, "with B = 2 and D = 8 like query"),
    ((Q[:, :3], K, K), {}, ValueError, "query heads a multiple of the key's heads"),
    ((Q, K[:, :0], K[:, :0]), {}, ValueError, "query heads a multiple of the key's heads"),
    ((Q[..., :0], K[..., :0], K[..., :0]), {}, ValueError, "D >= 1"),
    ((Q, K, K), {"causal": 1}, TypeError, "causal as a bool"),
    ((Q, K, K), {"causal": False, "window": 3}, ValueError, "causal True with a window"),
    ((ONE, ONE, ONE), {"causal": False, "layout": LAYOUT}, ValueError, "True with a layout"),
    ((Q, K, K), {"window": 0}, ValueError, "window >= 1, got 0"),
    ((Q, K, K), {"window": 2.0}, TypeError, "window as an int"),
    ((Q, K, K), {"softcap": 0.0}, ValueError, "softcap > 0"),
    ((Q, K, K), {"scale": float("nan")}, ValueError, "scale in"),
    ((Q, K, K), {"key_end": ROW.long()}, TypeError, "key_end of dtype int32"),
    ((Q, K, K), {"key_start": ROW[:1]}, ValueError, r"key_start \[B\] = \(2,\), got \(1,\)"),
    ((Q, K, K), {"key_end": ROW + 7}, ValueError, r"key_end in \[0, S = 6\], got 7"),
    ((Q, K, K), {"key_start": ROW - 1}, ValueError, r"key_start in \[0, S = 6\], got -1"),
    ((Q, K, K), {"layout": LAYOUT}, ValueError, r"query and key \[1, H, N, D\] with N = 18"),
    ((ONE, ONE, ONE), {"layout": 3}, TypeError, "layout as a PackedLayout, got int"),
    ((ONE, ONE, ONE), {"layout": LAYOUT, "key_end": ROW[:1]}, ValueError, "layout without key_end"),
    ((ONE, ONE, ONE), {"layout": LAYOUT, "key_start": ROW[:1]}, ValueError, "without key_start"),
]  # fmt: skip


@pytest.mark.parametrize("tensors, options, error, message", BAD)
def test_bad_arguments(tensors, options, error, message):
    with pytest.raises(error, match=message) as caught:
        fastrl.attention(*tensors, **options)
    assert str(caught.value).startswith("attention: expected ")


@pytest.mark.gpu
def test_heads_too_wide_for_a_gpu_are_refused():
    """Not by a KeyError of the blocks' table, or by the compiler."""
    x = torch.randn(1, 1, 20, 257, device="cuda")
    with pytest.raises(ValueError, match="attention: expected a head size of at most 256 on a GPU"):
        fastrl.attention(x, x, x)
    with pytest.raises(ValueError, match="decode_attention: expected a head size of at most 256"):
        fastrl.decode_attention(x[:, :, :1], x, x)


def test_a_few_queries_without_gradient_go_the_way_of_decoding(device):
    """With the results of the usual way, which calls with a gradient take."""
    end = torch.tensor([40, 33, 5], dtype=torch.int32, device=device)
    for queries in (1, 3, 8):
        tensors = leaves((3, 4, queries, 16), *[(3, 2, 40, 16)] * 2, device=device)
        for options in ({}, {"key_end": end}, {"window": 7}, {"softcap": 2.0, "scale": -0.2}):
            usual = fastrl.attention(*tensors, return_lse=True, **options)
            with torch.no_grad():
                decoded = fastrl.attention(*tensors, return_lse=True, **options)
                if "scale" not in options:
                    same = fastrl.decode_attention(*tensors, return_lse=True, **options)
                    assert all(torch.equal(x, y) for x, y in zip(decoded, same, strict=True))
            for x, y in zip(decoded, usual, strict=True):
                torch.testing.assert_close(x, y.detach())
    query, cache = torch.randn(3, 4, 1, 16, device=device), tensors[1].detach()
    full = fastrl.attention(query, cache, cache, causal=False, key_end=end)
    assert torch.equal(full, fastrl.decode_attention(query, cache, cache, key_end=end))
