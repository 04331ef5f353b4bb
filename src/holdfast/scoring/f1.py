"""Macro F1 over the answers of a task."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from holdfast.api.scorer import Record, Scorer
from holdfast.scoring.match import accuracy, normalize


class MacroF1(Scorer):
    """F1 of each answer that occurs among the test rows, averaged; a row's own score is its accuracy.

    F1_c = 2 TP_c / (predicted_c + true_c), and macro F1 = mean_c F1_c over the classes c with true_c > 0. A response
    is of class c if it equals c after :func:`normalize`; one that equals no answer is of no class, and so a miss. This
    is scikit-learn's ``f1_score(average="macro", labels=the answers, zero_division=0)``.
    """

    totals_texts = True

    def statistics(self, records: Sequence[Record]) -> NDArray[np.float64]:
        true = [normalize(record["answer"]) for record in records]
        predicted = [normalize(record["response"]) for record in records]
        classes = sorted(set(true))
        is_true, is_predicted = (np.array([[x == c for c in classes] for x in side]) for side in (true, predicted))
        statistics = np.stack([is_true & is_predicted, is_predicted, is_true], axis=-1)  # [rows, classes, 3]
        return statistics.reshape(len(records), -1).astype(float)

    def total(self, sums: NDArray[np.float64]) -> NDArray[np.float64]:
        hits, predicted, true = np.moveaxis(sums.reshape(*sums.shape[:-1], -1, 3), -1, 0)  # each [..., classes]
        f1 = 2 * hits / np.maximum(predicted + true, 1)
        return (f1 * (true > 0)).sum(axis=-1) / (true > 0).sum(axis=-1)


SCORERS = [MacroF1("macro_f1", accuracy, "F1 of each answer that occurs, averaged over the answers")]
