"""Forward and backward kernels of differential attention (arXiv 2410.05258, equation 1).

Attention is causal or full; heads are grouped.

Every query attends to one interval of keys, [low, high), which expresses causality and documents.
The forward pass reads the keys once and keeps the two outputs of a head in registers. Backward
computes P = A1 - lambda A2 once for dV and dP. It sums in a fixed order, without atomics: one
kernel for the gradients of keys and values, another for those of queries.

Notation: B batch, Tq queries, Tk keys, h heads, G groups of heads that share keys and a value,
R = h/G, d width of queries and keys, dv (WIDE) of values; M rows and N keys of a block. The two
maps of a head are adjacent: map s of head j is query map 2j + s, and map s of group g is key map
2g + s. Logits are in base 2, and lambda is (B, h, Tq).
"""

import triton
import triton.language as tl


@triton.jit
def _dot(x, y, EXACT: tl.constexpr):
    """Product in fp32; EXACT casts the operands first (Triton's interpreter needs it for bf16)."""
    if EXACT:
        return tl.dot(x.to(tl.float32), y.to(tl.float32), input_precision="ieee")
    return tl.dot(x, y)


@triton.jit
def _tile(base, rows, columns, row_stride, row_count, width):
    """A tile (rows, columns), zero outside the tensor."""
    inside = (rows < row_count)[:, None] & (columns < width)[None, :]
    return tl.load(base + rows[:, None] * row_stride + columns[None, :], mask=inside, other=0.0)


@triton.jit
def _tiles(base, stride, rows, columns, row_stride, row_count, width):
    """The tiles of both maps, the second ``stride`` behind the first."""
    first = _tile(base, rows, columns, row_stride, row_count, width)
    return first, _tile(base + stride, rows, columns, row_stride, row_count, width)


@triton.jit
def _vectors(base, stride, rows, row_count):
    """A figure of both maps for each row, zero outside the tensor."""
    first = tl.load(base + rows, mask=rows < row_count, other=0.0)
    return first, tl.load(base + stride + rows, mask=rows < row_count, other=0.0)


@triton.jit
def _seen(keys, low, high):
    """Which of the keys each row attends to, (M, N)."""
    return (keys[None, :] >= low[:, None]) & (keys[None, :] < high[:, None])


@triton.jit
def _offsets(batch, rows, row_count, heads, head, width, columns):
    """Offsets of a tile of head ``head`` in a contiguous (B, row_count, heads, width)."""
    return ((batch * row_count + rows) * heads + head)[:, None] * width + columns[None, :]


@triton.jit
def _fold(logits, v, m, total, out, EXACT: tl.constexpr):
    """Update an online softmax (maximum, sum, unnormalised output) with further keys."""
    m_next = tl.maximum(m, tl.max(logits, 1))
    finite = tl.where(m_next == float("-inf"), 0.0, m_next)
    weights = tl.exp2(logits - finite[:, None])  # (M, N)
    shrink = tl.exp2(m - finite)
    return (
        m_next,
        total * shrink + tl.sum(weights, 1),
        out * shrink[:, None] + _dot(weights.to(v.dtype), v, EXACT),
    )


@triton.jit
def _read(
    q1, q2, K, V, low, high, m1, m2, sum1, sum2, out1, out2, start, stop, scale, tk, k_stride,
    map_stride, v_stride,
    D: tl.constexpr, BLOCK_D: tl.constexpr, WIDE: tl.constexpr, BLOCK_WIDE: tl.constexpr,
    N: tl.constexpr, MASKED: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """Update both online softmaxes of a block of rows with the keys from ``start`` to ``stop``."""
    width, wide = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_WIDE)
    for n in range(start, stop, N):
        keys = n + tl.arange(0, N)
        v = _tile(V, keys, wide, v_stride, tk, WIDE)  # (N, dv)
        k1, k2 = _tiles(K, map_stride, keys, width, k_stride, tk, D)
        logits1 = _dot(q1, tl.trans(k1), EXACT) * scale
        logits2 = _dot(q2, tl.trans(k2), EXACT) * scale
        if MASKED:
            seen = _seen(keys, low, high)
            logits1 = tl.where(seen, logits1, float("-inf"))
            logits2 = tl.where(seen, logits2, float("-inf"))
        m1, sum1, out1 = _fold(logits1, v, m1, sum1, out1, EXACT)
        m2, sum2, out2 = _fold(logits2, v, m2, sum2, out2, EXACT)
    return m1, m2, sum1, sum2, out1, out2


@triton.jit
def forward_kernel(
    Q, K, V, LAM, LOW, HIGH, OUT, OUT2, LSE, scale, tq, tk, heads, group_size,
    q_batch, q_row, q_map, k_batch, k_row, k_map, v_batch, v_row, v_head,
    D: tl.constexpr, BLOCK_D: tl.constexpr, WIDE: tl.constexpr, BLOCK_WIDE: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """OUT = O1 - lambda O2, OUT2 = O2, both (B, Tq, h, dv), and LSE (2, B, h, Tq) of both maps."""
    batch, head = (tl.program_id(1) // heads).to(tl.int64), tl.program_id(1) % heads
    group = head // group_size
    rows = tl.program_id(0) * M + tl.arange(0, M)
    width, wide = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_WIDE)
    Q += batch * q_batch + 2 * head * q_map
    K += batch * k_batch + 2 * group * k_map
    V += batch * v_batch + group * v_head
    q1, q2 = _tiles(Q, q_map, rows, width, q_row, tq, D)
    clipped = tl.minimum(rows, tq - 1)  # rows after the last one repeat it and are not stored
    low, high = tl.load(LOW + clipped), tl.load(HIGH + clipped)
    m1, m2 = tl.full([M], float("-inf"), tl.float32), tl.full([M], float("-inf"), tl.float32)
    sum1, sum2 = tl.zeros([M], tl.float32), tl.zeros([M], tl.float32)
    out1, out2 = tl.zeros([M, BLOCK_WIDE], tl.float32), tl.zeros([M, BLOCK_WIDE], tl.float32)
    # Keys that all rows attend to need no mask. On both sides are keys that only some rows attend
    # to.
    start, stop = tl.min(low) // N * N, tl.max(high)
    full_start = tl.minimum((tl.max(low) + N - 1) // N * N, stop)
    full_stop = tl.maximum(tl.min(high) // N * N, full_start)
    for part in tl.static_range(3):
        begin = start if part == 0 else full_start if part == 1 else full_stop
        end = full_start if part == 0 else full_stop if part == 1 else stop
        m1, m2, sum1, sum2, out1, out2 = _read(
            q1, q2, K, V, low, high, m1, m2, sum1, sum2, out1, out2, begin, end, scale, tk, k_row,
            k_map, v_row,
            D, BLOCK_D, WIDE, BLOCK_WIDE, N, part != 1, EXACT,
        )  # fmt: skip
    out1 = out1 / tl.where(sum1 == 0, 1.0, sum1)[:, None]
    out2 = out2 / tl.where(sum2 == 0, 1.0, sum2)[:, None]
    lam = tl.load(LAM + (batch * heads + head) * tq + clipped)
    inside = (rows < tq)[:, None] & (wide < WIDE)[None, :]
    offset = _offsets(batch, rows, tq, heads, head, WIDE, wide)
    tl.store(OUT + offset, (out1 - lam[:, None] * out2).to(OUT.dtype.element_ty), mask=inside)
    tl.store(OUT2 + offset, out2.to(OUT2.dtype.element_ty), mask=inside)
    LSE += (batch * heads + head) * tq + rows
    second_map = tl.num_programs(1).to(tl.int64) * tq  # offset from the first map to the second
    tl.store(LSE, tl.where(sum1 == 0, 0.0, m1 + tl.log2(sum1)), mask=rows < tq)
    tl.store(LSE + second_map, tl.where(sum2 == 0, 0.0, m2 + tl.log2(sum2)), mask=rows < tq)


@triton.jit
def row_sums_kernel(
    D_OUT, OUT, OUT2, LAM, SUMS, tq, heads,
    WIDE: tl.constexpr, BLOCK_WIDE: tl.constexpr, M: tl.constexpr,
):  # fmt: skip
    """SUMS (2, B, h, Tq): the sums of dO·O1 and of dO·O2 over a row, with O1 = OUT + lambda O2."""
    batch, head = (tl.program_id(1) // heads).to(tl.int64), tl.program_id(1) % heads
    rows, wide = tl.program_id(0) * M + tl.arange(0, M), tl.arange(0, BLOCK_WIDE)
    inside = (rows < tq)[:, None] & (wide < WIDE)[None, :]
    offset = _offsets(batch, rows, tq, heads, head, WIDE, wide)
    d_out = tl.load(D_OUT + offset, mask=inside, other=0.0).to(tl.float32)
    out_sum = tl.sum(d_out * tl.load(OUT + offset, mask=inside, other=0.0).to(tl.float32), 1)
    second = tl.sum(d_out * tl.load(OUT2 + offset, mask=inside, other=0.0).to(tl.float32), 1)
    SUMS += (batch * heads + head) * tq + rows
    lam = tl.load(LAM + (batch * heads + head) * tq + rows, mask=rows < tq, other=0.0)
    tl.store(SUMS, out_sum + lam * second, mask=rows < tq)
    tl.store(SUMS + tl.num_programs(1).to(tl.int64) * tq, second, mask=rows < tq)


@triton.jit
def _d_logits(
    q1, q2, k1, k2, v, d_out, lse1, lse2, sum1, sum2, lam, seen, scale, EXACT: tl.constexpr,
):  # fmt: skip
    """P (M, N) and the gradients of both maps' logits, for a block of rows and one of keys."""
    a1 = tl.where(seen, tl.exp2(_dot(q1, tl.trans(k1), EXACT) * scale - lse1[:, None]), 0.0)
    a2 = tl.where(seen, tl.exp2(_dot(q2, tl.trans(k2), EXACT) * scale - lse2[:, None]), 0.0)
    d_map = _dot(d_out, tl.trans(v), EXACT)  # (M, N)
    a2_lam = lam[:, None] * a2
    return a1 - a2_lam, a1 * (d_map - sum1[:, None]), -a2_lam * (d_map - sum2[:, None])


@triton.jit
def keys_kernel(
    Q, K, V, LAM, LOW, HIGH, FIRST, LAST, D_OUT, LSE, SUMS, DK, DV, scale, factor, tq, tk, heads,
    group_size,
    q_batch, q_row, q_map, k_batch, k_row, k_map, v_batch, v_row, v_head,
    D: tl.constexpr, BLOCK_D: tl.constexpr, WIDE: tl.constexpr, BLOCK_WIDE: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """DK (B, Tk, 2G, d) and DV (B, Tk, G, dv): a block of keys and the rows that attend to it.

    The rows are [FIRST, LAST); the heads of a group are summed in order.
    """
    groups = heads // group_size
    batch, group = (tl.program_id(1) // groups).to(tl.int64), tl.program_id(1) % groups
    keys = tl.program_id(0) * N + tl.arange(0, N)
    width, wide = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_WIDE)
    K += batch * k_batch + 2 * group * k_map
    V += batch * v_batch + group * v_head
    k1, k2 = _tiles(K, k_map, keys, width, k_row, tk, D)
    v = _tile(V, keys, wide, v_row, tk, WIDE)
    dk1, dk2 = tl.zeros([N, BLOCK_D], tl.float32), tl.zeros([N, BLOCK_D], tl.float32)
    dv = tl.zeros([N, BLOCK_WIDE], tl.float32)
    clipped = tl.minimum(keys, tk - 1)
    start, stop = tl.min(tl.load(FIRST + clipped)) // M * M, tl.max(tl.load(LAST + clipped))
    second_map = tl.num_programs(1).to(tl.int64) * group_size * tq  # offset from the first map
    for member in range(0, group_size):
        head = group * group_size + member
        q = Q + batch * q_batch + 2 * head * q_map
        rows_of = (batch * heads + head) * tq
        d_head = D_OUT + (batch * tq * heads + head) * WIDE
        for m in range(start, stop, M):
            rows = m + tl.arange(0, M)
            valid = rows < tq
            q1, q2 = _tiles(q, q_map, rows, width, q_row, tq, D)
            d_out = _tile(d_head, rows, wide, heads * WIDE, tq, WIDE)
            lam = tl.load(LAM + rows_of + rows, mask=valid, other=0.0)
            low = tl.load(LOW + rows, mask=valid, other=0)
            high = tl.load(HIGH + rows, mask=valid, other=0)
            lse1, lse2 = _vectors(LSE + rows_of, second_map, rows, tq)
            sum1, sum2 = _vectors(SUMS + rows_of, second_map, rows, tq)
            p, d_logits1, d_logits2 = _d_logits(
                q1, q2, k1, k2, v, d_out, lse1, lse2, sum1, sum2, lam, _seen(keys, low, high),
                scale, EXACT,
            )  # fmt: skip
            dv += _dot(tl.trans(p).to(d_out.dtype), d_out, EXACT)
            dk1 += _dot(tl.trans(d_logits1).to(q1.dtype), q1, EXACT)
            dk2 += _dot(tl.trans(d_logits2).to(q2.dtype), q2, EXACT)
    inside = (keys < tk)[:, None] & (width < D)[None, :]
    offset = DK + _offsets(batch, keys, tk, groups, group, 2 * D, width)
    tl.store(offset, (dk1 * factor).to(DK.dtype.element_ty), mask=inside)
    tl.store(offset + D, (dk2 * factor).to(DK.dtype.element_ty), mask=inside)
    inside = (keys < tk)[:, None] & (wide < WIDE)[None, :]
    offset = DV + _offsets(batch, keys, tk, groups, group, WIDE, wide)
    tl.store(offset, dv.to(DV.dtype.element_ty), mask=inside)


@triton.jit
def queries_kernel(
    Q, K, V, LAM, LOW, HIGH, D_OUT, LSE, SUMS, DQ, scale, factor, tq, tk, heads, group_size,
    q_batch, q_row, q_map, k_batch, k_row, k_map, v_batch, v_row, v_head,
    D: tl.constexpr, BLOCK_D: tl.constexpr, WIDE: tl.constexpr, BLOCK_WIDE: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """DQ (B, Tq, 2h, d): a block of rows and the keys that any of them attends to."""
    batch, head = (tl.program_id(1) // heads).to(tl.int64), tl.program_id(1) % heads
    group = head // group_size
    rows = tl.program_id(0) * M + tl.arange(0, M)
    width, wide = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_WIDE)
    valid = rows < tq
    Q += batch * q_batch + 2 * head * q_map
    K += batch * k_batch + 2 * group * k_map
    V += batch * v_batch + group * v_head
    q1, q2 = _tiles(Q, q_map, rows, width, q_row, tq, D)
    d_head = D_OUT + (batch * tq * heads + head) * WIDE
    d_out = _tile(d_head, rows, wide, heads * WIDE, tq, WIDE)
    rows_of = (batch * heads + head) * tq
    second_map = tl.num_programs(1).to(tl.int64) * tq
    lse1, lse2 = _vectors(LSE + rows_of, second_map, rows, tq)
    sum1, sum2 = _vectors(SUMS + rows_of, second_map, rows, tq)
    clipped = tl.minimum(rows, tq - 1)
    lam = tl.load(LAM + rows_of + clipped)
    low, high = tl.load(LOW + clipped), tl.load(HIGH + clipped)
    dq1, dq2 = tl.zeros([M, BLOCK_D], tl.float32), tl.zeros([M, BLOCK_D], tl.float32)
    for n in range(tl.min(low) // N * N, tl.max(high), N):
        keys = n + tl.arange(0, N)
        k1, k2 = _tiles(K, k_map, keys, width, k_row, tk, D)
        v = _tile(V, keys, wide, v_row, tk, WIDE)
        _, d_logits1, d_logits2 = _d_logits(
            q1, q2, k1, k2, v, d_out, lse1, lse2, sum1, sum2, lam, _seen(keys, low, high), scale,
            EXACT,
        )  # fmt: skip
        dq1 += _dot(d_logits1.to(k1.dtype), k1, EXACT)
        dq2 += _dot(d_logits2.to(k2.dtype), k2, EXACT)
    offset = DQ + _offsets(batch, rows, tq, heads, head, 2 * D, width)
    inside = valid[:, None] & (width < D)[None, :]
    tl.store(offset, (dq1 * factor).to(DQ.dtype.element_ty), mask=inside)
    tl.store(offset + D, (dq2 * factor).to(DQ.dtype.element_ty), mask=inside)


@triton.jit
def decode_kernel(
    Q, K, V, OUT, LSE, scale, tk, split, groups, splits,
    q_batch, q_map, k_batch, k_row, k_map, v_batch, v_row, v_head,
    R: tl.constexpr, BLOCK_R: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    WIDE: tl.constexpr, BLOCK_WIDE: tl.constexpr, N: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """Decode one query per sequence: OUT (B, G, splits, 2, R, dv) and LSE (B, G, splits, 2, R).

    Both hold both maps over each part of the keys. The heads of a group share its keys, and are the
    rows of the matrix products.
    """
    batch, group = (tl.program_id(0) // groups).to(tl.int64), tl.program_id(0) % groups
    part = tl.program_id(1)
    members, width, wide = tl.arange(0, BLOCK_R), tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_WIDE)
    Q += batch * q_batch + 2 * group * R * q_map
    K += batch * k_batch + 2 * group * k_map
    V += batch * v_batch + group * v_head
    q1, q2 = _tiles(Q, q_map, members, width, 2 * q_map, R, D)
    start, stop = part * split, tl.minimum((part + 1) * split, tk)
    low, high = tl.full([BLOCK_R], 0, tl.int32) + start, tl.full([BLOCK_R], 0, tl.int32) + stop
    m, total = tl.full([BLOCK_R], float("-inf"), tl.float32), tl.zeros([BLOCK_R], tl.float32)
    out = tl.zeros([BLOCK_R, BLOCK_WIDE], tl.float32)
    m1, m2, sum1, sum2, out1, out2 = _read(
        q1, q2, K, V, low, high, m, m, total, total, out, out, start, stop, scale, tk, k_row,
        k_map, v_row,
        D, BLOCK_D, WIDE, BLOCK_WIDE, N, True, EXACT,
    )  # fmt: skip
    rows = (tl.program_id(0) * splits + part).to(tl.int64) * 2 * R + members
    offset = rows[:, None] * WIDE + wide[None, :]
    inside = (members < R)[:, None] & (wide < WIDE)[None, :]
    tl.store(OUT + offset, out1 / sum1[:, None], mask=inside)
    tl.store(OUT + offset + R * WIDE, out2 / sum2[:, None], mask=inside)
    LSE += rows
    tl.store(LSE, m1 + tl.log2(sum1), mask=members < R)
    tl.store(LSE + R, m2 + tl.log2(sum2), mask=members < R)
