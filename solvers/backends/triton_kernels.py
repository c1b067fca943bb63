"""Which kernels run the loop of a splitting on a CUDA device, in Triton?

    x ← T(x) = (1 − θ)x + θ(s + ρ(x)M),     z = prox(x),

as `solvers.backends.step.Iteration` says.

- `resident` solves problems of up to 256 units in one launch, without the host. Each program has
  a few samples of the batch, and M and x stay on the chip.
- `advance` and `increment` take one step of all samples, for matrices too large for a
  multiprocessor. They are matrix products that apply ρ to their argument, and relaxation and shift
  to their result. `look` is the product of a check and returns norms alone.

Note [Increments]
A product in full precision takes six products of bfloat16 on the tensor cores, so only a few are in
full precision. A block of steps begins at a base x₀ with one of them, p = s + ρ(x₀)M, which is its
first step. The other steps are p ← p + bf16(ρ(x) − ρ(x'))·bf16(M), where x' is the iterate before
x. Their rounding is relative to the distance that the block has come, 2⁻⁸ of it, so a block may
gain a factor of e^4.5 = 90 before rounding matters. The displacement ‖T(x) − x‖ at the next base
shows what the block has gained. If the rate is worse than before, the next block is half as long,
else twice as long; a block of one step is exact. The idea is that of iterative refinement: Higham
and Mary (2022), as in `solvers.methods.mixed_precision`.

Note [When the device looks]
A check takes a product with W. It is made when the displacement is predicted, from its rate,
to have fallen to the tolerance. The ratio of residual to displacement is taken from the check
before; at first it is 1. A displacement that has stopped falling (`solvers.methods.iteration`)
causes a check too.
"""

from __future__ import annotations

import triton
import triton.language as tl

# Numbers are passed in a tensor of the problem's dtype, in this order: as arguments of a kernel
# they would be float32.
NUMBERS = (
    "negative", "theta", "tol", "noise", "limit", "one", "infinity", "least", "most", "own",
)  # fmt: skip


@triton.jit
def _rho(x, c, KIND: tl.constexpr):
    """|x|; or x for positive and cx for other x ("sides"); or cx ("linear"); or x ("plain")."""
    if KIND == "abs":
        y = tl.abs(x)
    elif KIND == "linear":
        y = c * x
    elif KIND == "sides":
        y = tl.where(x > 0, x, c * x)
    else:
        y = x
    return y


@triton.jit
def _sigma(v, d, KIND: tl.constexpr):
    """σ(v) = max(v, 0) ("abs"), dv ("linear") or max(v, dv)."""
    if KIND == "abs":
        y = tl.maximum(v, 0.0, propagate_nan=tl.PropagateNan.ALL)
    elif KIND == "linear":
        y = v * d
    else:
        y = tl.where(v > 0, v, v * d)
    return y


@triton.jit
def _shrunk(d, alpha, KIND: tl.constexpr):
    """The slope of the prox of a σ of slope d, which is 0 for |x|."""
    return d if KIND == "abs" else d / (d + alpha * (1 - d))


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
def _relative(square, size_square):
    """The root of a sum of squares, relative to another; 0 where nothing is left."""
    length = tl.sqrt(square)
    return length / tl.where(length == 0.0, 1.0, tl.sqrt(size_square))


@triton.jit
def _left(residual, before, size, active, own, tol):
    """A float32 residual less 16 roundoffs of v where those matter: float64 goes on from there."""
    floor = own * tl.sqrt(active) / tl.where(size == 0.0, 1.0, size)
    return tl.where((floor > tol) & (residual > 0.5 * before), residual - floor, residual)


@triton.jit
def _rests(change, size, v, x, size_W, noise, tol):
    """Whether rounding of v, x and Wz may be what is left of ‖z̃ − z‖ above the tolerance."""
    return tl.sqrt(change) - noise * (tl.sqrt(v) + tl.sqrt(x) + size_W * size) <= tol * size


@triton.jit
def _worst(number, finished, BUDGET: tl.constexpr):
    """The largest number of those that are not finished; infinite where one is not a number.

    Within a budget of steps such a sample is left out: it has no say in what becomes of others.
    """
    known = tl.where(number == number, number, float("inf"))
    if BUDGET:
        known = tl.where(known < float("inf"), known, 0.0)
    return tl.max(tl.where(finished != 0, 0.0, known), 0)


@triton.jit
def _dot(x, A, total, PRECISION: tl.constexpr):
    """total + xA; in bfloat16 where A is, or, in the interpreter, holds such numbers ("bf16").

    The interpreter multiplies the bits of bfloat16 as integers, and its casts truncate.
    """
    if PRECISION != "bf16":
        product = tl.dot(x, A, total, input_precision=PRECISION, out_dtype=total.dtype)
    elif A.dtype == tl.bfloat16:
        product = tl.dot(x.to(tl.bfloat16), A, total)
    else:
        product = tl.dot(_bf16(x, A.dtype), A, total, input_precision="ieee")
    return product


@triton.jit
def _bf16(x, element: tl.constexpr):
    """x to the nearest bfloat16, held as this type."""
    if element == tl.bfloat16:
        rounded = x.to(tl.bfloat16)
    else:
        bits = x.to(tl.int32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & -65536
        rounded = bits.to(tl.float32, bitcast=True)
    return rounded


# Note [Blocks of units]
# The sides of tiles are powers of two, and 80 units would fill 31 % of 128². So units are divided
# into blocks, 80 = 64 + 16. A tensor of samples × units is a tuple of tiles, one per block, and M
# is padded with zeros.
@triton.jit
def _columns(BLOCKS: tl.constexpr, first):
    """The units of each block."""
    columns = ()
    for i in tl.static_range(len(BLOCKS)):
        columns += (first + tl.arange(0, BLOCKS[i]),)
        first += BLOCKS[i]
    return columns


@triton.jit
def _read(ptr, row, samples, n, columns):
    """Samples × units."""
    tiles = ()
    for i in tl.static_range(len(columns)):
        inside = (row < samples)[:, None] & (columns[i] < n)[None, :]
        at = row[:, None].to(tl.int64) * n + columns[i][None, :]
        tiles += (tl.load(ptr + at, mask=inside, other=0.0),)
    return tiles


@triton.jit
def _matrix(ptr, columns, WIDTH: tl.constexpr, PARTS: tl.constexpr):
    """The first parts of a padded matrix, each row of blocks by row of blocks."""
    tiles = ()
    for part in tl.static_range(PARTS):
        for k in tl.static_range(len(columns)):
            for i in tl.static_range(len(columns)):
                at = (part * WIDTH + columns[k][:, None]) * WIDTH + columns[i][None, :]
                tiles += (tl.load(ptr + at),)
    return tiles


@triton.jit
def _product(x, A, total):
    """total + xA in bfloat16, for a matrix on the chip."""
    tiles = ()
    for i in tl.static_range(len(x)):
        tile = total[i]
        for k in tl.static_range(len(x)):
            tile = _dot(x[k], A[k * len(x) + i], tile, "bf16")
        tiles += (tile,)
    return tiles


@triton.jit
def _rhos(x, c, KIND: tl.constexpr):
    """ρ(x)."""
    tiles = ()
    for i in tl.static_range(len(x)):
        tiles += (_rho(x[i], c[i], KIND),)
    return tiles


@triton.jit
def _arguments(
    x, c, base, drives, INCREMENTS: tl.constexpr, REFLECTED: tl.constexpr, KIND: tl.constexpr
):
    """What M multiplies in a step: ρ(x) less the base, or ρ(x) and for a reflection αv."""
    tiles = ()
    for i in tl.static_range(len(x)):
        rho = _rho(x[i], c[i], KIND)
        if INCREMENTS:
            tiles += (rho - base[i],)
        else:
            tiles += (rho + drives[i] if REFLECTED else rho,)
    return tiles


# Note [Six products]
# A float32 number is the sum of three numbers of bfloat16: each is what remains of it after the
# ones before, rounded. Of the nine products of two such sums six matter; they are added from the
# smallest to the largest. M and W are split once, x once per product. Triton's own bf16x6 splits
# both again in every part of a product, and tests for infinities.
@triton.jit
def _six(a, A, total):
    """total + (a₀ + a₁ + a₂)(A₀ + A₁ + A₂)."""
    tile = _dot(a[1], A[1], tl.zeros_like(total), "bf16")
    tile = _dot(a[2], A[0], _dot(a[0], A[2], tile, "bf16"), "bf16")
    tile = _dot(a[1], A[0], _dot(a[0], A[1], tile, "bf16"), "bf16")
    return total + _dot(a[0], A[0], tile, "bf16")


@triton.jit
def _parts(x, PARTS: tl.constexpr, element: tl.constexpr):
    """x, or three numbers of bfloat16 with the sum x."""
    parts = ()
    for _i in tl.static_range(PARTS):
        part = _bf16(x, element) if PARTS == 3 else x
        x -= part
        parts += (part,)
    return parts


@triton.jit
def _exactly(
    x, A, ptr, own_ptr, row, columns, total, WIDTH: tl.constexpr, DEPTH: tl.constexpr,
    PARTS: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """total + xA: A in three parts on the chip (WHOLE), or a padded matrix in memory, of which the
    largest part may be on the chip."""
    if WHOLE:
        product = _of_parts(x, A, total)
    elif PARTS == 3 and len(A) == 1:
        own = own_ptr + row[:, None].to(tl.int64) * (3 * WIDTH)
        depth: tl.constexpr = min(2 * DEPTH, WIDTH)
        product = (_in_turns(x[0], A[0], ptr, own, columns[0], total[0], WIDTH, depth),)
    else:
        product = _streamed(x, ptr, own_ptr, row, columns, total, WIDTH, DEPTH, PARTS)
    return product


@triton.jit
def _of_parts(x, A, total):
    """total + xA for a matrix in three parts on the chip, part by part."""
    tiles = ()
    parts = ()
    for k in tl.static_range(len(x)):
        parts += (_parts(x[k], 3, A[0].dtype),)
    for i in tl.static_range(len(x)):
        tile = total[i]
        for k in tl.static_range(len(x)):
            A_ki = (
                A[k * len(x) + i],
                A[(len(x) + k) * len(x) + i],
                A[(2 * len(x) + k) * len(x) + i],
            )
            tile = _six(parts[k], A_ki, tile)
        tiles += (tile,)
    return tiles


@triton.jit
def _in_turns(x, A, ptr, own, column, total, WIDTH: tl.constexpr, DEPTH: tl.constexpr):
    """total + xA for one block of units, A's largest part on the chip and the others in memory.

    Products of parts run one after the other, in loops. If products follow each other in
    straight-line code, Triton lets every warp compute all but the last of them. The sum is
    truncated once per 16 units, relative to its own size, which is exact enough for a base but not
    for a check.
    """
    parts = _parts(x, 3, A.dtype)
    for part in tl.static_range(3):
        tl.store(own + part * WIDTH + column[None, :], parts[part])
    tl.debug_barrier()
    tile = tl.zeros_like(total)
    for first in range(0, 3 * WIDTH, DEPTH):  # a₁A₁, a₀A₂, a₀A₁
        turn = first // WIDTH
        k = first - turn * WIDTH + tl.arange(0, DEPTH)
        a = tl.load(own + tl.where(turn == 0, WIDTH, 0) + k[None, :])
        other = tl.where(turn == 1, 2, 1)
        B = tl.load(ptr + (other * WIDTH + k[:, None]) * WIDTH + column[None, :])
        tile = _dot(a, B, tile, "bf16")
    for turn in range(3):  # a₂A₀, a₁A₀, a₀A₀
        tile = _dot(tl.load(own + (2 - turn) * WIDTH + column[None, :]), A, tile, "bf16")
    tl.debug_barrier()
    return total + tile


@triton.jit
def _streamed(
    x, ptr, own_ptr, row, columns, total, WIDTH: tl.constexpr, DEPTH: tl.constexpr,
    PARTS: tl.constexpr,
):  # fmt: skip
    """total + xA for a padded matrix in memory; x goes through memory of the program's own.

    With PARTS = 3 both are held as sums of three numbers of bfloat16, part by part.
    """
    own = own_ptr + row[:, None].to(tl.int64) * (PARTS * WIDTH)
    for i in tl.static_range(len(x)):
        parts = _parts(x[i], PARTS, own_ptr.dtype.element_ty)
        for part in tl.static_range(PARTS):
            tl.store(own + part * WIDTH + columns[i][None, :], parts[part])
    tl.debug_barrier()
    for first in range(0, WIDTH, DEPTH):
        k = first + tl.arange(0, DEPTH)
        a, tiles = (), ()
        for part in tl.static_range(PARTS):
            a += (tl.load(own + part * WIDTH + k[None, :]),)
        for i in tl.static_range(len(columns)):
            A = ()
            for part in tl.static_range(PARTS):
                A += (tl.load(ptr + (part * WIDTH + k[:, None]) * WIDTH + columns[i][None, :]),)
            if PARTS == 3:
                tiles += (_six(a, A, total[i]),)
            else:
                tiles += (_dot(a[0], A[0], total[i], "ieee"),)
        total = tiles
    tl.debug_barrier()
    return total


@triton.jit
def _slopes(slope_ptr, negative, row, samples, n, columns, SLOPES: tl.constexpr):
    """d of σ(v) = dv, or of max(v, dv)."""
    if SLOPES:
        tiles = _read(slope_ptr, row, samples, n, columns)
    else:
        tiles = ()
        for i in tl.static_range(len(columns)):
            tiles += (tl.zeros_like(columns[i]).to(negative.dtype)[None, :] + negative,)
    return tiles


@triton.jit
def _bends(
    slope_ptr, alpha_ptr, negative, row, samples, n, columns,
    REFLECTED: tl.constexpr, KIND: tl.constexpr,
):  # fmt: skip
    """The c of ρ; that of |x| is −1."""
    tiles = ()
    if KIND == "abs":
        for _i in tl.static_range(len(columns)):
            tiles += (negative - 1.0,)
    else:
        d = _slopes(slope_ptr, negative, row, samples, n, columns, KIND == "linear")
        for i in tl.static_range(len(columns)):
            factor = _shrunk(d[i], tl.load(alpha_ptr + columns[i])[None, :], KIND)
            tiles += (2 * factor - 1 if REFLECTED else factor,)
    return tiles


@triton.jit
def _drives(v_ptr, alpha_ptr, inverse, row, samples, n, columns):
    """αv, in the unit of each sample."""
    v = _read(v_ptr, row, samples, n, columns)
    tiles = ()
    for i in tl.static_range(len(columns)):
        tiles += (v[i] * inverse * tl.load(alpha_ptr + columns[i])[None, :],)
    return tiles


@triton.jit
def _outputs(x, d, alpha_ptr, unit_of, inverse, columns, KIND: tl.constexpr):
    """z = prox(x) as it will be returned: its way to the unit of the output and back may round."""
    tiles = ()
    for i in tl.static_range(len(columns)):
        factor = _shrunk(d[i], tl.load(alpha_ptr + columns[i])[None, :], KIND)
        tiles += (_sigma(x[i], factor, KIND) * unit_of * inverse,)
    return tiles


@triton.jit
def _put(ptr, row, columns, x, WIDTH: tl.constexpr):
    """Store x in memory of the program's own: a long product leaves no registers for it."""
    own = ptr + row[:, None].to(tl.int64) * WIDTH
    for i in tl.static_range(len(columns)):
        tl.store(own + columns[i][None, :], x[i])


@triton.jit
def _take(ptr, row, columns, WIDTH: tl.constexpr):
    """What `_put` has stored."""
    own = ptr + row[:, None].to(tl.int64) * WIDTH
    tiles = ()
    for i in tl.static_range(len(columns)):
        tiles += (tl.load(own + columns[i][None, :]),)
    return tiles


@triton.jit(do_not_specialize=["samples", "max_steps", "first"])
def resident(
    v_ptr, start_ptr, m_ptr, w_ptr, alpha_ptr, root_ptr, reach_ptr, slope_ptr,
    size_ptr, z_ptr, residual_ptr, steps_ptr, summary_ptr, own_ptr, aside_ptr,
    samples, n, numbers_ptr, max_steps, first,
    DONE: tl.constexpr, REFLECTED: tl.constexpr, RELAXED: tl.constexpr, KIND: tl.constexpr,
    WARM: tl.constexpr, ROWS: tl.constexpr, BLOCKS: tl.constexpr, WIDTH: tl.constexpr,
    DEPTH: tl.constexpr, PARTS: tl.constexpr, HELD: tl.constexpr, BUDGET: tl.constexpr,
):  # fmt: skip
    """Solve for ROWS samples. M and Wᵀ are PARTS · WIDTH², α and Λ^½ have WIDTH entries.

    `summary` takes the bits of the largest residual and the most checks. With a BUDGET all steps
    are made, but for those of a program whose samples are all at rest.
    """
    SLOPES: tl.constexpr = KIND == "linear"
    INCREMENTS: tl.constexpr = PARTS == 3
    ASIDE: tl.constexpr = INCREMENTS and HELD == 0
    negative, theta, tol = tl.load(numbers_ptr), tl.load(numbers_ptr + 1), tl.load(numbers_ptr + 2)
    noise, limit = tl.load(numbers_ptr + 3), tl.load(numbers_ptr + 4)
    infinity, own = tl.load(numbers_ptr + 6), tl.load(numbers_ptr + 9)
    size_W = tl.load(size_ptr)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    columns = _columns(BLOCKS, 0)

    v = _read(v_ptr, row, samples, n, columns)
    largest = tl.max(tl.abs(v[0]), 1)
    for i in tl.static_range(1, len(columns)):
        largest = tl.maximum(largest, tl.max(tl.abs(v[i]), 1))
    unit_of = _unit(largest, tl.load(numbers_ptr + 7), tl.load(numbers_ptr + 8))[:, None]
    inverse = 1.0 / unit_of  # a power of two
    x = _drives(v_ptr, alpha_ptr, inverse, row, samples, n, columns)
    M, W = (), ()
    if INCREMENTS:
        M = _matrix(m_ptr, columns, WIDTH, 3 if HELD > 0 else 1)
    if HELD > 1:
        W = _matrix(w_ptr, columns, WIDTH, 3)
    if WARM:
        z = ()
        start = _read(start_ptr, row, samples, n, columns)
        for i in tl.static_range(len(columns)):
            z += (start[i] * inverse,)
        if REFLECTED:  # x = z + α(Wz + v − z)
            total = ()
            for i in tl.static_range(len(columns)):
                total += (v[i] * inverse - z[i],)
            image = _exactly(
                z, W, w_ptr, own_ptr, row, columns, total, WIDTH, DEPTH, PARTS, HELD > 1
            )  # fmt: skip
            x = ()
            for i in tl.static_range(len(columns)):
                x += (z[i] + tl.load(alpha_ptr + columns[i])[None, :] * image[i],)
        else:
            x = _exactly(z, M, m_ptr, own_ptr, row, columns, x, WIDTH, DEPTH, PARTS, HELD > 0)

    c = _bends(slope_ptr, alpha_ptr, negative, row, samples, n, columns, REFLECTED, KIND)

    finished = (row >= samples).to(tl.int32)
    step, mark_step, checks, ahead = 0 * first + DONE, 0 * first, 0 * first, 0 * first
    due, stalled = False, False
    length = first
    ratio, rate = tl.load(numbers_ptr + 5), tl.zeros_like(tol)
    worst, mark, looked = infinity, infinity, tl.zeros_like(tol)
    before = tl.zeros_like(largest) + infinity
    largest_residual = tl.zeros_like(largest)
    running = True
    while running:
        # The same rows and units. The compiler cannot know that, and keeps no addresses in
        # registers.
        nothing = tl.multiple_of(tl.minimum(step, 0), 256)
        here, columns = row + nothing, _columns(BLOCKS, nothing)
        if due:
            checks += 1
            v = _read(v_ptr, here, samples, n, columns)
            d = _slopes(slope_ptr, negative, here, samples, n, columns, SLOPES)
            z = _outputs(x, d, alpha_ptr, unit_of, inverse, columns, KIND)
            total = ()
            for i in tl.static_range(len(columns)):
                total += (v[i] * inverse,)
            if ASIDE:
                _put(aside_ptr, here, columns, x, WIDTH)
            image = _exactly(
                z, W, w_ptr, own_ptr, here, columns, total, WIDTH, DEPTH, PARTS, HELD > 1
            )  # fmt: skip
            if ASIDE:
                x = _take(aside_ptr, here, columns, WIDTH)
                z = _outputs(x, d, alpha_ptr, unit_of, inverse, columns, KIND)
                v = _read(v_ptr, here, samples, n, columns)
            squares, size_image = tl.zeros_like(largest), tl.zeros_like(largest)
            size_z, active = tl.zeros_like(largest), tl.zeros_like(largest)
            moved, whole = tl.zeros_like(largest), tl.zeros_like(largest)
            for i in tl.static_range(len(columns)):
                root = tl.load(root_ptr + columns[i])[None, :]
                y, drive = _sigma(image[i], d[i], KIND), root * (v[i] * inverse)
                change, reach = root * (y - z[i]), tl.load(reach_ptr + columns[i])[None, :] * x[i]
                shown = tl.where((y != 0) | (z[i] != 0), drive, 0.0)
                squares += tl.sum(change * change, 1)
                size_image += tl.sum(root * y * root * y, 1)
                size_z += tl.sum(root * z[i] * root * z[i], 1)
                active += tl.sum(shown * shown, 1)
                moved += tl.sum(reach * reach, 1)
                whole += tl.sum(drive * drive, 1)
            size = tl.sqrt(tl.maximum(size_image, size_z))
            residual = _relative(squares, tl.maximum(size_image, size_z))
            left = _left(residual, before, size, active, own, tol)
            before = residual
            rests = _rests(squares, size, whole, moved, size_W, noise, tol)
            most = _worst(left, finished, BUDGET)
            last = (most <= tol) | (step >= max_steps) | (most == infinity)
            open_ = tl.max(tl.where((finished != 0) | rests | (left <= tol), 0, 1), 0)
            rest = open_ == 0
            if not BUDGET:
                rest = rest | (most <= limit)
            last = last | (stalled & rest)
            passes = (finished == 0) & (tl.where(last, tol, left) <= tol)
            for i in tl.static_range(len(columns)):
                inside = passes[:, None] & (columns[i] < n)[None, :]
                at = here[:, None].to(tl.int64) * n + columns[i][None, :]
                tl.store(z_ptr + at, z[i] * unit_of, mask=inside)
            tl.store(residual_ptr + here, residual, mask=passes)
            tl.store(steps_ptr + here, tl.zeros_like(here).to(tl.int64) + step, mask=passes)
            largest_residual = tl.where(passes, residual, largest_residual)
            finished = finished | passes.to(tl.int32)
            looked = _worst(residual, finished, BUDGET)
            running = last == 0
        if running:
            # The base: one exact step, and the displacement that it makes.
            drives = _drives(v_ptr, alpha_ptr, inverse, here, samples, n, columns)
            base = _rhos(x, c, KIND)
            argument = _arguments(x, c, base, drives, False, REFLECTED, KIND)
            if ASIDE:
                _put(aside_ptr, here, columns, x, WIDTH)
            image = _exactly(
                argument, M, m_ptr, own_ptr, here, columns, drives, WIDTH, DEPTH, PARTS, HELD > 0
            )  # fmt: skip
            if ASIDE:
                x = _take(aside_ptr, here, columns, WIDTH)
                base = _rhos(x, c, KIND)
            moved, size = tl.zeros_like(largest), tl.zeros_like(largest)
            y = ()
            for i in tl.static_range(len(columns)):
                y += ((1 - theta) * x[i] + theta * image[i] if RELAXED else image[i],)
                root = tl.load(root_ptr + columns[i])[None, :]
                change = tl.load(reach_ptr + columns[i])[None, :] * (y[i] - x[i])
                factor = 0.5 * (c[i] + 1) if REFLECTED else c[i]
                z_i = root * _sigma(x[i], factor, KIND)
                moved += tl.sum(change * change, 1)
                size += tl.sum(z_i * z_i, 1)
            x = y
            worst_before = worst
            worst = 0.5 * _worst(_relative(moved, size), finished, BUDGET)
            if due & (worst > 0) & (looked > 0):
                ratio = 1.05 * looked / worst
            # The length of the next block is limited by the gain of the last one, by the rounding
            # of increments, and by the step at which the tolerance may be met.
            slower = rate
            if (worst > 0) & (worst < worst_before) & (worst_before < infinity):
                rate = tl.log(worst / worst_before) / ahead
                good = rate <= 0.7 * slower
            else:
                rate = tl.zeros_like(rate)
                good = worst_before == infinity
            if worst_before < infinity:
                length = tl.where(good, tl.minimum(2 * length, 64), tl.maximum(length // 2, 1))
            ahead = tl.minimum(length, max_steps - step)
            goal = tol / ratio
            due = (worst * ratio <= tol) | (worst == infinity)
            if due:
                ahead = 1
            elif rate < 0:
                needed = tl.ceil(tl.log(goal / worst) / rate)
                most_gain = tl.maximum(-4.5 / rate, 1.0)
                due = needed <= tl.minimum(most_gain, ahead.to(needed.dtype))
                ahead = tl.minimum(ahead.to(needed.dtype), tl.minimum(needed, most_gain))
                ahead = ahead.to(tl.int32)
            aged = step >= mark_step * 5 // 4 + 64
            stalled = (aged & (worst > 0.5 * mark)) | (worst == 0.0)
            if aged:
                mark, mark_step = worst, step
            if stalled:
                ahead = 1
            if BUDGET:  # the last step is a base
                ahead = tl.where((ahead > 1) & (step + ahead >= max_steps), ahead - 1, ahead)
            step += ahead
            due = due | stalled | (step >= max_steps)
            # What the next product takes is made at the end of the step before: the compiler then
            # holds no second copy of ρ(x).
            argument = _arguments(x, c, base, drives, INCREMENTS, REFLECTED, KIND)
            if INCREMENTS:
                base = _rhos(x, c, KIND)
            for _k in range(1, ahead):
                if INCREMENTS:
                    image = _product(argument, M, image)
                else:
                    image = _exactly(
                        argument, M, m_ptr, own_ptr, here, columns, drives, WIDTH, DEPTH, PARTS,
                        HELD > 0,
                    )  # fmt: skip
                if RELAXED:
                    y = ()
                    for i in tl.static_range(len(columns)):
                        y += ((1 - theta) * x[i] + theta * image[i],)
                    x = y
                else:
                    x = image
                argument = _arguments(x, c, base, drives, INCREMENTS, REFLECTED, KIND)
                if INCREMENTS:
                    base = _rhos(x, c, KIND)
    most = _worst(largest_residual, row >= samples, False).to(tl.float64)
    tl.atomic_max(summary_ptr, most.to(tl.int64, bitcast=True))
    tl.atomic_max(summary_ptr + 1, checks.to(tl.int64))


# --- One launch for a step


@triton.jit
def _place(samples, n, ROWS: tl.constexpr, UNITS: tl.constexpr, GROUP: tl.constexpr):
    """The samples and units of this program, which of them there are, where they lie, and the
    number of its tile of units. Tiles that read the same rows run side by side."""
    down, across = tl.cdiv(samples, ROWS), tl.cdiv(n, UNITS)
    program, whole = tl.program_id(0), GROUP * across
    first = program // whole * GROUP
    height = tl.minimum(down - first, GROUP)
    row = (first + program % whole % height) * ROWS + tl.arange(0, ROWS)
    tile = program % whole // height
    unit = tile * UNITS + tl.arange(0, UNITS)
    inside = (row < samples)[:, None] & (unit < n)[None, :]
    return row, unit, inside, row[:, None].to(tl.int64) * n + unit[None, :], tile


@triton.jit
def _add_up(sums_ptr, which: tl.constexpr, x, row, tile, samples):
    """Store the sum of squares of this tile's units, one of up to four numbers of each sample."""
    at = (tile * 4 + which).to(tl.int64) * samples + row
    tl.store(sums_ptr + at, tl.sum(x * x, 1), mask=row < samples)


@triton.jit
def _bend(
    slope_ptr, alpha_ptr, negative, row, unit, samples, n,
    REFLECTED: tl.constexpr, KIND: tl.constexpr,
):  # fmt: skip
    """The c of ρ for some samples and units."""
    if KIND == "abs" or KIND == "plain":
        c = negative
    else:
        alpha = tl.load(alpha_ptr + unit)[None, :]
        if KIND == "linear":
            inside = (row < samples)[:, None] & (unit < n)[None, :]
            at = row[:, None].to(tl.int64) * n + unit[None, :]
            d = tl.load(slope_ptr + at, mask=inside, other=0.0)
        else:
            d = tl.zeros_like(alpha) + negative
        factor = _shrunk(d, alpha, KIND)
        c = 2 * factor - 1 if REFLECTED else factor
    return c


@triton.jit
def _keep(ptr, change, row, unit, samples, width):
    """Store what ρ changes by, in the type of the increments."""
    at = row[:, None].to(tl.int64) * width + unit[None, :]
    tl.store(ptr + at, change.to(ptr.dtype.element_ty), mask=(row < samples)[:, None])


@triton.jit(do_not_specialize=["samples"])
def advance(
    x_ptr, shift_ptr, out_ptr, change_ptr, m_ptr, alpha_ptr, root_ptr, reach_ptr, scale_ptr,
    sums_ptr, slope_ptr, numbers_ptr, samples, n, width,
    REFLECTED: tl.constexpr, RELAXED: tl.constexpr, KIND: tl.constexpr, CHANGES: tl.constexpr,
    LOOKS: tl.constexpr, ROWS: tl.constexpr, UNITS: tl.constexpr, DEPTH: tl.constexpr,
    GROUP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """T(x) of ROWS samples and UNITS units, and what ρ changes by, for `increment`.

    M is width², padded with zeros, and `change` samples × width; x, shift and T(x) samples × n.
    With LOOKS `sums` takes Σ(Λ^½/α (T(x) − x))² and Σ(Λ^½ prox(x))² over the tile's units, in a
    unit of each sample.
    """
    negative, theta = tl.load(numbers_ptr), tl.load(numbers_ptr + 1)
    row, unit, inside, at, tile = _place(samples, n, ROWS, UNITS, GROUP)
    image = tl.zeros((ROWS, UNITS), dtype=x_ptr.dtype.element_ty)
    for first in range(0, width, DEPTH):
        k = first + tl.arange(0, DEPTH)
        here = (row < samples)[:, None] & (k < n)[None, :]
        x = tl.load(x_ptr + row[:, None].to(tl.int64) * n + k[None, :], mask=here, other=0.0)
        c = _bend(slope_ptr, alpha_ptr, negative, row, k, samples, n, REFLECTED, KIND)
        A = tl.load(m_ptr + k[:, None] * width + unit[None, :])
        image = _dot(_rho(x, c, KIND), A, image, PRECISION)
    image += tl.load(shift_ptr + at, mask=inside, other=0.0)
    if RELAXED or CHANGES or LOOKS:
        x = tl.load(x_ptr + at, mask=inside, other=0.0)
    if RELAXED:
        image = (1 - theta) * x + theta * image
    tl.store(out_ptr + at, image, mask=inside)
    if CHANGES or LOOKS:
        c = _bend(slope_ptr, alpha_ptr, negative, row, unit, samples, n, REFLECTED, KIND)
    if CHANGES:
        change = tl.where(unit < n, _rho(image, c, KIND) - _rho(x, c, KIND), 0.0)
        _keep(change_ptr, change, row, unit, samples, width)
    if LOOKS:
        scale = tl.load(scale_ptr + row, mask=row < samples, other=0.0)[:, None]
        root, reach = tl.load(root_ptr + unit)[None, :], tl.load(reach_ptr + unit)[None, :]
        factor = 0.5 * (c + 1) if REFLECTED else c
        _add_up(sums_ptr, 0, reach * ((image - x) * scale), row, tile, samples)
        _add_up(sums_ptr, 1, root * (_sigma(x, factor, KIND) * scale), row, tile, samples)


@triton.jit(do_not_specialize=["samples"])
def look(
    z_ptr, v_ptr, w_ptr, root_ptr, scale_ptr, sums_ptr, slope_ptr, numbers_ptr, samples, n, width,
    KIND: tl.constexpr, ROWS: tl.constexpr, UNITS: tl.constexpr, DEPTH: tl.constexpr,
    GROUP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """How far z̃ = σ(Wz + v) is from z, for ROWS samples and UNITS units, in a unit of each sample.

    `sums` takes the squares of z̃ − z, z̃, z and those of v where z̃ or z is not zero, all times Λ^½.
    Wᵀ is width², padded with zeros; z and v are samples × n.
    """
    negative = tl.load(numbers_ptr)
    row, unit, inside, at, tile = _place(samples, n, ROWS, UNITS, GROUP)
    image = tl.zeros((ROWS, UNITS), dtype=z_ptr.dtype.element_ty)
    for first in range(0, width, DEPTH):
        k = first + tl.arange(0, DEPTH)
        here = (row < samples)[:, None] & (k < n)[None, :]
        z = tl.load(z_ptr + row[:, None].to(tl.int64) * n + k[None, :], mask=here, other=0.0)
        A = tl.load(w_ptr + k[:, None] * width + unit[None, :])
        image = _dot(z, A, image, PRECISION)
    v = tl.load(v_ptr + at, mask=inside, other=0.0)
    d = negative
    if KIND == "linear":
        d = tl.load(slope_ptr + at, mask=inside, other=0.0)
    y, z = _sigma(image + v, d, KIND), tl.load(z_ptr + at, mask=inside, other=0.0)
    scale = tl.load(scale_ptr + row, mask=row < samples, other=0.0)[:, None]
    root = tl.load(root_ptr + unit)[None, :]
    _add_up(sums_ptr, 0, root * ((y - z) * scale), row, tile, samples)
    _add_up(sums_ptr, 1, root * (y * scale), row, tile, samples)
    _add_up(sums_ptr, 2, root * (z * scale), row, tile, samples)
    shown = tl.where((y != 0) | (z != 0), root * (v * scale), 0.0)
    _add_up(sums_ptr, 3, shown, row, tile, samples)


@triton.jit(do_not_specialize=["samples"])
def increment(
    x_ptr, change_ptr, next_ptr, low_ptr, alpha_ptr, slope_ptr, numbers_ptr, samples, n,
    width,
    REFLECTED: tl.constexpr, KIND: tl.constexpr,
    ROWS: tl.constexpr, UNITS: tl.constexpr, DEPTH: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """x ← x + change · bf16(M) in place, and the change of ρ that this makes, for the next step."""
    negative = tl.load(numbers_ptr)
    row, unit, inside, at, _tile = _place(samples, n, ROWS, UNITS, GROUP)
    moved = tl.zeros((ROWS, UNITS), dtype=tl.float32)
    # Rows beyond the last sample repeat it, and their results are not stored.
    own = change_ptr + tl.minimum(row, samples - 1)[:, None].to(tl.int64) * width
    for first in range(0, width, DEPTH):
        k = first + tl.arange(0, DEPTH)
        d = tl.load(own + k[None, :])
        moved = _dot(d, tl.load(low_ptr + k[:, None] * width + unit[None, :]), moved, "bf16")
    x = tl.load(x_ptr + at, mask=inside, other=0.0)
    c = _bend(slope_ptr, alpha_ptr, negative, row, unit, samples, n, REFLECTED, KIND)
    change = tl.where(unit < n, _rho(x + moved, c, KIND) - _rho(x, c, KIND), 0.0)
    tl.store(x_ptr + at, x + moved, mask=inside)
    _keep(next_ptr, change, row, unit, samples, width)
