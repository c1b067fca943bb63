"""Modules of PyTorch become networks that compute the same, or are refused by name."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lben import (
    AOLConv2d,
    AveragePooling,
    ChannelPadding,
    CPLLinear,
    EquilibriumLinear,
    FeedforwardClassifierConfig,
    Flatten,
    GroupSort,
    Householder,
    InvertibleDownsampling,
    LipschitzSequential,
    Normalize,
    NormalizedLinear,
    NormPooling,
    OrthogonalConv2d,
    SandwichLinear,
    SLLConv2d,
    SLLLinear,
    SpectralLinear,
)
from lben.interop import ConversionError, compare_outputs, from_torch


class Residual(nn.Module):
    """z ↦ ReLU(z + W₂ReLU(W₁z)), twice, between two maps."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(5, 6), nn.Linear(6, 3)
        self.inner = nn.ModuleList(nn.Linear(6, 6) for _ in range(4))

    def forward(self, x):
        x = self.first(x)
        for k in (0, 2):
            x = F.relu(x + self.inner[k + 1](torch.relu(self.inner[k](x))))
        return self.last(x)


class Functional(nn.Module):
    """Functional forms, operators, methods, constants and in-place operations."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(2, 4, 3, padding=1, bias=False)
        self.weight = nn.Parameter(torch.randn(7, 4 * 6 * 6))
        self.register_buffer("mean", torch.rand(2, 1, 1))

    def forward(self, x):
        x = (x - self.mean) / 0.5
        x = self.conv(x)
        y = F.relu(x, inplace=True) * 2 - 1
        y += x
        z = torch.cat([y, -x, torch.zeros_like(y)], dim=1)[:, 2:6]
        z = F.max_pool2d(z, 2, stride=1).clamp(-0.5, 3.0)
        z = F.pad(z, (1, 0, 0, 1))
        z = z.permute(0, 2, 3, 1).contiguous().view(z.size(0), -1)
        a, b = (z @ self.weight.T).chunk(2, dim=1) if False else (z @ self.weight.T, z[:, :7])
        return torch.maximum(a, b.sigmoid()) + torch.minimum(a, b) + z.mean(1, keepdim=True)


class Concatenated(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Conv2d(1, 2, 3, padding=1), nn.Conv2d(3, 2, 1)

    def forward(self, x):
        x = torch.cat((x, torch.tanh(self.one(x))), 1)
        return torch.flatten(torch.stack((self.two(x), self.two(x).abs()), 1), 1)


class InPlace(nn.Module):
    """It writes to its input."""

    def forward(self, x):
        return x.relu_().add_(1).clamp_(min=0.2)


class Gated(nn.Module):
    def forward(self, x):
        y = torch.tanh(2 * x)
        return x * torch.sigmoid(x) + F.hardsigmoid(y) * y


def sequential(*layers):
    return nn.Sequential(*layers)


IMAGES, VECTORS = (3, 7, 8), (6,)
LAYERS = [
    (nn.Linear(6, 4), VECTORS),
    (nn.Linear(6, 4, bias=False), (3, 6)),
    (sequential(nn.Linear(6, 5), nn.Linear(5, 4)), VECTORS),
    (nn.Identity(), VECTORS),
    (nn.Conv1d(3, 4, 3, stride=2, padding=2, dilation=2), (3, 9)),
    (nn.Conv2d(3, 4, 3), IMAGES),
    (nn.Conv2d(3, 4, (3, 2), stride=(2, 1), padding=(1, 0), dilation=(1, 2)), IMAGES),
    (nn.Conv2d(3, 6, 3, groups=3, padding="same"), IMAGES),
    (nn.Conv2d(3, 6, 4, padding="same"), IMAGES),
    (nn.Conv2d(3, 6, 3, padding="valid"), IMAGES),
    (nn.Conv2d(3, 2, 3, padding=1, padding_mode="circular"), IMAGES),
    (nn.Conv2d(3, 2, 3, padding=2, padding_mode="reflect", stride=2), IMAGES),
    (nn.Conv2d(3, 2, 3, padding=1, padding_mode="replicate", bias=False), IMAGES),
    (nn.Conv3d(2, 3, 2, padding=1), (2, 3, 4, 3)),
    (nn.ConvTranspose2d(3, 4, 3, stride=2, padding=1, output_padding=1), IMAGES),
    (nn.ConvTranspose2d(4, 6, (2, 3), groups=2, dilation=2), (4, 5, 3)),
    (nn.ConvTranspose1d(3, 2, 3, bias=False), (3, 4)),
    (nn.BatchNorm1d(6), VECTORS),
    (nn.BatchNorm1d(3, affine=False), (3, 4)),
    (nn.BatchNorm2d(3), IMAGES),
    (sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU()), IMAGES),
    (nn.AvgPool1d(2), (3, 6)),
    (nn.AvgPool2d(3, 2, 1), IMAGES),
    (nn.AvgPool2d(3, 2, 1, count_include_pad=False), IMAGES),
    (nn.AvgPool2d(3, 2, 1, ceil_mode=True), IMAGES),
    (nn.AvgPool2d(3, 2, 1, ceil_mode=True, count_include_pad=False), IMAGES),
    (nn.AvgPool2d(2, divisor_override=3), IMAGES),
    (nn.AdaptiveAvgPool1d(4), (3, 7)),
    (nn.AdaptiveAvgPool2d((3, None)), IMAGES),
    (nn.AdaptiveAvgPool2d(1), IMAGES),
    (nn.MaxPool1d(3, 2), (3, 8)),
    (nn.MaxPool2d(2), IMAGES),
    (nn.MaxPool2d(3, 2, 1), IMAGES),
    (nn.MaxPool2d(3, 2, ceil_mode=True), IMAGES),
    (nn.MaxPool2d(2, 1, dilation=2), IMAGES),
    (nn.AdaptiveMaxPool2d((3, 4)), IMAGES),
    (nn.ZeroPad2d((1, 2, 0, 1)), IMAGES),
    (nn.ConstantPad2d(1, 0.5), IMAGES),
    (nn.ReflectionPad2d(2), IMAGES),
    (nn.ReplicationPad2d(1), IMAGES),
    (nn.CircularPad2d((1, 0, 2, 0)), IMAGES),
    (nn.ZeroPad2d(-1), IMAGES),
    (nn.PixelUnshuffle(2), (1, 4, 4)),
    (nn.PixelShuffle(2), (4, 3, 3)),
    (nn.ChannelShuffle(2), (4, 3, 3)),
    (nn.Unflatten(1, (2, 3)), VECTORS),
    (sequential(nn.Unfold(2), nn.Flatten()), IMAGES),
    (nn.Dropout(0.5), VECTORS),
    (nn.PReLU(), IMAGES),
    (nn.PReLU(3), IMAGES),
    (nn.PReLU(6), VECTORS),
    *[
        (layer, VECTORS)
        for layer in (
            nn.ReLU(), nn.ReLU(inplace=True), nn.LeakyReLU(0.1), nn.RReLU(), nn.ReLU6(),
            nn.Hardtanh(-0.5, 2.0), nn.Tanh(), nn.Sigmoid(), nn.LogSigmoid(), nn.Softplus(),
            nn.Softplus(2.0, 30.0), nn.ELU(), nn.ELU(0.5), nn.SELU(), nn.CELU(2.0), nn.GELU(),
            nn.GELU("tanh"), nn.SiLU(), nn.Mish(), nn.Hardswish(), nn.Hardsigmoid(),
            nn.Softsign(), nn.Softshrink(0.2),
        )
    ],
    (nn.utils.parametrizations.weight_norm(nn.Linear(6, 4)), VECTORS),
    (nn.utils.parametrizations.spectral_norm(nn.Conv2d(3, 4, 3)), IMAGES),
    (Residual(), (5,)),
    (Functional(), (2, 6, 6)),
    (Concatenated(), (1, 4, 5)),
    (Gated(), VECTORS),
    (InPlace(), VECTORS),
    (nn.Upsample(scale_factor=2), IMAGES),
    (SLLLinear(6, 8), VECTORS),
    (CPLLinear(6, 8), VECTORS),
    (SandwichLinear(6, 4), VECTORS),
    (SpectralLinear(6, 4), VECTORS),
    (NormalizedLinear(6, 4), VECTORS),
    (GroupSort(2), VECTORS),
    (Householder(6), VECTORS),
    (
        LipschitzSequential(
            Normalize((0.5,) * 3, (0.25,) * 3), ChannelPadding(4), InvertibleDownsampling(2),
            SLLConv2d(16, 3), AOLConv2d(16, 4), AveragePooling(2), Flatten(),
            NormalizedLinear(16, 3, kind="orthonormal"),
        ),
        (3, 8, 8),
    ),
    (
        FeedforwardClassifierConfig(
            shape=(1, 4, 4), classes=3, mean=(0.5,), std=(0.25,), channels=(2,), depths=(1,),
            conv_hidden=2, pool=2, dense_depth=1, dense_hidden=4,
        ).build(),
        (1, 4, 4),
    ),
]  # fmt: skip


def prepare(model):
    """Return the model in eval mode, with statistics of its normalisations that are not trivial."""
    torch.manual_seed(1)
    for name, value in [*model.named_buffers(), *model.named_parameters()]:
        with torch.no_grad():
            if "running" in name:
                value.uniform_(0.5, 2.0)
            elif value.is_floating_point() and isinstance(
                model, nn.BatchNorm1d | nn.BatchNorm2d | nn.PReLU
            ):
                value.add_(0.3 * torch.randn_like(value))
    return model.eval()


@pytest.mark.filterwarnings("ignore:Using padding=.same.")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("model", "shape"), LAYERS, ids=lambda v: str(v)[:60] if isinstance(v, nn.Module) else None
)
def test_a_network_computes_what_its_module_computes(model, shape, dtype):
    model = prepare(model)
    if dtype == torch.float64:
        try:
            model = model.double()
        finally:
            model = model.float() if dtype == torch.float32 else model
    network = from_torch(model, shape)  # compares the outputs itself
    x = torch.randn(4, *shape, dtype=dtype)
    with torch.no_grad():
        y = model(x.clone()).flatten(1).double().numpy()
    np.testing.assert_allclose(network.evaluate(x.double().numpy()), y, rtol=1e-4, atol=1e-4)
    off = 1e-8 if isinstance(model, nn.Softplus) else 0.0
    assert compare_outputs(model, network, widen=False, unit_error=off).share <= 1
    model.float()


def test_the_jump_of_softplus_is_no_part_of_its_network():
    network = from_torch(sequential(nn.Softplus(), nn.Linear(6, 1)).eval(), VECTORS)
    x = np.full((2, 6), 20.0)
    x[1] += 1e-12
    assert abs(np.diff(network.evaluate(x)[:, 0])[0]) < 1e-10


def test_numbers_of_single_modules_are_exact():
    model = sequential(
        nn.Conv2d(1, 2, 3, padding=1, padding_mode="circular"), nn.ReLU(), nn.AvgPool2d(3),
        nn.Flatten(), nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, 3),
    ).eval()  # fmt: skip
    network = from_torch(model, (1, 4, 4))
    first, second = (block.affine for block in network.blocks)
    assert first.exact
    assert network.output.exact
    assert not second.exact  # means of nine, times weights
    for stored, affine in ((model[0], first), (model[6], network.output)):
        found = {abs(float(v)) for m in affine.matrices.values() for v in np.ravel(
            m.data if hasattr(m, "indptr") else m)}  # fmt: skip
        assert found == {abs(float(v)) for v in stored.weight.detach().ravel()}


def test_residual_sums_stay_exact():
    network = from_torch(Residual().eval(), (5,))
    assert all(block.affine.exact for block in network.blocks[2:3])
    assert [sorted(b.affine.matrices) for b in network.blocks] == [[0], [0, 1], [2], [2, 3]]


def test_numbers_of_several_modules_lie_within_their_radius():
    from fractions import Fraction

    model = sequential(nn.Linear(3, 4), nn.Linear(4, 5), nn.Linear(5, 2)).double().eval()
    network = from_torch(model, (3,))
    exact = [[[Fraction(v) for v in row] for row in layer.weight.tolist()] for layer in model]

    def times(a, b):
        return [[sum(x * y for x, y in zip(row, col, strict=True)) for col in zip(*b, strict=True)]
                for row in a]  # fmt: skip

    found = network.output.enclosure(0)
    for i, row in enumerate(times(exact[2], times(exact[1], exact[0]))):
        for j, value in enumerate(row):
            assert abs(value - Fraction(found.mid[i, j])) <= Fraction(found.radius[i, j])


def test_sparse_maps_have_one_order_of_entries():
    model = sequential(nn.Conv2d(3, 4, 3), nn.AvgPool2d(2), nn.ReLU(), nn.MaxPool2d(2)).eval()
    network = from_torch(model, (3, 9, 9))
    fingerprint = network.fingerprint
    for affine in (*(block.affine for block in network.blocks), network.output):
        for j, matrix in affine.matrices.items():
            assert matrix.has_sorted_indices
            assert affine.sizes[j].has_sorted_indices
            assert not np.shares_memory(matrix.indices, affine.sizes[j].indices) or (
                matrix is affine.sizes[j]
            )
    assert from_torch(model, (3, 9, 9)).fingerprint == fingerprint


def test_maxima_are_exact_units():
    network = from_torch(nn.MaxPool2d(2).eval(), (1, 4, 4))
    assert network.units == 12  # three for each of four outputs
    assert all(b.affine.exact for b in network.blocks)
    assert network.output.exact


def test_blocks_that_nothing_reads_are_left_out():
    network = from_torch(Gated().eval(), VECTORS)
    assert [block.activation.name for block in network.blocks] == ["Tanh", "SiLU", "Hardswish"]


class ReshapesInPlace(nn.Module):
    def forward(self, x):
        x.unsqueeze_(1)
        return x


class Multiplied(nn.Module):
    def forward(self, x):
        return x * torch.sigmoid(2 * x)


class Branching(nn.Module):
    def forward(self, x):
        return x if (x > 0).all() else -x


class Reader(nn.Module):
    def forward(self, x):
        return x * x.item()


class Attention(nn.Module):
    def forward(self, x):
        return x.transpose(1, 2) @ x


class MixesSamples(nn.Module):
    def forward(self, x):
        return x.reshape(-1)[None]


class TwoOutputs(nn.Module):
    def forward(self, x):
        return x, x


class Constant(nn.Module):
    def forward(self, x):
        return torch.zeros(3)


class Halves(nn.Module):
    def forward(self, x):
        return x.half()


class Scripted(nn.Module):
    def __init__(self):
        super().__init__()
        self.function = torch.jit.script(scripted)

    def forward(self, x):
        return self.function(x)


def scripted(x):
    return torch.relu(x) + torch.relu(x)


def named(*layers):
    return sequential(nn.Identity(), sequential(*layers))


REFUSED = [
    (named(nn.LayerNorm(6)), VECTORS, r"layer_norm, in LayerNorm \(1\.0\), cannot.*batch normalis"),
    (named(nn.GroupNorm(3, 6)), VECTORS, r"group_norm, in GroupNorm \(1\.0\)"),
    (named(nn.Softmax(1)), VECTORS, r"softmax, in Softmax \(1\.0\).*certify the logits"),
    (named(nn.LPPool2d(2, 2)), IMAGES, r"in LPPool2d \(1\.0\)"),
    (named(NormPooling(1)), IMAGES, r"in NormPooling \(1\.0\)"),
    (named(GroupSort(3)), VECTORS, r"sort, in GroupSort \(1\.0\)"),
    (named(nn.Softplus(1.0, 2.0)), VECTORS, r"softplus, in Softplus \(1\.0\).*jumps by 1.3e-01"),
    (named(nn.MaxPool2d(2, return_indices=True)), IMAGES, r"max_pool2d.*return_indices must be"),
    (named(nn.AdaptiveMaxPool2d(2, return_indices=True)), IMAGES, "return_indices must be"),
    (named(nn.UpsamplingBilinear2d(scale_factor=2)), IMAGES, "interpolate, in Upsampling"),
    (named(nn.LSTM(6, 2)), (3, 6), r"lstm, in LSTM \(1\.0\)"),
    (named(nn.Hardshrink()), VECTORS, r"hardshrink, in Hardshrink \(1\.0\)"),
    (named(OrthogonalConv2d(3, 3, image=(7, 8))), IMAGES, r"in OrthogonalConv2d \(1\.0\)"),
    (named(EquilibriumLinear(6, 4, 2)), VECTORS, r"EquilibriumLinear \(1\.0\) solves"),
    (named(Branching()), VECTORS, r"Branching \(1\.0\).*depends on the numbers"),
    (named(Reader()), VECTORS, r"item, in Reader \(1\.0\).*control flow"),
    (ReshapesInPlace(), VECTORS, "unsqueeze_, in Reshapes.*changes a shape in place"),
    (Multiplied(), VECTORS, "mul, in Multiplied.*no function of one number"),
    (Attention(), (2, 3), "matmul, in Attention, cannot.*both factors depend"),
    (MixesSamples(), VECTORS, "mixes samples of a batch"),
    (TwoOutputs(), VECTORS, "must return one tensor.*tuple"),
    (Constant(), VECTORS, "must return one tensor"),
    (Halves(), VECTORS, "half, in Halves"),
    (Scripted(), VECTORS, "Scripted cannot be converted.*TorchScript"),
    (named(nn.Linear(6, 2)), (5,), r"linear, in Linear \(1\.0\).*takes 6 features.*\(5,\)"),
    (named(nn.Conv2d(3, 2, 3)), (1, 7, 7), r"conv2d, in Conv2d \(1\.0\).*takes 3 channels"),
    (named(nn.Conv2d(3, 2, 3)), (3, 2, 2), r"window of 3 taps does not fit an axis of 2"),
    (named(nn.Conv2d(3, 2, 3)), (21,), r"takes samples of 3 dimensions"),
    (named(nn.BatchNorm2d(3)), (6,), r"BatchNorm2d \(1\.0\).*does example_shape fit\?"),
    (nn.Linear(6, 2), (0,), "positive sizes"),
    (nn.Linear(6, 2), (), "positive sizes"),
]


@pytest.mark.parametrize(("model", "shape", "message"), REFUSED, ids=lambda v: str(v)[:40])
def test_what_cannot_be_converted_is_refused_by_name_and_path(model, shape, message):
    with pytest.raises(ConversionError, match=r"(?s)" + message):
        from_torch(model.eval(), shape)


@pytest.mark.parametrize(
    "layer",
    [
        nn.BatchNorm1d(6), nn.Dropout(), nn.RReLU(),
        nn.utils.parametrizations.spectral_norm(nn.Linear(6, 6)),
    ],
)  # fmt: skip
def test_training_mode_is_refused(layer):
    model = sequential(nn.Linear(6, 6), layer)
    with pytest.raises(ConversionError, match=r"\(1.*is in training mode.*model.eval"):
        from_torch(model, VECTORS)
    if isinstance(layer, nn.BatchNorm1d):
        assert layer.num_batches_tracked == 0


def test_statistics_of_batches_are_refused_also_in_eval_mode():
    with pytest.raises(ConversionError, match="statistics of a batch"):
        from_torch(nn.BatchNorm1d(6, track_running_stats=False).eval(), VECTORS)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_numbers_that_are_not_finite_are_refused(value):
    model = sequential(nn.Linear(6, 2)).eval()
    with torch.no_grad():
        model[0].bias[1] = value
    with pytest.raises(ConversionError, match=r"0\.bias contains NaN or Inf"):
        from_torch(model, VECTORS)


@pytest.mark.parametrize("dtype", [torch.float16, torch.complex64])
def test_other_dtypes_are_refused(dtype):
    with pytest.raises(ConversionError, match=f"weight is {dtype}"):
        from_torch(nn.Linear(6, 2, dtype=dtype), VECTORS)


def test_the_meta_device_is_refused():
    with pytest.raises(ConversionError, match="meta device and has no numbers"):
        from_torch(nn.Linear(6, 2, device="meta"), VECTORS)


def test_arguments_of_other_types_are_refused():
    with pytest.raises(TypeError, match=r"takes a torch.nn.Module, got builtin"):
        from_torch(torch.relu, VECTORS)
    with pytest.raises(TypeError, match="sequence of integers"):
        from_torch(nn.Linear(6, 2), (6.0,))
    with pytest.raises(TypeError, match=r"such as \(784,\), got 6"):
        from_torch(nn.Linear(6, 2), 6)


def test_a_module_is_left_as_it_was():
    model = sequential(nn.Conv2d(3, 2, 3), nn.ReLU(inplace=True)).eval()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    from_torch(model, IMAGES)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in model.modules())
    with pytest.raises(ConversionError):
        from_torch(model, (3,))
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in model.modules())


def test_products_that_underflow_are_refused():
    model = sequential(nn.Linear(2, 2), nn.Linear(2, 2)).double().eval()
    with torch.no_grad():
        for layer in model:
            layer.weight.fill_(1e-160)
    with pytest.raises(ConversionError, match="loses their digits"):
        from_torch(model, (2,))
