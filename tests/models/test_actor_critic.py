"""ActorCritic: a value per token on the language model's own hidden states."""

import pytest
import torch
from hf_models import build
from torch import nn

from fastrl.models import ActorCritic, LSTMLanguageModel, model_from_config


@pytest.fixture
def model():
    torch.manual_seed(0)
    return ActorCritic(LSTMLanguageModel(9, 4, 6, 1))


TOKEN_IDS = torch.tensor([[1, 2, 3], [4, 5, 6]])


def test_values_start_at_zero_and_logits_are_the_language_models(model):
    logits, values, state = model(TOKEN_IDS)
    expected, expected_state = model.language_model(TOKEN_IDS)
    assert torch.equal(values, torch.zeros(2, 3))
    assert torch.equal(logits, expected)
    assert torch.equal(state[0], expected_state[0]) and torch.equal(state[1], expected_state[1])


def test_values_are_linear_in_the_hidden_states(model):
    nn.init.normal_(model.value_head.weight)
    nn.init.constant_(model.value_head.bias, 0.5)
    _, values, state = model(TOKEN_IDS)
    hidden, _ = model.language_model.hidden_states(TOKEN_IDS)
    torch.testing.assert_close(values, hidden @ model.value_head.weight[0] + 0.5)
    _, later, _ = model(TOKEN_IDS, state)
    assert not torch.allclose(later, values)  # the state is used


def test_a_zero_head_still_learns(model):
    _, values, _ = model(TOKEN_IDS)
    (values - 1).square().sum().backward()
    assert model.value_head.weight.grad.abs().sum() > 0


def test_config_builds_the_model_again(model):
    nn.init.normal_(model.value_head.weight)
    again = model_from_config(model.config)
    again.load_state_dict(model.state_dict())
    for one, other in zip(again(TOKEN_IDS)[:2], model(TOKEN_IDS)[:2], strict=True):
        assert torch.equal(one, other)


def test_a_critic_of_its_own_reads_its_own_hidden_states():
    torch.manual_seed(0)
    actor, critic = LSTMLanguageModel(9, 4, 6, 1), LSTMLanguageModel(9, 5, 8, 2)
    model = ActorCritic(actor, critic)
    nn.init.normal_(model.value_head.weight)
    logits, values, state = model(TOKEN_IDS)
    hidden, _ = critic.hidden_states(TOKEN_IDS)
    torch.testing.assert_close(values, hidden @ model.value_head.weight[0])
    assert torch.equal(logits, actor(TOKEN_IDS)[0])
    parts = [model(TOKEN_IDS[:, :1])]
    parts.append(model(TOKEN_IDS[:, 1:], parts[0][2]))
    torch.testing.assert_close(torch.cat([part[1] for part in parts], 1), values)
    torch.testing.assert_close(torch.cat([part[0] for part in parts], 1), logits)
    values.sum().backward()
    assert all(x.grad is None for x in actor.parameters())
    again = model_from_config(model.config)
    again.load_state_dict(model.state_dict())
    assert torch.equal(again(TOKEN_IDS)[1], values)


def test_models_of_transformers_are_taken_and_the_head_is_float32():
    model = ActorCritic(build("llama").bfloat16())
    nn.init.normal_(model.value_head.weight)
    with torch.autocast("cpu", torch.bfloat16):
        _, values, _ = model(TOKEN_IDS)
        hidden, _ = model.language_model.hidden_states(TOKEN_IDS)
    assert values.dtype == torch.float32 and hidden.dtype == torch.bfloat16
    torch.testing.assert_close(values, hidden.float() @ model.value_head.weight[0])


def test_other_models_are_an_error():
    with pytest.raises(TypeError, match="expected model with the methods of .* got Linear"):
        ActorCritic(nn.Linear(2, 2))


def test_a_model_is_not_its_own_critic(model):
    with pytest.raises(ValueError, match="expected critic another model than language_model"):
        ActorCritic(model.language_model, model.language_model)


def test_an_actor_critic_within_another_is_an_error(model):
    with pytest.raises(TypeError, match="got ActorCritic"):
        ActorCritic(model)
