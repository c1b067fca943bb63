"""Which elementwise operations run in one pass over memory, in Triton?

A tensor is a matrix of `rows` × `columns` numbers, contiguous in memory. A channel or unit is a
column (samples × units, pixels × channels) or a set of rows (sample and channel × pixels). A
program has one tile of the matrix, so positions are divided once per program and row, not once per
number. Offsets have 64 bits, because a matrix may have more than 2³¹ numbers.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _activation(v, negative, RECTIFIED: tl.constexpr):
    """max(v, av); where a = 0 as PyTorch has it for infinite and undefined v."""
    return tl.where(v < 0, 0.0, v) if RECTIFIED else tl.where(v > 0, v, v * negative)


@triton.jit
def _pulled(flow, v, negative, RECTIFIED: tl.constexpr):
    """The cotangent of v from that of max(v, av), as PyTorch has it."""
    return tl.where(v <= 0, 0.0, flow) if RECTIFIED else tl.where(v > 0, flow, flow * negative)


@triton.jit
def _per_unit(pointer, row, column, rows, columns, channels, BY_COLUMN: tl.constexpr):
    """The number per unit or channel of every number of a tile, as one row or one column."""
    if BY_COLUMN:
        numbers = tl.load(pointer + column, mask=column < columns, other=0.0)[None, :]
    else:
        at = row.to(tl.int32) % channels
        numbers = tl.load(pointer + at, mask=row < rows, other=0.0)[:, None]
    return numbers


@triton.jit
def _tile(rows, columns, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """The rows and columns of this program, which of them there are, and where they lie."""
    tile, across = tl.program_id(0), tl.cdiv(columns, COLUMNS)
    row = (tile // across).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = (tile % across) * COLUMNS + tl.arange(0, COLUMNS)
    inside = (row < rows)[:, None] & (column < columns)[None, :]
    return row, column, inside, row[:, None] * columns + column[None, :]


@triton.jit(do_not_specialize=["rows"])
def reflect_sum(
    x_ptr, shift_ptr, out_ptr, alpha_ptr, slope_ptr, negative_ptr, rows, columns, alpha_step,
    SLOPES: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """ρ(x) + s, ρ the reflected prox of max(v, av) or of dv; one sample per row."""
    _row, column, inside, at = _tile(rows, columns, ROWS, COLUMNS)
    alpha = tl.load(alpha_ptr + column * alpha_step, mask=column < columns, other=1.0)[None, :]
    x = tl.load(x_ptr + at, mask=inside, other=0.0)
    shift = tl.load(shift_ptr + at, mask=inside, other=0.0)
    if SLOPES:
        d = tl.load(slope_ptr + at, mask=inside, other=0.0)
        z = x * (d / (d + alpha * (1 - d)))
    else:
        d = tl.load(negative_ptr)
        z = tl.where(x > 0, x, x * (d / (d + alpha * (1 - d))))
    tl.store(out_ptr + at, 2 * z - x + shift, mask=inside)


@triton.jit(do_not_specialize=["rows", "channels"])
def activate(
    u_ptr, out_ptr, bias_ptr, scale_ptr, inner_ptr, negative_ptr, rows, columns, channels,
    BIASED: tl.constexpr, INNER: tl.constexpr, RECTIFIED: tl.constexpr, BY_COLUMN: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """σ(su + b)t with s, b and t by unit or channel."""
    row, column, inside, at = _tile(rows, columns, ROWS, COLUMNS)
    v = tl.load(u_ptr + at, mask=inside, other=0.0)
    if INNER:
        v = v * _per_unit(inner_ptr, row, column, rows, columns, channels, BY_COLUMN)
    if BIASED:
        v = v + _per_unit(bias_ptr, row, column, rows, columns, channels, BY_COLUMN)
    scale = _per_unit(scale_ptr, row, column, rows, columns, channels, BY_COLUMN)
    h = _activation(v, tl.load(negative_ptr), RECTIFIED)
    tl.store(out_ptr + at, h * scale, mask=inside)


@triton.jit(do_not_specialize=["rows", "channels", "parts"])
def activate_backward(
    flow_ptr, u_ptr, bias_ptr, scale_ptr, inner_ptr, negative_ptr, u_flow_ptr, sums_ptr,
    rows, columns, channels, parts,
    BIASED: tl.constexpr, INNER: tl.constexpr, RECTIFIED: tl.constexpr, BY_COLUMN: tl.constexpr,
    FLOW: tl.constexpr, SUMS: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, REPEAT: tl.constexpr,
):  # fmt: skip
    """The cotangents of σ(su + b)t: of u where FLOW, of t, b and s in parts of sums where SUMS.

    A program has REPEAT tiles, one after the other in the direction of the sums: down the rows
    where the unit is that of the column, else along the columns. It writes one part of every sum.
    """
    tile = tl.program_id(0)
    if BY_COLUMN:
        across = tl.cdiv(columns, COLUMNS)
        part = tile // across
        first_row = part.to(tl.int64) * (ROWS * REPEAT)
        first_column = (tile % across) * COLUMNS
    else:
        across = tl.cdiv(columns, COLUMNS * REPEAT)
        part = tile % across
        first_row = (tile // across).to(tl.int64) * ROWS
        first_column = part * (COLUMNS * REPEAT)
    row, column = first_row + tl.arange(0, ROWS), first_column + tl.arange(0, COLUMNS)
    scale = _per_unit(scale_ptr, row, column, rows, columns, channels, BY_COLUMN)
    if INNER:
        inner = _per_unit(inner_ptr, row, column, rows, columns, channels, BY_COLUMN)
    if BIASED:
        bias = _per_unit(bias_ptr, row, column, rows, columns, channels, BY_COLUMN)
    negative = tl.load(negative_ptr)
    scale_sum = tl.zeros((ROWS, COLUMNS), dtype=u_ptr.dtype.element_ty)
    bias_sum, inner_sum = scale_sum, scale_sum
    for step in range(REPEAT):
        if BY_COLUMN:
            row = first_row + step * ROWS + tl.arange(0, ROWS)
        else:
            column = first_column + step * COLUMNS + tl.arange(0, COLUMNS)
        inside = (row < rows)[:, None] & (column < columns)[None, :]
        at = row[:, None] * columns + column[None, :]
        u = tl.load(u_ptr + at, mask=inside, other=0.0)
        flow = tl.load(flow_ptr + at, mask=inside, other=0.0)
        v = u
        if INNER:
            v = v * inner
        if BIASED:
            v = v + bias
        v_flow = _pulled(flow * scale, v, negative, RECTIFIED)
        if SUMS:
            h = _activation(v, negative, RECTIFIED)
            scale_sum += tl.where(inside, flow * h, 0.0)
            if BIASED:
                bias_sum += tl.where(inside, v_flow, 0.0)
            if INNER:
                inner_sum += tl.where(inside, v_flow * u, 0.0)
        if FLOW:
            if INNER:
                v_flow = v_flow * inner
            tl.store(u_flow_ptr + at, v_flow, mask=inside)
    if SUMS:
        if BY_COLUMN:
            width = columns
            where = part.to(tl.int64) * width + first_column + tl.arange(0, COLUMNS)
            valid = first_column + tl.arange(0, COLUMNS) < columns
        else:
            width = rows
            where = part.to(tl.int64) * width + first_row + tl.arange(0, ROWS)
            valid = first_row + tl.arange(0, ROWS) < rows
        AXIS: tl.constexpr = 0 if BY_COLUMN else 1
        size = parts.to(tl.int64) * width
        tl.store(sums_ptr + where, tl.sum(scale_sum, AXIS), mask=valid)
        if BIASED:
            tl.store(sums_ptr + size + where, tl.sum(bias_sum, AXIS), mask=valid)
        if INNER:
            which: tl.constexpr = 2 if BIASED else 1
            tl.store(sums_ptr + which * size + where, tl.sum(inner_sum, AXIS), mask=valid)
