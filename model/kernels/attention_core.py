"""Attention's core in BF16: causal softmax(q kᵀ · scale) v for each head, and its gradients.

A few queries at a time see all of their keys, so that their logits stay in FP32 in the cache and a row's softmax is the
definition's. Weights of the softmax and gradients of logits are rounded to BF16 before they multiply, as fused cores do
on GPUs. Threads share the sequences' heads.

S sequence, H heads, K dims of queries and keys, V of values, L = B·H; M rows of a tile, N panels, J = 32 columns.
"""

import numpy as np
import torch
from torch import Tensor

from model.kernels.calls import array, by_rows
from model.kernels.jit import helper, kernel, summing
from model.kernels.panels import PAIR, address, pack_columns, pack_rows, pair_of, panels_of, tile, tile_of_rows
from model.kernels.registers import COLUMNS, ROWS, available
from model.kernels.scalars import exp, narrow, wide

QUERIES = 48
"""Of which the gradients of keys and values are summed in registers: four tiles."""


def serves(x: Tensor, key_width: int, value_width: int) -> bool:
    """Whether the kernels are for such widths, and numbers such as those of ``x``, on this machine."""
    even = not (key_width | value_width) & 1
    return x.dtype == torch.bfloat16 and x.device.type == "cpu" and even and available()


def forward(q_BSHK: Tensor, k_BSHK: Tensor, v_BSHV: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """The result [B, S, H, V] in BF16, and the logarithm of each row's sum [B, H, S] in FP32."""
    batch, length, heads, _ = q_BSHK.shape
    out, log_sums = torch.empty_like(v_BSHV, memory_format=torch.contiguous_format), torch.empty(batch, heads, length)
    q, k, v = (array(of.contiguous()) for of in (q_BSHK, k_BSHK, v_BSHV))
    written = array(out), array(log_sums)
    work = length * length * q.shape[3]
    by_rows(batch * heads, work, lambda a, b: _forward(q, k, v, np.float32(scale), a, b, *written))
    return out, log_sums


def backward(
    q_BSHK: Tensor, k_BSHK: Tensor, v_BSHV: Tensor, out_BSHV: Tensor, log_sums: Tensor, g_BSHV: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of queries, keys and values, each laid out as they are, in BF16."""
    batch, length, heads, width = q_BSHK.shape
    read = [array(of.contiguous()) for of in (q_BSHK, k_BSHK, v_BSHV, out_BSHV, log_sums, g_BSHV)]
    gradients = [torch.empty(of.shape, dtype=of.dtype) for of in (q_BSHK, k_BSHK, v_BSHV)]
    written = [array(of) for of in gradients]
    work = length * length * width
    by_rows(batch * heads, work, lambda a, b: _backward(*read, np.float32(scale), a, b, *written))
    gq, gk, gv = gradients
    return gq, gk, gv


@helper
def packed(x_SD, rows):
    """Pairs along rows, or along columns (which ``rows`` says), into panels."""
    length, width = x_SD.shape
    if rows:
        b_NPJ = np.empty((panels_of(width), (length + 1) // 2, COLUMNS), np.int32)
        pack_rows(x_SD, 0, b_NPJ)
    else:
        b_NPJ = np.empty((panels_of(length), width // 2, COLUMNS), np.int32)
        pack_columns(x_SD, 0, b_NPJ)
    return b_NPJ


@helper
def products_of(x_SD, i, rows, b_NPJ, panels, c_NMJ):
    """Rows from ``i`` on times the first panels, which pairs along columns make."""
    pairs = x_SD.shape[1] // 2
    for n in range(panels):
        done = 0
        while done < rows:
            done += tile_of_rows(x_SD, i + done, rows - done, pairs, b_NPJ[n], c_NMJ[n, done:])


@helper
def mixed(weights_MS, rows, pairs, b_NPJ, factor_M, c_MJ, y_SD, i):
    """Rows from ``i`` on of y: what rows of weights make of the first ``pairs`` of keys, each times its factor."""
    for n in range(panels_of(y_SD.shape[1])):
        done = 0
        while done < rows:
            done += tile_of_rows(weights_MS, done, rows - done, pairs, b_NPJ[n], c_MJ[done:])
        for m in range(rows):
            c, y, factor = c_MJ[m], y_SD[i + m, n * COLUMNS : (n + 1) * COLUMNS], factor_M[m]
            for j in range(len(y)):
                y[j] = narrow(c[j] * factor)


@helper
def largest_of(s_NMJ, m, seen, lanes_J):
    """Of the logits of a row, of which ``seen`` are of keys that the query sees."""
    lanes_J[:] = -np.inf
    for n in range(panels_of(seen)):
        s = s_NMJ[n, m, : min(COLUMNS, seen - n * COLUMNS)]
        for j in range(len(s)):
            lanes_J[j] = s[j] if s[j] > lanes_J[j] else lanes_J[j]
    largest = lanes_J[0]
    for j in range(COLUMNS):
        largest = max(largest, lanes_J[j])
    return largest


@summing
def sum_of(x_J):
    total = np.float32(0)
    for j in range(len(x_J)):
        total += x_J[j]
    return total


@summing
def dot(x_D, y_D):
    total = np.float32(0)
    for d in range(len(x_D)):
        total += wide(x_D[d]) * wide(y_D[d])
    return total


@helper
def weigh(s_NMJ, m, seen, visible, scale, lanes_J, weights_S):
    """A row's weights before they are divided by their sum, in the panels that a tile sees: the sum, its logarithm."""
    largest = largest_of(s_NMJ, m, seen, lanes_J)
    lanes_J[:] = 0
    for n in range(visible):
        s, weights, there = s_NMJ[n, m], weights_S[n * COLUMNS : (n + 1) * COLUMNS], seen - n * COLUMNS
        for j in range(COLUMNS):
            weight = exp((s[j] - largest) * scale) if j < there else np.float32(0)
            weights[j] = narrow(weight)
            lanes_J[j] += weight
    total = sum_of(lanes_J)
    return total, largest * scale + np.log(total)


@helper
def differentiate(s_NMJ, ds_NMJ, m, seen, visible, scale, log_sum, mean, gs_S):
    """A row's logits become its weights, the weights' gradients those of the logits: w (g - mean of g) · scale."""
    for n in range(visible):
        s, ds, gs = s_NMJ[n, m], ds_NMJ[n, m], gs_S[n * COLUMNS : (n + 1) * COLUMNS]
        there = seen - n * COLUMNS
        for j in range(COLUMNS):
            weight = exp(s[j] * scale - log_sum) if j < there else np.float32(0)
            gradient = weight * (ds[j] - mean) * scale if j < there else np.float32(0)
            s[j], ds[j], gs[j] = weight, gradient, narrow(gradient)


@helper
def keep_pairs(x_NMJ, rows, visible, first, panels, kept_PS):
    """Rows of a tile two by two, in BF16, from the pair ``first`` on; panels that the tile does not see are zero."""
    x_NMJ[:visible, rows:] = 0
    for p in range((rows + 1) // 2):
        for n in range(visible):
            low, high = x_NMJ[n, 2 * p], x_NMJ[n, 2 * p + 1]
            kept = kept_PS[first + p, n * COLUMNS : (n + 1) * COLUMNS]
            for j in range(COLUMNS):
                kept[j] = pair_of(narrow(low[j]), narrow(high[j]))
        kept_PS[first + p, visible * COLUMNS : panels * COLUMNS] = 0


@helper
def add_columns(x_PS, rows, b_NPJ, sums_SD):
    """sums += xᵀ b over pairs of ``rows`` rows."""
    length, width = sums_SD.shape
    c_MJ, pairs, i = np.empty((ROWS, COLUMNS), np.float32), (rows + 1) // 2, 0
    while i < length:
        done = 0
        for n in range(panels_of(width)):
            a = address(x_PS[0, i:])
            done = tile(length - i, a, PAIR, x_PS.strides[0], pairs, address(b_NPJ[n]), address(c_MJ))
            for m in range(done):
                c, sums = c_MJ[m], sums_SD[i + m, n * COLUMNS : (n + 1) * COLUMNS]
                for j in range(len(sums)):
                    sums[j] += c[j]
        i += done


@helper
def narrow_to(x_SD, y_SD):
    for i in range(len(x_SD)):
        x, y = x_SD[i], y_SD[i]
        for d in range(len(x)):
            y[d] = narrow(x[d])


@kernel(
    "void(int16[:,:,:,::1], int16[:,:,:,::1], int16[:,:,:,::1], float32, int64, int64, int16[:,:,:,::1],"
    " float32[:,:,::1])",
    able=available(),
)
def _forward(q_BSHK, k_BSHK, v_BSHV, scale, first, last, out_BSHV, log_sums_BHS):
    _, length, heads, _ = v_BSHV.shape
    panels = panels_of(length)
    s_NMJ, weights_MS = np.empty((panels, ROWS, COLUMNS), np.float32), np.empty((ROWS, panels * COLUMNS), np.int16)
    c_MJ, lanes_J = np.empty((ROWS, COLUMNS), np.float32), np.empty(COLUMNS, np.float32)
    inverse_M = np.ones(ROWS, np.float32)
    for of in range(first, last):
        b, h = of // heads, of % heads
        q_SK, out_SV = q_BSHK[b, :, h], out_BSHV[b, :, h]
        keys_NPJ, values_NPJ = packed(k_BSHK[b, :, h], False), packed(v_BSHV[b, :, h], True)
        for i in range(0, length, ROWS):
            rows = min(ROWS, length - i)
            visible = panels_of(i + rows)
            products_of(q_SK, i, rows, keys_NPJ, visible, s_NMJ)
            for m in range(rows):
                total, log_sum = weigh(s_NMJ, m, i + m + 1, visible, scale, lanes_J, weights_MS[m])
                inverse_M[m], log_sums_BHS[b, h, i + m] = np.float32(1) / total, log_sum
            pairs = min((length + 1) // 2, visible * COLUMNS // 2)
            mixed(weights_MS, rows, pairs, values_NPJ, inverse_M, c_MJ, out_SV, i)


@kernel(
    "void(int16[:,:,:,::1], int16[:,:,:,::1], int16[:,:,:,::1], int16[:,:,:,::1], float32[:,:,::1],"
    " int16[:,:,:,::1], float32, int64, int64, int16[:,:,:,::1], int16[:,:,:,::1], int16[:,:,:,::1])",
    able=available(),
)
def _backward(q_BSHK, k_BSHK, v_BSHV, out_BSHV, log_sums_BHS, g_BSHV, scale, first, last, gq_BSHK, gk_BSHK, gv_BSHV):
    _, length, heads, width = q_BSHK.shape
    values, panels = v_BSHV.shape[3], panels_of(length)
    s_NMJ, ds_NMJ = np.empty((panels, ROWS, COLUMNS), np.float32), np.empty((panels, ROWS, COLUMNS), np.float32)
    gs_MS, c_MJ = np.empty((ROWS, panels * COLUMNS), np.int16), np.empty((ROWS, COLUMNS), np.float32)
    ones_M = np.ones(ROWS, np.float32)
    # Of the queries of a block: what keys and values are multiplied with, pairs of queries.
    weights_PS = np.empty((QUERIES // 2, panels * COLUMNS), np.int32)
    gs_PS = np.empty((QUERIES // 2, panels * COLUMNS), np.int32)
    gk_SK, gv_SV = np.empty((length, width), np.float32), np.empty((length, values), np.float32)
    for of in range(first, last):
        b, h = of // heads, of % heads
        q_SK, k_SK, v_SV, g_SV = q_BSHK[b, :, h], k_BSHK[b, :, h], v_BSHV[b, :, h], g_BSHV[b, :, h]
        out_SV, gq_SK = out_BSHV[b, :, h], gq_BSHK[b, :, h]
        keys_NPJ, key_rows_NPJ, values_NPJ = packed(k_SK, False), packed(k_SK, True), packed(v_SV, False)
        gk_SK[:], gv_SV[:] = 0, 0
        for start in range(0, length, QUERIES):
            stop = min(start + QUERIES, length)
            for i in range(start, stop, ROWS):
                rows, visible = min(ROWS, stop - i), panels_of(min(i + ROWS, stop))
                products_of(q_SK, i, rows, keys_NPJ, visible, s_NMJ)
                products_of(g_SV, i, rows, values_NPJ, visible, ds_NMJ)
                for m in range(rows):
                    mean, log_sum = dot(g_SV[i + m], out_SV[i + m]), log_sums_BHS[b, h, i + m]
                    differentiate(s_NMJ, ds_NMJ, m, i + m + 1, visible, scale, log_sum, mean, gs_MS[m])
                pairs = min((length + 1) // 2, visible * COLUMNS // 2)
                mixed(gs_MS, rows, pairs, key_rows_NPJ, ones_M, c_MJ, gq_SK, i)
                pair, seen = (i - start) // 2, panels_of(stop)
                keep_pairs(s_NMJ, rows, visible, pair, seen, weights_PS)
                keep_pairs(ds_NMJ, rows, visible, pair, seen, gs_PS)
            add_columns(weights_PS, stop - start, packed(g_SV[start:stop], True), gv_SV[:stop])
            add_columns(gs_PS, stop - start, packed(q_SK[start:stop], True), gk_SK[:stop])
        narrow_to(gk_SK, gk_BSHK[b, :, h])
        narrow_to(gv_SV, gv_BSHV[b, :, h])
