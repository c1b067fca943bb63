"""Which W makes the certificate hold for every value of the free tensors?

Revay, Wang and Manchester (2020), section 4.2, equations (15) to (17), extended by a
feed-through D. Symbols: docs/glossary.md.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from lben.parameterizations.equilibrium import EquilibriumParameterization
from lben.weights import DenseWeights, check_epsilon, check_gamma


class DirectParameterization(EquilibriumParameterization[DenseWeights]):
    """Free tensors U, C, V, N, d, X, b, b_y of a Lipschitz, well-posed or monotone layer.

    With Λ = diag eᵈ, R = γI − DᵀD/γ and G = ΛU + CᵀD/γ,

        W = I − Λ⁻¹ ( ½CᵀC/γ + ½G R⁻¹Gᵀ + VᵀV + εΛ + N − Nᵀ ),

    Then M(Λ, γ) has the Schur complement 2VᵀV + 2εΛ ≻ 0. One formula makes three families:

    - gamma given: x ↦ y is γ-Lipschitz in l2 (LBEN);
    - gamma None: without the C and U terms; well-posed, no bound;
    - gamma None and learn_metric False: Λ = I as well (monDEQ, Winston and Kolter 2020).

    Note [γ is the unit of y]
    The free tensors are those of a layer with γ = 1, whose y is multiplied by γ. So C, D, b_y and Λ
    are γ times what the formulas give at γ = 1; in the formulas at γ, V is √γ times and N is γ
    times the stored tensor. W and z are the same at every γ; so is training, up to the size of y.

    At γ = 1 the feed-through is D = L⁻¹X with LLᵀ = I + XXᵀ. Then ‖D‖₂ < 1 for every X, and
    R⁻¹ = I + XᵀX needs no inverse.

    Args:
        in_features: p.
        hidden_features: n.
        out_features: q.
        gamma: l2 Lipschitz bound, or None.
        feedthrough: whether y has a term Dx (needs gamma).
        learn_metric: whether Λ is trained; otherwise Λ = γI, or I without γ.
        epsilon: slack; I − W ⪰ εI in the Λ norm, so m ≥ ε.
        device, dtype: as in torch.nn.

    Raises:
        ValueError: if a size or epsilon or gamma is not positive, or feedthrough has no gamma.

    Reference:
        Revay, Wang and Manchester (2020), "Lipschitz bounded equilibrium networks", section 4.2,
        equations (15) to (17); Winston and Kolter (2020) for Λ = I.

    Example:
        >>> import torch
        >>> from lben import certify
        >>> from lben.parameterizations import DirectParameterization
        >>> _ = torch.manual_seed(0)
        >>> weights = DirectParameterization(4, 6, 2, gamma=2.0)()
        >>> tuple(weights.W.shape), certify(weights).bound
        ((6, 6), 2.0)
    """

    def __init__(
        self,
        in_features: int,
        hidden_features: int,
        out_features: int,
        *,
        gamma: float | None = 1.0,
        feedthrough: bool = False,
        learn_metric: bool = True,
        epsilon: float = 1e-3,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        for name, size in (
            ("in_features", in_features),
            ("hidden_features", hidden_features),
            ("out_features", out_features),
        ):
            if size < 1:
                raise ValueError(f"{name} must be at least 1, got {size}")
        self.gamma, self.epsilon = check_gamma(gamma), check_epsilon(epsilon)
        if feedthrough and gamma is None:
            raise ValueError("feedthrough needs gamma: D is bounded by it")
        n, p, q = hidden_features, in_features, out_features

        def parameter(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(shape, device=device, dtype=dtype))

        self.U, self.C = parameter(n, p), parameter(q, n)
        self.V, self.N = parameter(n, n), parameter(n, n)
        self.b, self.b_y = parameter(n), parameter(q)
        self.log_metric = parameter(n) if learn_metric else None
        self.X = parameter(q, p) if feedthrough else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw fresh parameters from torch's generator.

        U and C have orthonormal rows or columns, so the two terms of the bound have equal norms and
        I − W starts near ½(UUᵀ + CᵀC). V and N start at 0.3 times a random matrix of norm near 1.
        """
        spread = 0.3 / math.sqrt(self.V.shape[0])
        nn.init.orthogonal_(self.U)
        nn.init.orthogonal_(self.C)
        nn.init.normal_(self.V, std=spread)
        nn.init.normal_(self.N, std=spread)
        nn.init.zeros_(self.b)
        nn.init.zeros_(self.b_y)
        if self.log_metric is not None:
            nn.init.zeros_(self.log_metric)
        if self.X is not None:
            nn.init.normal_(self.X, std=0.1 / math.sqrt(self.X.shape[1]))

    def forward(self) -> DenseWeights:
        """Return the explicit weights with bound γ, differentiable in the free tensors."""
        Lambda = torch.ones_like(self.b) if self.log_metric is None else self.log_metric.exp()
        D, bound_term = self._bound_term(Lambda)
        monotone = torch.addmm(self.N - self.N.T, self.V.T, self.V) + bound_term
        W = -monotone / Lambda[:, None]
        W = W + (1 - self.epsilon) * torch.eye(W.shape[0], dtype=W.dtype, device=W.device)
        unit = None if self.gamma is None else 1.0
        weights = DenseWeights(
            W=W, U=self.U, b=self.b, C=self.C, D=D, b_y=self.b_y, Lambda=Lambda, gamma=unit
        )
        return weights if self.gamma is None else weights.scale(self.gamma)

    def _bound_term(self, Lambda: Tensor) -> tuple[Tensor | None, Tensor | float]:
        """Return D and ½CᵀC + ½G R⁻¹Gᵀ at γ = 1."""
        if self.gamma is None:
            return None, 0.0
        D, G = None, Lambda[:, None] * self.U
        if self.X is not None:
            X, identity = self.X, torch.eye(len(self.X), dtype=G.dtype, device=G.device)
            root = torch.linalg.cholesky(identity + X @ X.T)
            D = torch.linalg.solve_triangular(root, X, upper=False)
            G = G + self.C.T @ D
            G = torch.cat([G, G @ X.T], dim=1)  # G R⁻¹Gᵀ = GGᵀ + GXᵀXGᵀ
        return D, (self.C.T @ self.C + G @ G.T) / 2

    @torch.no_grad()
    def right_inverse(self, weights: DenseWeights) -> None:
        """Set the free tensors so that `forward` returns the given weights up to rounding.

        Args:
            weights: of the same sizes, with the same γ, and D where this one has a feed-through.

        Raises:
            ValueError: if gamma or the presence of D differs, Λ is not γI although it is not
                learned, or the weights do not satisfy the certificate with slack εΛ.
        """
        if weights.gamma != self.gamma:
            raise ValueError(f"gamma is {self.gamma} here and {weights.gamma} in the weights")
        if (weights.D is None) != (self.X is None):
            raise ValueError("feed-through D must be present in both, or in neither")
        if self.gamma is not None:  # Note [γ is the unit of y]
            weights = weights.divide(self.gamma)
        if self.log_metric is not None:
            self.log_metric.copy_(weights.Lambda.log())
        elif not torch.equal(weights.Lambda, torch.ones_like(weights.Lambda)):
            own = "Λ = I" if self.gamma is None else f"Λ = I times {self.gamma:g}"
            raise ValueError(
                f"this parameterization has the fixed {own}, and the weights have another Λ: build "
                "it with learn_metric=True"
            )
        for name in ("U", "C", "b", "b_y"):
            getattr(self, name).copy_(getattr(weights, name))
        if self.X is not None and weights.D is not None:
            scaled = weights.D
            gap = torch.eye(len(scaled), dtype=scaled.dtype, device=scaled.device)
            gap -= scaled @ scaled.T
            root, failed = torch.linalg.cholesky_ex(gap)
            if int(failed):
                raise ValueError(f"‖D‖₂ must be below gamma = {self.gamma}")
            self.X.copy_(torch.linalg.solve_triangular(root, scaled, upper=False))
        Lambda = weights.Lambda
        _, bound_term = self._bound_term(Lambda)
        rest = -Lambda[:, None] * weights.W - bound_term
        rest.diagonal().add_((1 - self.epsilon) * Lambda)
        values, vectors = torch.linalg.eigh(0.5 * (rest + rest.T))
        noise = 100 * torch.finfo(rest.dtype).eps * float(values.abs().max())
        if float(values[0]) < -noise:
            raise ValueError(
                "the weights do not satisfy the certificate with slack εΛ: smallest eigenvalue "
                f"{float(values[0]):.3g} with epsilon = {self.epsilon}"
            )
        self.V.copy_(values.clamp_min(0).sqrt()[:, None] * vectors.T)
        self.N.copy_(0.25 * (rest - rest.T))
