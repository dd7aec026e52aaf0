"""What the classification recipes share: heads, predictions, and measures that need no network."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import datasets
import evaluate
import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.utils import logging

from hf_polyattn import InputError

from .arguments import FinetuningArguments

logger = logging.get_logger(__name__)

COLUMNS = {
    "accuracy": "share of the held-out examples that get the right label",
    "macro_f1": "F1 score of each label, mean over the labels",
}


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
    metrics: list[evaluate.EvaluationModule] = [Classification(keep_in_memory=True)]
    for name in names:
        try:
            metrics.append(evaluate.load(name, keep_in_memory=True))
        except (OSError, ImportError) as error:
            logger.warning(f"metric {name!r} cannot be fetched and is left out: {error}")
    return metrics


def scorer(metrics: list[evaluate.EvaluationModule]) -> Callable[[Tensor], dict[str, float]]:
    """Returns the function that measures the rows of `predict` by these metrics."""

    def score(rows: Tensor) -> dict[str, float]:
        predictions, references = rows[:, :-1].argmax(-1), rows[:, -1].long()
        found: dict[str, float] = {}
        for metric in metrics:
            found |= metric.compute(predictions=predictions, references=references)
        return {name: float(value) for name, value in found.items()}

    return score


def predict(outputs: Any, batch: Mapping[str, Any]) -> Tensor:
    """Returns the logits of each example and, last, its label: (examples, labels + 1)."""
    return torch.cat([outputs.logits.float(), batch["labels"][:, None].float()], dim=1)


def classifier_loader(auto_class: Any, names: list[str]) -> Callable[..., PreTrainedModel]:
    """Returns the function that loads a classifier with so many labels; its head is new if the checkpoint's differs."""
    labels = {
        "id2label": dict(enumerate(names)),
        "label2id": {name: label for label, name in enumerate(names)},
        "ignore_mismatched_sizes": True,
    }

    def load(source: str, dtype: str) -> PreTrainedModel:
        return auto_class.from_pretrained(source, dtype=dtype, **labels)

    return load


def labelled(config: PreTrainedConfig, names: list[str], arguments: FinetuningArguments) -> PreTrainedConfig:
    """Gives a config the labels of the data, in place, and returns it.

    Raises:
        InputError: --config_overrides ask for another number of labels.
    """
    asked = any(words.startswith("num_labels=") for words in arguments.config_overrides)
    if asked and config.num_labels != len(names):
        raise InputError(
            f"--config_overrides num_labels={config.num_labels} does not fit the data, which have {len(names)} labels; "
            "leave it out"
        )
    config.id2label, config.label2id = dict(enumerate(names)), {name: label for label, name in enumerate(names)}
    return config


def new_modules(auto_class: Any, source: str, names: list[str]) -> tuple[str, ...]:
    """Returns the names of the modules that a checkpoint has no weights for, such as another task's head."""
    _, info = auto_class.from_pretrained(
        source, output_loading_info=True, num_labels=len(names), ignore_mismatched_sizes=True
    )
    keys = {key if isinstance(key, str) else key[0] for key in (*info["missing_keys"], *info["mismatched_keys"])}
    return tuple(sorted({key.rpartition(".")[0] for key in keys}))
