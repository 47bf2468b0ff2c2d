"""How far a model's next-token distributions lie from those of a reference, token by token.

KL(P || Q) = sum_v p_v (log p_v - log q_v) in nats, P = reference, Q = the model under test.
Shapes as in perplexity.py: B = windows, T = tokens of a window, P = T - 1 predictions, R = rows, V = vocabulary.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from quantkit_eval.perplexity import chunks


@dataclass(frozen=True, slots=True)
class Comparison:
    """Per predicted token, [B, P] each; losses are cross-entropies in nats.

    loss, reference_loss  float32
    kl                    float64, KL(reference || model)
    agree                 bool, both find the same token likeliest
    right, reference_right  bool, the likeliest token is the text's
    """

    loss: Tensor
    reference_loss: Tensor
    kl: Tensor
    agree: Tensor
    right: Tensor
    reference_right: Tensor


def compare(logits_BTV: Tensor, reference_BTV: Tensor, ids_BT: Tensor) -> Comparison:
    """Compare two models' logits over the same windows. Log-softmax in float32, the sum over V in float64."""
    B, T, _ = logits_BTV.shape
    columns: list[tuple[Tensor, ...]] = []
    for b, rows in chunks(logits_BTV):
        targets_R = ids_BT[b, 1:][rows]
        log_q_RV = logits_BTV[b, rows].float().log_softmax(-1)
        log_p_RV = reference_BTV[b, rows].float().log_softmax(-1)
        guess_R, reference_guess_R = log_q_RV.argmax(-1), log_p_RV.argmax(-1)
        columns.append(
            (
                -log_q_RV.gather(-1, targets_R[:, None])[:, 0],
                -log_p_RV.gather(-1, targets_R[:, None])[:, 0],
                kl_divergence(log_p_RV, log_q_RV),
                guess_R == reference_guess_R,
                guess_R == targets_R,
                reference_guess_R == targets_R,
            )
        )
    return Comparison(*(torch.cat(parts).view(B, T - 1) for parts in zip(*columns, strict=True)))


def kl_divergence(log_p_RV: Tensor, log_q_RV: Tensor) -> Tensor:
    """float64 [R]: KL of each row. Logits of -inf (p = 0) add nothing, as p log p -> 0."""
    p_RV = log_p_RV.exp()
    terms_RV = torch.where(p_RV > 0, p_RV * (log_p_RV - log_q_RV), 0.0)
    return terms_RV.sum(-1, dtype=torch.float64)
