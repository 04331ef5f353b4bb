"""The losses of rehearsal: pure functions on tensors."""

from holdfast.losses.chunked import Head
from holdfast.losses.hidden import l1_loss, l2_loss
from holdfast.losses.kl import Divergence, chunked_kl, kl_divergence, logit_mse
from holdfast.losses.margin import classify, dynamic_weight, margin_loss, margin_sums
from holdfast.losses.next_token import chunked_next_token_nll, next_token_nll, prediction_nll, supervised_tokens

__all__ = [
    "Divergence",
    "Head",
    "chunked_kl",
    "chunked_next_token_nll",
    "classify",
    "dynamic_weight",
    "kl_divergence",
    "l1_loss",
    "l2_loss",
    "logit_mse",
    "margin_loss",
    "margin_sums",
    "next_token_nll",
    "prediction_nll",
    "supervised_tokens",
]
