"""Networks of GLipSDP are those of torch with the same tensors."""

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from lben.interop import load_checkpoint


def digits(name):
    """Layers of torch in order, without activations; images are 4 × 4."""
    layers = {
        "fnn2": [nn.Linear(16, 5), nn.Linear(5, 3)],
        "fnn3": [nn.Linear(16, 5), nn.Linear(5, 4), nn.Linear(4, 3)],
        "cnn2": [nn.Conv2d(1, 2, 3, padding=1), nn.Linear(32, 3)],
        "cnn3": [
            nn.Conv2d(1, 2, 3, padding=1), nn.Conv2d(2, 3, 3, padding=1), nn.Linear(48, 3)
        ],
    }[name]  # fmt: skip
    state = {f"{i}.{k}": v.detach() for i, layer in enumerate(layers)
             for k, v in layer.named_parameters()}  # fmt: skip
    state |= {"input_mean": 8 * torch.rand(16), "input_scale": 1 + torch.rand(16)}
    return state, layers


def evaluate(layers, x, order):
    """Logits in float64."""
    if isinstance(layers[0], nn.Conv2d):
        x = x.reshape(-1, 1, 4, 4)
    for i, layer in enumerate(layers):
        if isinstance(layer, nn.Linear) and x.ndim == 4:
            x = (x if order == "channels_first" else x.permute(0, 3, 2, 1)).flatten(1)
        x = layer.double()(torch.relu(x) if i else x)
    return x.detach().numpy()


@pytest.mark.parametrize("order", ["channels_first", "channels_last"])
@pytest.mark.parametrize("name", ["fnn2", "fnn3", "cnn2", "cnn3"])
@pytest.mark.parametrize("suffix", ["safetensors", "pt"])
def test_digits_are_those_of_torch(tmp_path, name, order, suffix):
    state, layers = digits(name)
    path = tmp_path / f"digits.{suffix}"
    save_file(state, path) if suffix == "safetensors" else torch.save(state, path)
    network = load_checkpoint(path, flatten_order=order)
    x = torch.randn(6, 16).double()
    expected = evaluate(layers, x, order)
    np.testing.assert_allclose(network.evaluate(x.numpy()), expected, rtol=1e-12, atol=1e-12)
    assert all(block.affine.exact for block in network.blocks)
    raw = load_checkpoint(path, flatten_order=order, standardised=False)
    pixels = x * state["input_scale"].double() + state["input_mean"].double()
    np.testing.assert_allclose(raw.evaluate(pixels.numpy()), expected, rtol=1e-9, atol=1e-9)
    assert not raw.blocks[0].affine.exact
    assert raw.fingerprint != network.fingerprint


def test_the_two_orders_are_two_networks():
    state, _ = digits("cnn2")
    first, last = (load_checkpoint(state, flatten_order=f"channels_{x}") for x in ("first", "last"))
    assert first.fingerprint != last.fingerprint


def test_numbers_of_the_raw_network_are_enclosed():
    state, _ = digits("fnn2")
    affine = load_checkpoint(state, standardised=False).blocks[0].affine
    found = affine.enclosure(0)
    for i in range(5):
        for j in range(16):
            exact = Fraction(float(state["0.weight"][i, j])) / Fraction(
                float(state["input_scale"][j])
            )
            assert abs(exact - Fraction(float(found.mid[i, j]))) <= Fraction(
                float(found.radius[i, j])
            )


@pytest.mark.parametrize(("depth", "width"), [(2, 3), (5, 4)])
def test_chains_of_square_matrices_are_read(tmp_path, depth, width):
    state = {f"{i}.weight": torch.randn(width, width) for i in range(depth)}
    save_file(state, tmp_path / "chain.safetensors")
    network = load_checkpoint(tmp_path / "chain.safetensors")
    assert network.widths == (width,) * depth
    x = torch.randn(7, width).double()
    y = x
    for i in range(depth):
        y = (torch.relu(y) if i else y) @ state[f"{i}.weight"].double().T
    np.testing.assert_allclose(network.evaluate(x.numpy()), y.numpy(), rtol=1e-12, atol=1e-12)
    with pytest.raises(ValueError, match="has no input_mean"):
        load_checkpoint(state, standardised=False)


@pytest.mark.parametrize("name", ["fnn3", "cnn3"])
def test_a_tensor_that_is_missing_superfluous_or_of_another_shape_is_named(name):
    state, _ = digits(name)
    for key in state:
        if not key.startswith("0.weight"):
            with pytest.raises(ValueError, match=r"shape|no square image"):
                load_checkpoint(state | {key: torch.randn(7)}, "glipsdp")
        with pytest.raises(ValueError, match="NaN"):
            load_checkpoint(state | {key: torch.full_like(state[key], math.nan)})
    with pytest.raises(ValueError, match=r"shape any × 1, got|shape"):
        load_checkpoint(state | {"0.weight": torch.ones(5)})
    for key in ("2.weight", "1.weight"):
        with pytest.raises(ValueError, match=r"has no|no known layout"):
            load_checkpoint({k: v for k, v in state.items() if k != key})
    with pytest.raises(ValueError, match=r"has no 7\.weight"):
        load_checkpoint(state | {"7.weight": torch.ones(2)})
    with pytest.raises(ValueError, match="input_scale must be positive"):
        load_checkpoint(state | {"input_scale": torch.zeros(16)}, standardised=False)
    with pytest.raises(ValueError, match="flatten_order must be"):
        load_checkpoint(state, flatten_order="rows")
