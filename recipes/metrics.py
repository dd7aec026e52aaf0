"""Measures of held-out rows: what a recipe reports of a classifier, without a network."""

from __future__ import annotations

from typing import Any

import datasets
import evaluate
import numpy as np
from transformers.utils import logging

logger = logging.get_logger(__name__)


class Classification(evaluate.Metric):
    """Accuracy, and the mean over the labels of the F1 score; both in [0, 1]."""

    def _info(self) -> evaluate.MetricInfo:
        whole = datasets.Value("int64")
        return evaluate.MetricInfo(
            description=self.__doc__ or "",
            citation="",
            features=datasets.Features({"predictions": whole, "references": whole}),
        )

    def _compute(self, predictions: Any, references: Any) -> dict[str, float]:
        predicted, true = np.asarray(predictions), np.asarray(references)
        scores = []
        for label in np.union1d(predicted, true):
            hits = np.sum((predicted == label) & (true == label))
            scores.append(2 * hits / (np.sum(predicted == label) + np.sum(true == label)))
        return {"accuracy": float(np.mean(predicted == true)), "macro_f1": float(np.mean(scores))}


def load_metrics(names: list[str]) -> list[evaluate.EvaluationModule]:
    """Returns `Classification` and the metrics of `evaluate` with these names, where they can be fetched."""
    metrics: list[evaluate.EvaluationModule] = [Classification()]
    for name in names:
        try:
            metrics.append(evaluate.load(name))
        except (OSError, ImportError) as error:
            logger.warning(f"metric {name!r} cannot be fetched and is left out: {error}")
    return metrics


def score(metrics: list[evaluate.EvaluationModule], predictions: Any, references: Any) -> dict[str, float]:
    """Returns what the metrics say of predicted and true labels, both (rows,)."""
    found: dict[str, float] = {}
    for metric in metrics:
        values = metric.compute(predictions=predictions, references=references)
        found |= {name: float(value) for name, value in values.items()}
    return found
