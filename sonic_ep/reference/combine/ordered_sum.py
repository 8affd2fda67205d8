"""The sum in every combine mode: a fixed order, fp32, one rounding."""

import torch
from torch import Tensor


def ordered_sum(rows_NH: Tensor, index_MK: Tensor, weight_MK: Tensor | None = None) -> Tensor:
    """``out[m] = round(sum over k of weight[m, k] * rows[index[m, k]])``, in the dtype of the rows, (M, H).

    k ascends. Products and sums are fp32, each rounded (no fused multiply-add), with one rounding to the dtype at the
    end. Terms with index -1 are absent; as the sum starts at +0 and is never -0, adding +0 for them changes no bit.

    rows_NH (N, H) float; index_MK (M, K) int; weight_MK (M, K) fp32, or None where every weight is 1.

    >>> ordered_sum(torch.tensor([[1.0], [10.0]]), torch.tensor([[1, 0], [-1, 0]]), torch.tensor([[2.0, 3.0]] * 2))
    tensor([[23.],
            [ 3.]])
    """
    total_MH = rows_NH.new_zeros((index_MK.shape[0], rows_NH.shape[1]), dtype=torch.float32)
    for k in range(index_MK.shape[1]):
        tokens_N = (index_MK[:, k] >= 0).nonzero().squeeze(1)
        term_NH = rows_NH[index_MK[tokens_N, k].long()].float()
        if weight_MK is not None:
            term_NH = term_NH * weight_MK[tokens_N, k, None]
        total_MH[tokens_N] = total_MH[tokens_N] + term_NH
    return total_MH.to(rows_NH.dtype)
