"""The kernels that go over numbers one by one: arrays over the memory of tensors, BF16 as int16.

T rows or tokens; other letters as in the files that call them.
"""

import numpy as np

from model.kernels.jit import SUMS, helper, kernel
from model.kernels.scalars import ONE, exp, load, narrow, rounded, scaled, wide


@helper
def copied(x, y):
    """To what ``y`` stores."""
    for i in range(len(y)):
        y[i] = rounded(load(x[i]), y[i])


@helper
def turned(x, turn, y):
    """Pairs of BF16, each turned and rounded to BF16; ``turn`` has a cosine and a sine for each."""
    for p in range(len(turn)):
        a, b = wide(x[2 * p]), wide(x[2 * p + 1])
        y[2 * p] = rounded(wide(narrow(a * turn[p, 0] - b * turn[p, 1])), y[2 * p])
        y[2 * p + 1] = rounded(wide(narrow(a * turn[p, 1] + b * turn[p, 0])), y[2 * p + 1])


@helper
def turned_back(x, turn, y):
    """Pairs turned the other way, in BF16."""
    for p in range(len(turn)):
        a, b = load(x[2 * p]), load(x[2 * p + 1])
        y[2 * p] = narrow(a * turn[p, 0] + b * turn[p, 1])
        y[2 * p + 1] = narrow(b * turn[p, 0] - a * turn[p, 1])


@kernel(
    "void(int16[:,::1], float32[::1], int16[:,::1])",
    "void(float32[:,::1], float32[::1], float32[:,::1])",
)
def swiglu_forward(x_T2F, weights_T, y_TF):
    rows, width = y_TF.shape
    weighted = len(weights_T) > 0
    for t in range(rows):
        weight = weights_T[t] if weighted else ONE
        for f in range(width):
            gate, up = load(x_T2F[t, f]), load(x_T2F[t, width + f])
            y_TF[t, f] = rounded(gate / (ONE + exp(-gate)) * up * weight, y_TF[t, f])


@kernel(
    "void(int16[:,::1], float32[::1], int16[:,::1], int16[:,::1], float32[::1])",
    "void(float32[:,::1], float32[::1], float32[:,::1], int16[:,::1], float32[::1])",
    may=SUMS,
)
def swiglu_backward(x_T2F, weights_T, gy_TF, gx_T2F, gweights_T):
    rows, width = gy_TF.shape
    weighted = len(weights_T) > 0
    for t in range(rows):
        weight = weights_T[t] if weighted else ONE
        gweight = np.float32(0)
        for f in range(width):
            gate, up, gy = load(x_T2F[t, f]), load(x_T2F[t, width + f]), load(gy_TF[t, f])
            sigmoid = ONE / (ONE + exp(-gate))
            silu = gate * sigmoid
            gweight += silu * (gy * up)
            gx_T2F[t, f] = narrow(gy * up * weight * sigmoid * (ONE + gate * (ONE - sigmoid)))
            gx_T2F[t, width + f] = narrow(silu * weight * gy)
        if weighted:
            gweights_T[t] = gweight


@kernel("void(int16[:,::1], float32[::1], float32, int16[:,::1], float32[::1])", may=SUMS)
def norm_forward(x_TD, weight_D, eps, y_TD, scale_T):
    rows, width = x_TD.shape
    for t in range(rows):
        total = np.float32(0)
        for d in range(width):
            total += wide(x_TD[t, d]) * wide(x_TD[t, d])
        scale = np.float32(1) / np.sqrt(total / np.float32(width) + eps)
        for d in range(width):
            y_TD[t, d] = narrow(scaled(wide(x_TD[t, d]), scale, weight_D[d]))
        scale_T[t] = scale


@kernel("void(int16[:,::1], float32[::1], float32[::1], int16[:,::1], int16[:,::1], float32[::1])", may=SUMS)
def norm_backward(x_TD, weight_D, scale_T, gy_TD, gx_TD, gweight_D):
    """gx = scale · (gy w - x · scale² · mean(gy w x)), gw += sum over rows of gy x · scale."""
    rows, width = x_TD.shape
    for t in range(rows):
        scale, total = scale_T[t], np.float32(0)
        for d in range(width):
            product = wide(gy_TD[t, d]) * wide(x_TD[t, d])
            total += product * weight_D[d]
            gweight_D[d] += product * scale
        mean = total / np.float32(width) * scale * scale * scale
        for d in range(width):
            gx_TD[t, d] = narrow(wide(gy_TD[t, d]) * weight_D[d] * scale - wide(x_TD[t, d]) * mean)


@kernel(
    "void(int16[:,:,::1], int16[:,:,::1], int16[:,::1], float32[:,:,::1], int64, int64,"
    " float32[:,:,::1], float32[:,:,::1], float32[:,:,::1])",
    "void(int16[:,:,::1], int16[:,:,::1], int16[:,::1], float32[:,:,::1], int64, int64,"
    " int16[:,:,::1], int16[:,:,::1], int16[:,:,::1])",
)
def core_inputs_forward(query_THK, keys_values_THX, rope_TR, turns, first, nope, q_THK, k_THK, v_THW):
    tokens, heads, width = query_THK.shape
    values, rope = keys_values_THX.shape[2] - nope, np.empty(width - nope, np.float32)
    for t in range(tokens):
        turn = turns[(first + t) % len(turns)]
        turned(rope_TR[t], turn, rope)
        for h in range(heads):
            copied(query_THK[t, h, :nope], q_THK[t, h, :nope])
            copied(keys_values_THX[t, h, :nope], k_THK[t, h, :nope])
            turned(query_THK[t, h, nope:], turn, q_THK[t, h, nope:])
            copied(rope, k_THK[t, h, nope:])
            copied(keys_values_THX[t, h, nope:], v_THW[t, h, :values])
            v_THW[t, h, values:] = 0


@kernel(
    "void(float32[:,:,::1], float32[:,:,::1], float32[:,:,::1], float32[:,:,::1], int64, int64,"
    " int16[:,:,::1], int16[:,:,::1], int16[:,::1])",
    "void(int16[:,:,::1], int16[:,:,::1], int16[:,:,::1], float32[:,:,::1], int64, int64,"
    " int16[:,:,::1], int16[:,:,::1], int16[:,::1])",
)
def core_inputs_backward(gq_THK, gk_THK, gv_THW, turns, first, nope, gquery_THK, gkeys_values_THX, grope_TR):
    tokens, heads, width = gq_THK.shape
    values, total = gkeys_values_THX.shape[2] - nope, np.empty(width - nope, np.float32)
    for t in range(tokens):
        turn = turns[(first + t) % len(turns)]
        total[:] = 0
        for h in range(heads):
            copied(gq_THK[t, h, :nope], gquery_THK[t, h, :nope])
            copied(gk_THK[t, h, :nope], gkeys_values_THX[t, h, :nope])
            copied(gv_THW[t, h, :values], gkeys_values_THX[t, h, nope:])
            turned_back(gq_THK[t, h, nope:], turn, gquery_THK[t, h, nope:])
            gk = gk_THK[t, h, nope:]
            for r in range(len(gk)):
                total[r] += load(gk[r])
        turned_back(total, turn, grope_TR[t])
