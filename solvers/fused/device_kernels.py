"""The loop of a splitting on a CUDA device, in Triton: from v to z without the host.

    x ← (1 − θ)x + θ(s + ρ(x)M),     z = prox(x),

as `solvers.fused.iteration.Iteration` says. A program has a few samples of the batch to itself. It
iterates, measures the residual where the rate that it sees predicts the end (the rules of
`solvers.loop`), keeps z of every sample at the check at which it passes, and leaves when all of its
samples have: no host synchronisation, and one launch per solve.

- `resident`: few units. M stays on the chip.
- `tiled`: more units. x of the samples moves through memory that its program alone uses; M and W
  come from the second cache, tile by tile.
- `advance`: one step of all samples, for matrices too large for the cache: a matrix product with ρ
  on its way in, and the relaxation and the shift on its way out.
"""

from __future__ import annotations

import triton
import triton.language as tl

# Numbers come in a tensor of the problem's dtype, in this order: arguments would be float32.
NUMBERS = (
    "negative", "theta", "tol", "noise", "limit", "one", "infinity", "least", "most", "size", "own",
)  # fmt: skip


@triton.jit
def _prox(x, factor, SLOPES: tl.constexpr):
    """The prox of σ(v) = max(v, av) or dv: linear on either side of zero, or everywhere."""
    return x * factor if SLOPES else tl.where(x > 0, x, x * factor)


@triton.jit
def _rho(x, factor, REFLECTED: tl.constexpr, SLOPES: tl.constexpr):
    z = _prox(x, factor, SLOPES)
    return 2 * z - x if REFLECTED else z


@triton.jit
def _factor(slope_ptr, negative, alpha, at, inside, SLOPES: tl.constexpr):
    """d and d / (d + α(1 − d)): the slope of σ and that of its prox, of negatives or of all."""
    if SLOPES:
        d = tl.load(slope_ptr + at, mask=inside, other=0.0)
    else:
        d = tl.zeros_like(alpha) + negative
    return d, d / (d + alpha * (1 - d))


@triton.jit
def _unit(largest, least, most):
    """The power of two below the largest |v| of a sample: what v, x and z are divided by.

    σ is positively homogeneous here, and in this unit no sum of squares overflows or vanishes.
    """
    if largest.dtype == tl.float64:
        bits = largest.to(tl.int64, bitcast=True) & 0x7FF0000000000000
        unit = bits.to(tl.float64, bitcast=True)
    else:
        bits = largest.to(tl.int32, bitcast=True) & 0x7F800000
        unit = bits.to(tl.float32, bitcast=True)
    # Normal, with a normal inverse; 1 for 0 and NaN.
    return tl.where(largest > 0, tl.minimum(tl.maximum(unit, least), most), 1.0)


@triton.jit
def _residual(change, size_image, size_z):
    """‖z̃ − z‖, relative, from sums of squares; 0 where nothing is left."""
    size = tl.maximum(tl.sqrt(size_image), tl.sqrt(size_z))
    left = tl.sqrt(change)
    return left / tl.where(left == 0.0, 1.0, size)


@triton.jit
def _left(residual, before, size_image, size_z, active, own, tol):
    """A float32 residual less 16 roundoffs of v where those matter: float64 goes on from there."""
    size = tl.maximum(tl.sqrt(size_image), tl.sqrt(size_z))
    floor = own * tl.sqrt(active) / tl.where(size == 0.0, 1.0, size)
    return tl.where((floor > tol) & (residual > 0.5 * before), residual - floor, residual)


@triton.jit
def _rests(change, size_image, size_z, v, x, size_W, noise, tol):
    """Whether rounding of v, x and Wz may be what is left of ‖z̃ − z‖ above the tolerance."""
    size = tl.maximum(tl.sqrt(size_image), tl.sqrt(size_z))
    return tl.sqrt(change) - noise * (tl.sqrt(v) + tl.sqrt(x) + size_W * size) <= tol * size


@triton.jit
def _worst(residual, finished):
    """The largest residual of those that are not finished; infinite where one is not a number."""
    known = tl.where(residual == residual, residual, float("inf"))
    return tl.max(tl.where(finished != 0, 0.0, known), 0)


@triton.jit
def _next(step, worst, step_before, worst_before, tol, max_steps):
    """Where the slowest sample will pass if the rate stays, at most twice as far as now."""
    ahead = step.to(worst.dtype)
    if (worst > 0) & (worst < worst_before):
        rate = tl.log(worst / worst_before) / (step - step_before)
        ahead = tl.minimum(ahead, tl.maximum(tl.ceil(tl.log(tol / worst) / rate), 1.0))
    return tl.minimum(step + ahead.to(tl.int32), max_steps)


@triton.jit
def _judge(residual, rests, finished, step, mark, mark_step, tol, limit, max_steps):
    """Which samples pass at this check, and whether it is the last one of this program."""
    worst = _worst(residual, finished)
    last = (worst <= tol) | (step >= max_steps) | (worst == float("inf"))
    due = step >= mark_step * 5 // 4 + 64
    slow = due & (worst > 0.5 * mark)
    mark = tl.where(due, worst, mark)
    mark_step = tl.where(due, step, mark_step)
    open_ = tl.max(tl.where((finished != 0) | rests | (residual <= tol), 0, 1), 0)
    last = last | (slow & ((open_ == 0) | (worst <= limit)))
    passes = (finished == 0) & (tl.where(last, tol, residual) <= tol)
    return passes, last, worst, mark, mark_step


@triton.jit
def resident(
    v_ptr, start_ptr, m_ptr, w_ptr, alpha_ptr, root_ptr, slope_ptr,
    z_ptr, residual_ptr, steps_ptr, checks_ptr,
    samples, n, m_row, m_column, w_row, w_column,
    numbers_ptr, max_steps, first_check,
    DONE: tl.constexpr, REFLECTED: tl.constexpr, SLOPES: tl.constexpr, WARM: tl.constexpr,
    ROWS: tl.constexpr, UNITS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Solve for ROWS samples of at most UNITS units."""
    negative, theta, tol = tl.load(numbers_ptr), tl.load(numbers_ptr + 1), tl.load(numbers_ptr + 2)
    noise, limit = tl.load(numbers_ptr + 3), tl.load(numbers_ptr + 4)
    size_W, own_noise = tl.load(numbers_ptr + 9), tl.load(numbers_ptr + 10)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    unit = tl.arange(0, UNITS)
    inside = (row < samples)[:, None] & (unit < n)[None, :]
    at = row[:, None].to(tl.int64) * n + unit[None, :]
    square = (unit < n)[:, None] & (unit < n)[None, :]
    M = tl.load(m_ptr + unit[:, None] * m_row + unit[None, :] * m_column, mask=square, other=0.0)
    weights = w_ptr + unit[None, :] * w_row + unit[:, None] * w_column  # of Wᵀ, read at checks
    alpha = tl.load(alpha_ptr + unit, mask=unit < n, other=1.0)[None, :]
    root = tl.load(root_ptr + unit, mask=unit < n, other=0.0)[None, :]
    d, factor = _factor(slope_ptr, negative, alpha, at, inside, SLOPES)
    v = tl.load(v_ptr + at, mask=inside, other=0.0)
    unit_of = _unit(
        tl.max(tl.abs(v), 1), tl.load(numbers_ptr + 7), tl.load(numbers_ptr + 8)
    )[:, None]  # fmt: skip
    v = v / unit_of
    shift = alpha * v
    x = shift
    if WARM:
        z = tl.load(start_ptr + at, mask=inside, other=0.0) / unit_of
        if REFLECTED:
            WT = tl.load(weights, mask=square, other=0.0)
            x = z + alpha * (tl.dot(z, WT, input_precision=PRECISION) + v - z)
        else:
            x = shift + tl.dot(z, M, input_precision=PRECISION)
    if REFLECTED:
        shift += tl.dot(shift, M, input_precision=PRECISION)
    whole = tl.sum(root * v * root * v, 1)

    finished = (row >= samples).to(tl.int32)
    step, step_before, mark_step, checks = DONE, 0, 0, 0
    worst_before, mark = tl.load(numbers_ptr + 5), tl.load(numbers_ptr + 6)
    ahead = tl.minimum(first_check, max_steps)
    before = tl.zeros_like(whole) + mark
    running = True
    while running:
        for _ in range(ahead - step):
            image = tl.dot(_rho(x, factor, REFLECTED, SLOPES), M, input_precision=PRECISION)
            x = (1 - theta) * x + theta * (shift + image)
        step = ahead
        checks += 1
        whole_z = _prox(x, factor, SLOPES) * unit_of  # as it will be returned
        z = whole_z / unit_of
        WT = tl.load(weights, mask=square, other=0.0)
        image = _prox(tl.dot(z, WT, input_precision=PRECISION) + v, d, SLOPES)
        change, moved = root * (image - z), root * x / alpha
        shown = root * tl.where((image != 0) | (z != 0), v, 0.0)
        squares = tl.sum(change * change, 1)
        size_image, size_z = tl.sum(root * image * root * image, 1), tl.sum(root * z * root * z, 1)
        residual = _residual(squares, size_image, size_z)
        left = _left(residual, before, size_image, size_z, tl.sum(shown * shown, 1), own_noise, tol)
        before = residual
        rests = _rests(
            squares, size_image, size_z, whole, tl.sum(moved * moved, 1), size_W, noise, tol
        )
        passes, last, worst, mark, mark_step = _judge(
            left, rests, finished, step, mark, mark_step, tol, limit, max_steps
        )
        tl.store(z_ptr + at, whole_z, mask=inside & passes[:, None])
        tl.store(residual_ptr + row, residual, mask=passes)
        tl.store(steps_ptr + row, tl.zeros_like(row) + step, mask=passes)
        finished = finished | passes.to(tl.int32)
        ahead = _next(step, worst, step_before, worst_before, tol, max_steps)
        worst_before, step_before = worst, step
        running = last == 0
    tl.store(checks_ptr + tl.program_id(0), checks)


@triton.jit
def _product(
    x_ptr, x_row, slope_ptr, alpha_ptr, negative, a_ptr, a_row, a_column, row, unit, samples, n,
    SUM: tl.constexpr, REFLECTED: tl.constexpr, SLOPES: tl.constexpr,
    ROWS: tl.constexpr, UNITS: tl.constexpr, DEPTH: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """ρ(x)A, prox(x)A or xA (SUM "map", "weights" or "plain"), for some rows and columns."""
    total = tl.zeros((ROWS, UNITS), dtype=x_ptr.dtype.element_ty)
    for first in range(0, n, DEPTH):
        k = first + tl.arange(0, DEPTH)
        inside = (row < samples)[:, None] & (k < n)[None, :]
        x = tl.load(x_ptr + row[:, None].to(tl.int64) * x_row + k[None, :], mask=inside, other=0.0)
        if SUM != "plain":
            alpha = tl.load(alpha_ptr + k, mask=k < n, other=1.0)[None, :]
            at = row[:, None].to(tl.int64) * n + k[None, :]
            _, factor = _factor(slope_ptr, negative, alpha, at, inside, SLOPES)
            x = _rho(x, factor, REFLECTED and SUM == "map", SLOPES)
        mask = (k < n)[:, None] & (unit < n)[None, :]
        A = tl.load(a_ptr + k[:, None] * a_row + unit[None, :] * a_column, mask=mask, other=0.0)
        total += tl.dot(x, A, input_precision=PRECISION)
    return total


@triton.jit
def advance(
    x_ptr, shift_ptr, out_ptr, m_ptr, alpha_ptr, slope_ptr, samples, n, m_row, m_column,
    numbers_ptr,
    REFLECTED: tl.constexpr, SLOPES: tl.constexpr,
    ROWS: tl.constexpr, UNITS: tl.constexpr, DEPTH: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One step of ROWS samples and UNITS units, into other memory."""
    negative, theta = tl.load(numbers_ptr), tl.load(numbers_ptr + 1)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    unit = tl.program_id(1) * UNITS + tl.arange(0, UNITS)
    inside = (row < samples)[:, None] & (unit < n)[None, :]
    at = row[:, None].to(tl.int64) * n + unit[None, :]
    image = _product(
        x_ptr, n, slope_ptr, alpha_ptr, negative, m_ptr, m_row, m_column, row, unit, samples, n,
        "map", REFLECTED, SLOPES, ROWS, UNITS, DEPTH, PRECISION,
    )  # fmt: skip
    x = tl.load(x_ptr + at, mask=inside, other=0.0)
    shift = tl.load(shift_ptr + at, mask=inside, other=0.0)
    tl.store(out_ptr + at, (1 - theta) * x + theta * (shift + image), mask=inside)


@triton.jit
def tiled(
    v_ptr, start_ptr, m_ptr, w_ptr, alpha_ptr, root_ptr, slope_ptr,
    z_ptr, residual_ptr, steps_ptr, checks_ptr, own_ptr, shift_ptr,
    samples, n, m_row, m_column, w_row, w_column,
    numbers_ptr, max_steps, first_check,
    DONE: tl.constexpr, REFLECTED: tl.constexpr, SLOPES: tl.constexpr, WARM: tl.constexpr,
    ROWS: tl.constexpr, UNITS: tl.constexpr, DEPTH: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Solve for ROWS samples of any number of units; `own` is samples × 2 × n, `shift` as v."""
    negative, theta, tol = tl.load(numbers_ptr), tl.load(numbers_ptr + 1), tl.load(numbers_ptr + 2)
    noise, limit = tl.load(numbers_ptr + 3), tl.load(numbers_ptr + 4)
    size_W, own_noise = tl.load(numbers_ptr + 9), tl.load(numbers_ptr + 10)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    start = row[:, None].to(tl.int64) * n
    own = row[:, None].to(tl.int64) * (2 * n)
    whole = tl.zeros((ROWS,), dtype=v_ptr.dtype.element_ty)
    largest = tl.zeros_like(whole)
    for first in range(0, n, UNITS):
        unit = first + tl.arange(0, UNITS)
        inside = (row < samples)[:, None] & (unit < n)[None, :]
        v = tl.load(v_ptr + start + unit[None, :], mask=inside, other=0.0)
        largest = tl.maximum(largest, tl.max(tl.abs(v), 1))
    unit_of = _unit(largest, tl.load(numbers_ptr + 7), tl.load(numbers_ptr + 8))[:, None]
    for first in range(0, n, UNITS):
        unit = first + tl.arange(0, UNITS)
        inside = (row < samples)[:, None] & (unit < n)[None, :]
        alpha = tl.load(alpha_ptr + unit, mask=unit < n, other=1.0)[None, :]
        root = tl.load(root_ptr + unit, mask=unit < n, other=0.0)[None, :]
        v = tl.load(v_ptr + start + unit[None, :], mask=inside, other=0.0) / unit_of
        whole += tl.sum(root * v * root * v, 1)
        x = alpha * v
        if WARM:
            z = tl.load(start_ptr + start + unit[None, :], mask=inside, other=0.0) / unit_of
            if REFLECTED:
                image = _product(
                    start_ptr, n, slope_ptr, alpha_ptr, negative, w_ptr, w_column, w_row,
                    row, unit, samples, n, "plain", REFLECTED, SLOPES,
                    ROWS, UNITS, DEPTH, PRECISION,
                )  # fmt: skip
                x = z + alpha * (image / unit_of + v - z)
            else:
                image = _product(
                    start_ptr, n, slope_ptr, alpha_ptr, negative, m_ptr, m_row, m_column,
                    row, unit, samples, n, "plain", REFLECTED, SLOPES,
                    ROWS, UNITS, DEPTH, PRECISION,
                )  # fmt: skip
                x += image / unit_of
        # The other half holds αv for the moment, of which the shift is made.
        tl.store(own_ptr + own + unit[None, :], x, mask=inside)
        tl.store(own_ptr + own + n + unit[None, :], alpha * v, mask=inside)
    tl.debug_barrier()
    for first in range(0, n, UNITS):
        unit = first + tl.arange(0, UNITS)
        inside = (row < samples)[:, None] & (unit < n)[None, :]
        shift = tl.load(own_ptr + own + n + unit[None, :], mask=inside, other=0.0)
        if REFLECTED:
            shift += _product(
                own_ptr + n, 2 * n, slope_ptr, alpha_ptr, negative, m_ptr, m_row, m_column,
                row, unit, samples, n, "plain", REFLECTED, SLOPES, ROWS, UNITS, DEPTH, PRECISION,
            )  # fmt: skip
        tl.store(shift_ptr + start + unit[None, :], shift, mask=inside)
    tl.debug_barrier()

    finished = (row >= samples).to(tl.int32)
    step, step_before, mark_step, checks, here = DONE, 0, 0, 0, 0
    worst_before, mark = tl.load(numbers_ptr + 5), tl.load(numbers_ptr + 6)
    ahead = tl.minimum(first_check, max_steps)
    before = tl.zeros_like(whole) + mark
    running = True
    while running:
        for _ in range(ahead - step):
            for first in range(0, n, UNITS):
                unit = first + tl.arange(0, UNITS)
                inside = (row < samples)[:, None] & (unit < n)[None, :]
                image = _product(
                    own_ptr + here, 2 * n, slope_ptr, alpha_ptr, negative, m_ptr, m_row, m_column,
                    row, unit, samples, n, "map", REFLECTED, SLOPES, ROWS, UNITS, DEPTH, PRECISION,
                )  # fmt: skip
                x = tl.load(own_ptr + own + here + unit[None, :], mask=inside, other=0.0)
                shift = tl.load(shift_ptr + start + unit[None, :], mask=inside, other=0.0)
                x = (1 - theta) * x + theta * (shift + image)
                tl.store(own_ptr + own + (n - here) + unit[None, :], x, mask=inside)
            tl.debug_barrier()
            here = n - here
        step = ahead
        checks += 1
        squares, moved, active = tl.zeros_like(whole), tl.zeros_like(whole), tl.zeros_like(whole)
        size_image, size_z = tl.zeros_like(whole), tl.zeros_like(whole)
        for first in range(0, n, UNITS):
            unit = first + tl.arange(0, UNITS)
            inside = (row < samples)[:, None] & (unit < n)[None, :]
            alpha = tl.load(alpha_ptr + unit, mask=unit < n, other=1.0)[None, :]
            root = tl.load(root_ptr + unit, mask=unit < n, other=0.0)[None, :]
            at = start + unit[None, :]
            d, factor = _factor(slope_ptr, negative, alpha, at, inside, SLOPES)
            v = tl.load(v_ptr + at, mask=inside, other=0.0) / unit_of
            x = tl.load(own_ptr + own + here + unit[None, :], mask=inside, other=0.0)
            z = _prox(x, factor, SLOPES) * unit_of / unit_of  # as it will be returned
            image = v + _product(
                own_ptr + here, 2 * n, slope_ptr, alpha_ptr, negative, w_ptr, w_column, w_row,
                row, unit, samples, n, "weights", REFLECTED, SLOPES, ROWS, UNITS, DEPTH, PRECISION,
            )  # fmt: skip
            image = _prox(image, d, SLOPES)
            change = root * (image - z)
            squares += tl.sum(change * change, 1)
            shown = root * tl.where((image != 0) | (z != 0), v, 0.0)
            active += tl.sum(shown * shown, 1)
            moved += tl.sum(root * x / alpha * root * x / alpha, 1)
            size_image += tl.sum(root * image * root * image, 1)
            size_z += tl.sum(root * z * root * z, 1)
        residual = _residual(squares, size_image, size_z)
        left = _left(residual, before, size_image, size_z, active, own_noise, tol)
        before = residual
        rests = _rests(squares, size_image, size_z, whole, moved, size_W, noise, tol)
        passes, last, worst, mark, mark_step = _judge(
            left, rests, finished, step, mark, mark_step, tol, limit, max_steps
        )
        for first in range(0, n, UNITS):
            unit = first + tl.arange(0, UNITS)
            inside = (row < samples)[:, None] & (unit < n)[None, :]
            alpha = tl.load(alpha_ptr + unit, mask=unit < n, other=1.0)[None, :]
            at = start + unit[None, :]
            _, factor = _factor(slope_ptr, negative, alpha, at, inside, SLOPES)
            x = tl.load(own_ptr + own + here + unit[None, :], mask=inside, other=0.0)
            z = _prox(x, factor, SLOPES) * unit_of
            tl.store(z_ptr + at, z, mask=inside & passes[:, None])
        tl.store(residual_ptr + row, residual, mask=passes)
        tl.store(steps_ptr + row, tl.zeros_like(row) + step, mask=passes)
        finished = finished | passes.to(tl.int32)
        ahead = _next(step, worst, step_before, worst_before, tol, max_steps)
        worst_before, step_before = worst, step
        running = last == 0
    tl.store(checks_ptr + tl.program_id(0), checks)
