"""Spectra times matrices, and inverses, in C++ and in PyTorch."""

import pytest
import torch

from solvers.native import Build, build, spectral, status

SIZES = [(1, 1, 1), (3, 5, 7), (33, 17, 9), (70, 4, 40), (5, 81, 13), (32, 6, 8)]


def exact(symbols, spectrum):
    return torch.einsum("fij,bjf->bif", symbols.to(torch.complex128), spectrum.to(torch.complex128))


def random(*shape, dtype=torch.complex64):
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(sum(shape)))


@pytest.fixture(params=["compiled", "torch"])
def way(request, monkeypatch):
    if request.param == "torch":
        monkeypatch.setattr(spectral, "build", lambda: Build(None, "no compiled kernels"))
    elif build().kernels is None:
        pytest.skip(f"no compiled kernels here: {status()}")
    return request.param


@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128])
@pytest.mark.parametrize(("batch", "c", "f"), SIZES)
def test_every_frequency_is_multiplied_by_its_symbol(way, batch, c, f, dtype):
    symbols, spectrum = random(f, c, c, dtype=dtype), random(batch, c, f, dtype=dtype)
    wanted = exact(symbols, spectrum)
    rounding = 4 * (c + 4) * torch.finfo(dtype).eps
    allowed = rounding * exact(symbols.abs(), spectrum.abs()).real
    found = spectral.product(symbols, spectrum)
    assert found.shape == (batch, c, f)
    assert ((found - wanted).abs() <= allowed).all()


def test_any_layout_is_accepted(way):
    symbols, spectrum = random(9, 5, 5), random(6, 5, 9)
    wanted = spectral.product(symbols.mT.conj().resolve_conj().contiguous(), spectrum)
    torch.testing.assert_close(spectral.product(symbols.mH, spectrum), wanted)
    other = spectrum.permute(2, 1, 0).contiguous().permute(2, 1, 0)
    torch.testing.assert_close(spectral.product(symbols.mH, other), wanted)
    part = random(12, 5, 9)[::2]
    wanted = spectral.product(symbols, part.contiguous())
    torch.testing.assert_close(spectral.product(symbols, part), wanted)


def test_nan_stays_with_its_sample_and_frequency(way):
    symbols, spectrum = random(9, 5, 5), random(6, 5, 9)
    spectrum[2, 3, 4] = torch.nan
    hit = spectral.product(symbols, spectrum).abs().isnan().nonzero()
    assert {(b, f) for b, _, f in hit.tolist()} == {(2, 4)}


def test_the_product_does_not_depend_on_the_number_of_threads():
    symbols, spectrum = random(30, 7, 7), random(40, 7, 30)
    threads, found = torch.get_num_threads(), []
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            found.append(spectral.product(symbols, spectrum))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128])
@pytest.mark.parametrize(("f", "c"), [(1, 1), (5, 2), (3, 16), (7, 17), (4, 81), (2, 40)])
def test_inverses_without_pivots(way, f, c, dtype):
    A = random(f, c, c, dtype=torch.complex128)
    A = 0.3 * (A - A.mH) + A @ A.mH / c + 0.5 * torch.eye(c)  # of positive definite symmetric part
    A = A.to(dtype)
    condition = float(torch.linalg.cond(A).max())
    inverse = spectral.inverses(A).to(torch.complex128)
    wanted = torch.linalg.inv(A.to(torch.complex128))
    error = torch.linalg.matrix_norm(inverse - wanted) / torch.linalg.matrix_norm(wanted)
    assert float(error.max()) <= 4 * c * condition * torch.finfo(dtype).eps
    transposed = spectral.inverses(A.mH)
    torch.testing.assert_close(
        transposed,
        inverse.mH.resolve_conj().to(dtype),
        rtol=0,
        atol=1e-5 if dtype == torch.complex64 else 1e-12,
    )


def test_a_zero_pivot_is_not_finite(way):
    A = torch.eye(20, dtype=torch.complex64).roll(1, 0)[None]
    if way == "compiled":
        assert not torch.isfinite(spectral.inverses(A).abs().sum())


@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128])
def test_pivots_of_any_size(way, dtype):
    for size in (1e-30, 1e30) if dtype == torch.complex64 else (1e-200, 1e200):
        A = size * (torch.eye(3) + 0.1j * torch.ones(3, 3)).to(torch.complex128)[None]
        inverse = spectral.inverses(A.to(dtype)).to(torch.complex128)
        torch.testing.assert_close(inverse @ A, torch.eye(3)[None].to(inverse), rtol=0, atol=1e-5)


def test_what_does_not_fit_is_refused(way):
    symbols, spectrum = random(9, 5, 5), random(6, 5, 9)
    for one, other in [
        (symbols.to(torch.complex128), spectrum),
        (symbols[:8], spectrum),
        (symbols[:, :4, :4], spectrum),
        (symbols, spectrum[0]),
    ]:
        with pytest.raises(ValueError, match="do not fit a spectrum"):
            spectral.product(one, other)
    with pytest.raises(ValueError, match="must be"):
        spectral.inverses(symbols[:, :4])


def test_forward_mode_keeps_its_tangents():
    symbols, spectrum = random(4, 3, 3), random(2, 3, 4)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(spectrum, spectrum)
        found = torch.autograd.forward_ad.unpack_dual(spectral.product(symbols, dual))
    torch.testing.assert_close(found.tangent, found.primal)


def test_gradients_and_function_transforms_take_the_product_of_torch():
    symbols = random(4, 3, 3, dtype=torch.complex128).requires_grad_()
    spectrum = random(2, 3, 4, dtype=torch.complex128).requires_grad_()
    assert torch.autograd.gradcheck(spectral.product, (symbols, spectrum))
    batched = torch.func.vmap(lambda x: spectral.product(symbols.detach(), x))
    several = random(5, 2, 3, 4, dtype=torch.complex128)
    wanted = torch.stack([spectral.product(symbols.detach(), x) for x in several])
    torch.testing.assert_close(batched(several), wanted)
