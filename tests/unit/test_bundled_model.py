"""The training side of the bundled model: its layout, its planted heads and its optimizer."""

from __future__ import annotations

import pytest
import torch
import transformers
from bundled_model import Model, Shape, plant_induction
from train_bundled import _orthogonal, rate


@pytest.fixture(scope="module")
def planted() -> Model:
    torch.manual_seed(0)
    model = Model(Shape())
    plant_induction(model)
    return model


def test_logits_equal_those_of_transformers(planted: Model) -> None:
    config = planted.shape.config_json(bos=0, eos=2, pad=0)
    theirs = transformers.LlamaForCausalLM(transformers.LlamaConfig(**config)).float().eval()
    missing, unexpected = theirs.load_state_dict(planted.state_dict(), strict=False)
    assert (missing, unexpected) == (["lm_head.weight"], []) or (missing, unexpected) == ([], [])
    ids = torch.randint(0, 4096, (2, 50))
    with torch.no_grad():
        ours = planted.hidden(ids) @ planted.model.embed_tokens.weight.T
        assert torch.allclose(ours, theirs(ids).logits, atol=1e-4)


def test_planted_heads_repeat_what_they_saw(planted: Model) -> None:
    words = torch.randint(300, 4096, (8, 30))
    between = torch.randint(300, 4096, (8, 12))
    ids = torch.cat((words, between, words), dim=1)
    with torch.no_grad():
        guess = (planted.hidden(ids) @ planted.model.embed_tokens.weight.T).argmax(-1)[:, -30:-1]
        fresh = Model(Shape())
        chance = (fresh.hidden(ids) @ fresh.model.embed_tokens.weight.T).argmax(-1)[:, -30:-1]
    assert (guess == words[:, 1:]).float().mean() > 0.8
    assert (chance == words[:, 1:]).float().mean() < 0.1


def test_training_leaves_the_planted_attention_alone() -> None:
    torch.manual_seed(1)
    model = Model(Shape())
    plant_induction(model)
    ids = torch.randint(0, 4096, (2, 40))
    torch.autograd.backward(model.loss(ids, torch.ones(2, 40))[0])
    width = model.shape.head_dim
    for layer in model.model.layers[:2]:
        for name in ("q_proj", "k_proj", "v_proj"):
            assert not getattr(layer.self_attn, name).weight.grad[:width].any()
    assert not model.model.embed_tokens.weight.grad[:, 0].any()
    assert model.model.embed_tokens.weight.grad[:, 1:].any()
    assert model.model.layers[1].self_attn.o_proj.weight.grad[:, :width].any()


def test_loss_counts_only_weighted_places(planted: Model) -> None:
    ids = torch.randint(0, 4096, (2, 12))
    weights = torch.zeros(2, 12)
    weights[:, 6:10] = 2.0
    changed = ids.clone()
    changed[:, 10:] = 7  # after the last weighted place, as padding is
    with torch.no_grad():
        summed, total = planted.loss(ids, weights)
        again, _ = planted.loss(changed, weights)
        half, _ = planted.loss(ids, weights / 2)
    assert total == 16
    assert torch.allclose(summed, again)
    assert torch.allclose(summed, 2 * half)


@pytest.mark.parametrize("shape", [(64, 32), (32, 64), (48, 48)])
def test_updates_are_nearly_orthogonal(shape: tuple[int, int]) -> None:
    values = torch.linalg.svdvals(_orthogonal(torch.randn(2, *shape)))
    assert values.max() < 1.3
    assert values.median() > 0.6


def test_learning_rate_rises_stays_and_falls() -> None:
    assert rate(0.0, 0) < 0.1
    assert rate(0.3, 500) == 1.0
    assert rate(0.75, 900) == pytest.approx(0.5)
    assert rate(0.9999, 2000) <= 0.01
