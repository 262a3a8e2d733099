"""ActorCritic: a value per token on the language model's own hidden states."""

import pytest
import torch
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


@pytest.mark.parametrize("language_model", [nn.Linear(2, 2), "gpt2"])
def test_other_models_are_an_error(language_model):
    with pytest.raises(TypeError, match="expected language_model with the methods of"):
        ActorCritic(language_model)


def test_an_actor_critic_within_another_is_an_error(model):
    with pytest.raises(TypeError, match="got ActorCritic"):
        ActorCritic(model)
