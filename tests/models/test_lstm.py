"""LSTMLanguageModel: every way through it computes what LSTM cells, one at a time, compute."""

import pytest
import torch

from fastrl.layout import PackedBatch, pack_groups
from fastrl.models import LSTMLanguageModel, PolicyModel, model_from_config

V, E, D, LAYERS = 11, 5, 7, 2


@pytest.fixture
def model():
    torch.manual_seed(0)
    return LSTMLanguageModel(V, E, D, LAYERS).double()


def by_cells(model, token_ids):
    """[T] -> hidden [T, D], by the LSTM's equations."""
    h, c = torch.zeros(LAYERS, D).double(), torch.zeros(LAYERS, D).double()
    outputs = []
    for token_id in token_ids:
        x = model.embedding.weight[token_id]
        rows_h, rows_c = [], []
        for layer in range(LAYERS):
            w_ih, w_hh, b_ih, b_hh = model.lstm._flat_weights[4 * layer : 4 * layer + 4]
            i, f, g, o = (w_ih @ x + b_ih + w_hh @ h[layer] + b_hh).chunk(4)
            rows_c.append(f.sigmoid() * c[layer] + i.sigmoid() * g.tanh())
            x = o.sigmoid() * rows_c[-1].tanh()
            rows_h.append(x)
        h, c = torch.stack(rows_h), torch.stack(rows_c)
        outputs.append(x)
    return torch.stack(outputs)


def sequences(lengths):
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(V, (length,), generator=generator) for length in lengths]


def starts(lengths):
    return torch.tensor([0, *lengths]).cumsum(0).int()


def gradients(model, loss):
    return torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)


def test_forward_is_the_lstm_equations(model):
    token_ids = torch.stack(sequences([4, 4, 4]))
    logits, _ = model(token_ids)
    for row in range(3):
        hidden = by_cells(model, token_ids[row])
        expected = hidden @ model.lm_head.weight.T + model.lm_head.bias
        torch.testing.assert_close(logits[row], expected)


def test_forward_goes_on_from_a_state(model):
    token_ids = torch.stack(sequences([6, 6]))
    whole, (hidden, cell) = model(token_ids)
    first, state = model(token_ids[:, :2])
    second, state = model(token_ids[:, 2:], state)
    torch.testing.assert_close(torch.cat([first, second], 1), whole)
    torch.testing.assert_close(state, (hidden, cell))


@pytest.mark.parametrize(
    "lengths",
    [
        [3, 1, 5],  # not sorted
        [2, 2, 2],  # equal: nothing to pack
        [0, 4, 0, 1],  # empty sequences first and between
        [4],  # one
    ],
)
def test_packed_sequences_are_each_as_if_alone(model, lengths):
    rows = sequences(lengths)
    hidden, state = model.packed_hidden_states(torch.cat(rows), starts(lengths))
    for row, part, index in zip(rows, hidden.split(lengths), range(len(rows)), strict=True):
        if len(row) > 0:
            alone, alone_state = model.hidden_states(row[None])
            torch.testing.assert_close(part, alone[0])
            torch.testing.assert_close(state[0][:, index], alone_state[0][:, 0])
            torch.testing.assert_close(state[1][:, index], alone_state[1][:, 0])
        else:
            assert state[0][:, index].eq(0).all() and state[1][:, index].eq(0).all()


def test_packed_without_any_token_returns_the_state(model):
    _, state = model.hidden_states(torch.stack(sequences([2, 2])))
    empty = torch.zeros(0, dtype=torch.int64)
    hidden, after = model.packed_hidden_states(empty, starts([0, 0]), state)
    assert hidden.shape == (0, D)
    assert torch.equal(after[0], state[0]) and torch.equal(after[1], state[1])


def test_the_decoder_equals_forward(model):
    prompts = sequences([3, 1, 4])
    decoder = model.decoder(6, 4)
    hidden = decoder.read(prompts[:2])
    decoder.open([0, 0, 1, 1])
    after = decoder.step(torch.tensor([1, 2, 3, 4]))
    decoder.keep(torch.tensor([0, 3]))
    hidden = torch.cat([hidden, decoder.read(prompts[2:])])
    decoder.open([1, 2])  # the last prompt again, and the next
    last = decoder.step(torch.tensor([5, 6, 7, 8]))
    decoder.keep(torch.tensor([1, 3]))
    end = decoder.step(torch.tensor([9, 10]))
    for index, prompt in enumerate(prompts):
        torch.testing.assert_close(hidden[index], by_cells(model, prompt)[-1])
    read = [(0, [1]), (0, [2]), (1, [3]), (1, [4])]
    check_rows(model, after, prompts, read)
    check_rows(model, last, prompts, [(0, [1, 5]), (1, [4, 6]), (1, [7]), (2, [8])])
    check_rows(model, end, prompts, [(1, [4, 6, 9]), (2, [8, 10])])


def check_rows(model, hidden, prompts, read):
    assert len(hidden) == len(read)
    for got, (prompt, ids) in zip(hidden, read, strict=True):
        whole = torch.cat([prompts[prompt], torch.tensor(ids)])
        torch.testing.assert_close(got, by_cells(model, whole)[-1])


def test_packed_trees_equal_unshared_copies(model):
    """Two prompts; under the first a turn that two answers share, and an empty one."""
    lengths, parents = [3, 4, 2, 1, 0, 5, 1], [-1, 0, 1, 1, 1, -1, 5]
    segments = sequences(lengths)
    masks = [torch.zeros(n, dtype=torch.bool) for n in lengths]
    for target in (2, 3, 6):
        masks[target][:] = True
    masks[1][:2] = True  # a part of the shared turn was written by the policy
    batch = PackedBatch.from_segments(segments, parents, masks)
    hidden = model.packed_hidden(batch)
    above = {0: [], 1: [0], 2: [0, 1], 3: [0, 1], 6: [5]}
    unshared = []
    for segment in (1, 2, 3, 6):
        before = torch.cat([segments[s] for s in above[segment]])
        whole, _ = model.hidden_states(torch.cat([before, segments[segment]])[None])
        unshared.append(whole[0, len(before) - 1 : -1][masks[segment]])
    check_equal(model, hidden, torch.cat(unshared))


@pytest.mark.parametrize("lengths", [[3, 1, 4, 2], [1, 1, 1, 1], [0, 2, 0, 0]])
def test_completions_on_shared_prompts_equal_unshared_ones(model, lengths):
    prompts, completions = sequences([3, 5]), sequences(lengths)
    batch = pack_groups(prompts, [completions[:2], completions[2:]])
    unshared = []
    for index, completion in enumerate(completions):
        prompt = prompts[index // 2]
        whole, _ = model.hidden_states(torch.cat([prompt, completion])[None])
        unshared.append(whole[0, len(prompt) - 1 : -1])
    check_equal(model, model.packed_hidden(batch), torch.cat(unshared))


def check_equal(model, hidden, expected):
    """Values, and the gradients of a sum with weights."""
    torch.testing.assert_close(hidden, expected)
    weights = torch.linspace(-1, 1, hidden.numel()).double().view_as(hidden)
    got = gradients(model, (hidden * weights).sum())
    wanted = gradients(model, (expected * weights).sum())
    for one, other in zip(got, wanted, strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            torch.testing.assert_close(one, other)


def test_a_batch_without_targets_has_no_hidden_states(model):
    batch = pack_groups(sequences([3]), [sequences([0])])
    assert model.packed_hidden(batch).shape == (0, D)


def test_a_prompt_is_read_once_for_all_its_completions(model):
    read = []
    model.embedding.register_forward_hook(lambda _, args, __: read.append(args[0].numel()))
    completions = sequences([2] * 8)
    model.packed_hidden(pack_groups(sequences([6, 3]), [completions[:4], completions[4:]]))
    assert sum(read) == 6 + 3 + 8 * 1  # a completion's last token predicts nothing


def test_config_builds_the_model_again(model):
    again = model_from_config(model.config).double()
    again.load_state_dict(model.state_dict())
    token_ids = torch.stack(sequences([4]))
    assert torch.equal(again(token_ids)[0], model(token_ids)[0])
    assert isinstance(again, PolicyModel)


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        ((0, 1, 1, 1), ValueError, "expected vocab_size >= 1, got 0"),
        ((5, 1, 1, 0), ValueError, "expected num_layers >= 1, got 0"),
        ((5, 1.5, 1, 1), TypeError, "expected embed_dim int, got float"),
        ((5, 1, True, 1), TypeError, "expected hidden_dim int, got bool"),
    ],
)
def test_sizes_are_checked(arguments, error, message):
    with pytest.raises(error, match=message):
        LSTMLanguageModel(*arguments)


@pytest.mark.parametrize(
    "token_ids, error, message",
    [
        (torch.tensor([1, 2]), ValueError, r"expected token_ids \[B, T\].*got \(2,\)"),
        (torch.zeros(2, 0, dtype=torch.int64), ValueError, r"got \(2, 0\)"),
        (torch.zeros(0, 2, dtype=torch.int64), ValueError, r"got \(0, 2\)"),
        (torch.tensor([[1.0]]), TypeError, "expected token_ids int64, got torch.float32"),
        (torch.tensor([[3, V]]), ValueError, rf"in \[0, {V}\), got ids from 3 to {V}"),
        (torch.tensor([[-1, 0]]), ValueError, "got ids from -1 to 0"),
    ],
)
def test_token_ids_are_checked(model, token_ids, error, message):
    with pytest.raises(error, match=message):
        model(token_ids)


def test_a_state_of_other_rows_is_an_error(model):
    _, (hidden, cell) = model(torch.tensor([[1], [2]]))
    for state in ((hidden, cell), (hidden[:, :1], cell)):
        with pytest.raises(ValueError, match=r"expected state \[layers, B, D\] = \(2, 1, 7\)"):
            model(torch.tensor([[1]]), state)


@pytest.mark.parametrize(
    "config, message",
    [
        ({}, "got None"),
        ({"model_type": "gpt"}, "got 'gpt'"),
        ({"model_type": "lstm", "vocab_size": 3}, "expected config to hold the arguments of lstm"),
        ({"model_type": "actor_critic"}, "arguments of actor_critic"),
    ],
)
def test_a_config_of_something_else_is_an_error(config, message):
    with pytest.raises(ValueError, match=message):
        model_from_config(config)


@pytest.mark.gpu
@pytest.mark.parametrize("training", [True, False])
def test_either_mode_has_gradients_on_a_gpu(model, training):
    """cuDNN's backward pass knows training mode alone."""
    batch = pack_groups(sequences([3, 2]), [sequences([4, 1]), sequences([2])])
    found = []
    for device in ("cpu", "cuda"):
        model.to(device).train(training)
        ids = batch.token_ids.to(device)
        loss = model.packed_hidden(batch.to(device)).square().sum() + model(ids[None])[0].sum()
        found.append([x.cpu() for x in (loss, *gradients(model, loss))])
    for here, there in zip(*found, strict=True):
        torch.testing.assert_close(there, here)
