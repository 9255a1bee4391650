"""Dropout against what `nn.Dropout` promises."""

import pytest
import torch

from dman_train.dropout import Dropout


@pytest.mark.parametrize("rate", [0.05, 0.2, 0.5, 0.95])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dropout_drops_the_rate_of_all_values_and_keeps_their_mean(rate: float, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x = torch.ones(1001, 333, dtype=dtype)
    y = Dropout(rate)(x)
    assert y.dtype == dtype
    kept = y != 0
    assert kept.float().mean().item() == pytest.approx(1 - rate, abs=0.004)
    assert y[kept].unique().numel() == 1
    assert y.float().mean().item() == pytest.approx(1, abs=0.02)
    bits = kept.flatten()[: 1001 * 333 // 8 * 8].view(-1, 8).float()  # every byte of a draw decides alike
    assert (bits.mean(0) - (1 - rate)).abs().max() < 0.01
    assert (torch.corrcoef(bits.T) - torch.eye(8)).abs().max() < 0.03


def test_dropout_gives_gradient_to_what_it_kept_and_scales_it_alike() -> None:
    torch.manual_seed(0)
    x = torch.randn(50, 40, requires_grad=True)
    y = Dropout(0.2)(x)
    y.sum().backward()
    torch.testing.assert_close(x.grad, (y / x).detach())


def test_dropout_follows_the_generator_and_is_the_identity_where_there_is_nothing_to_drop() -> None:
    x, drop = torch.randn(7, 5), Dropout(0.3)
    torch.manual_seed(3)
    first = drop(x)
    assert not torch.equal(drop(x), first)
    torch.manual_seed(3)
    assert torch.equal(drop(x), first)
    assert drop.eval()(x) is x and Dropout(0.0)(x) is x
    assert drop.train()(torch.zeros(0, 5)).shape == (0, 5)
