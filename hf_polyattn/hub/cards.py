"""Model cards: what a polynomial model was made from, how, what is left of softmax's quality, and how to load it.

`model_card` is for the Hub; what is the same in every card is in `card_template.py`.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from torch import nn

from ..errors import PatchError
from ..patching.families import attention_sites
from ..patching.patched import patched_layers, pretrained_model, spec_of
from ..tasks import loader_of
from .card_template import (
    PLOT,
    REPOSITORY,
    TAGS,
    PolynomialModelCard,
    change,
    fill_template,
    introduction,
    load_card,
    markdown_table,
)

if TYPE_CHECKING:
    from ..diagnosis.report import Diagnosis


_UNMEASURED = "Nothing was measured for this card. Measure on data of your own before relying on the model."
_HEADING = "## Polynomial attention"
_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")


@dataclass(frozen=True, slots=True)
class Measurement:
    """One figure of a polynomial model on data that it was not adapted to.

    Attributes:
        metric: name, best one that the Hub knows, for example "accuracy".
        value: of the polynomial model.
        dataset: Hub id or name.
        softmax: of the softmax model on the same data; None if it was not measured.
        split: of the data set.
        note: more to say, for example how many seeds a mean is of.
    """

    metric: str
    value: float
    dataset: str
    softmax: float | None = None
    split: str | None = None
    note: str = ""


def model_card(
    model: nn.Module,
    results: Iterable[Measurement] = (),
    *,
    title: str | None = None,
    base_model: str | None = None,
    license: str | None = None,
    language: str | list[str] | None = None,
    datasets: Iterable[str] = (),
    adaptation: str = "",
    remarks: str = "",
    limits: str = "",
    diagnosis: Diagnosis | None = None,
    repository: str = REPOSITORY,
) -> PolynomialModelCard:
    """Returns the card of a patched model, for `model.push_to_hub(…, card=card)` or `card.save("README.md")`.

    Args:
        model: patched.
        results: what was measured, beside softmax.
        title: heading; default: the base model's name and the spec.
        base_model: Hub id of the softmax model; default: where the model was loaded from, if that was the Hub.
        license: default: that of the base model's card, if it can be read.
        language: ISO codes; default: as the base model's card.
        datasets: Hub ids of what it was calibrated and trained on.
        adaptation: how it was made, in Markdown: the commands, the steps, the budget.
        remarks: Markdown below the table.
        limits: Markdown bullets after those that the model's polynomials imply.
        diagnosis: from `diagnose`, as a plot of the attention's norms with what it says.
        repository: Hub id that the card tells its reader to load.

    Raises:
        PatchError: the model is not patched.

    >>> from transformers import BertConfig, BertModel
    >>> from hf_polyattn import patch_model
    >>> sizes = dict(hidden_size=32, num_attention_heads=4, num_hidden_layers=2, intermediate_size=64)
    >>> card = model_card(patch_model(BertModel(BertConfig(**sizes)), "poly3"), [Measurement("accuracy", 0.91, "sst2")])
    >>> card.data.tags
    ['hf_polyattn', 'polynomial-attention', 'poly3']
    """
    root = pretrained_model(model)
    if not patched_layers(root):
        raise PatchError(
            f"{type(root).__name__} is not patched; call patch_model(model, spec) before model_card(model)"
        )
    found_base, base = _base_of(root, repository)
    base_model = base_model or found_base
    license = license or base.get("license")
    results, specs = list(results), _specs(root)
    auto_class, task = loader_of(root)
    title = title or f"{(base_model or type(root).__name__).rpartition('/')[2]} with {', '.join(specs)} attention"
    data = ModelCardData(
        library_name="transformers",
        base_model=base_model,
        base_model_relation="finetune" if base_model else None,
        license=license,
        license_name=base.get("license_name") if license == "other" else None,
        license_link=base.get("license_link") if license == "other" else None,
        language=language or base.get("language"),
        datasets=list(datasets) or None,
        metrics=list(dict.fromkeys(result.metric for result in results)) or None,
        pipeline_tag=task,
        tags=[*TAGS, *specs],
        model_name=title if results else None,
        eval_results=[_evaluation(result, task) for result in results] or None,
    )
    shown = [_results_table(results) if results else "", remarks.strip()]
    shown = [part for part in shown if part] or [_UNMEASURED]
    card = fill_template(
        data,
        title=title,
        introduction=introduction(base_model or "A pretrained model"),
        measured="\n\n".join([*shown, *_norms(diagnosis)]),
        adaptation="\n\n".join(part for part in (_polynomials(root), adaptation.strip()) if part),
        limits="\n".join([*_limits(root), *([limits.strip()] if limits else [])]),
        auto_class=auto_class,
        repository=repository,
    )
    card.diagnosis = diagnosis
    return card


def training_card(model: nn.Module, draft: ModelCard, repository: str = REPOSITORY) -> PolynomialModelCard:
    """Returns the card of a patched model that `Trainer` trained, with what Trainer's own draft says of the training.

    Args:
        model: patched.
        draft: the card that `Trainer.create_model_card` wrote.
        repository: Hub id that the card tells its reader to load.
    """
    title = re.search(r"^# (.+)$", draft.text, re.MULTILINE)
    reached = re.search(r"It achieves the following results on the evaluation set:\n(?:- .*\n?)+", draft.text)
    procedure = re.search(r"^## Training procedure$.*", draft.text, re.MULTILINE | re.DOTALL)
    data: Any = draft.data
    card = model_card(
        model,
        title=title[1] if title else None,
        base_model=data.base_model,
        license=data.license,
        datasets=data.datasets or (),
        remarks=reached[0] if reached else "",
        adaptation=re.sub(r"^##", "###", procedure[0], flags=re.MULTILINE) if procedure else "",
        repository=repository,
    )
    own: Any = card.data
    own.language, own.metrics = data.language or own.language, data.metrics
    own.model_name, own.eval_results = data.model_name, data.eval_results
    own.tags = list(dict.fromkeys([*own.tags, *(data.tags or ())]))
    return card


def name_polynomials(model: nn.Module, file: Path) -> None:
    """Adds to a card of another library which polynomials the model has, and that this package must be imported.

    Args:
        model: patched, or around a patched one.
        file: README.md.
    """
    card: Any = load_card(file)
    specs = _specs(model)
    card.data.tags = list(dict.fromkeys([*(card.data.tags or ()), *TAGS, *specs]))
    if _HEADING not in card.text:
        card.text += (
            f"\n\n{_HEADING}\n\nThe Transformers model inside has polynomial attention, "
            f"{', '.join(f'`{spec}`' for spec in specs)}: install `hf_polyattn` and import it before loading.\n\n"
            "```python\nimport hf_polyattn\n```\n"
        )
    card.save(file)


def _base_of(root: Any, repository: str) -> tuple[str | None, dict[str, Any]]:
    """Returns the Hub id that a model was loaded from, None for a folder, and the metadata of its card there."""
    name = root.name_or_path or ""
    hub_id = name if _HUB_ID.fullmatch(name) and name != repository and not Path(name).is_dir() else None
    if hub_id is None and not Path(name, "README.md").is_file():
        return None, {}
    from yaml import YAMLError  # type: ignore[import-untyped]

    try:
        card: Any = load_card(hub_id or Path(name, "README.md"))
    except (OSError, ValueError, YAMLError):  # no card, a broken one, or no network: then the licence is not known
        return hub_id, {}
    return hub_id, card.data.to_dict()


def _specs(root: nn.Module) -> list[str]:
    return list(dict.fromkeys(spec_of(root).split(", ")))


def _evaluation(result: Measurement, task: str) -> EvalResult:
    return EvalResult(
        task_type=task,
        dataset_type=result.dataset,
        dataset_name=result.dataset.rpartition("/")[2],
        dataset_split=result.split,
        metric_type=result.metric,
        metric_value=result.value,
    )


def _results_table(results: list[Measurement]) -> str:
    rows = []
    for result in results:
        data = f"{result.dataset}, {result.split}" if result.split else result.dataset
        softmax = "not measured" if result.softmax is None else f"{result.softmax:.4f}"
        against = "" if result.softmax is None else change(result.value, result.softmax)
        rows.append([data, result.metric, softmax, f"{result.value:.4f}", against, result.note])
    header = ["data", "metric", "softmax", "polynomial", "against softmax", "note"]
    if not any(result.note for result in results):
        header, rows = header[:-1], [row[:-1] for row in rows]
    return markdown_table(header, rows)


def _norms(diagnosis: Diagnosis | None) -> list[str]:
    if diagnosis is None:
        return []
    shown = f"![Norms of the attention matrices and of their Jacobians, layer by layer, beside softmax's]({PLOT})"
    return ["### Norms", shown, diagnosis.verdict[0].upper() + diagnosis.verdict[1:]]


def _polynomials(root: nn.Module) -> str:
    """Returns which polynomial each attention module has."""
    layers, total = patched_layers(root), len(attention_sites(pretrained_model(root)))
    counts = Counter(str(layer.config.spec) for _, layer in layers)
    said = ", ".join(f"`{spec}` in {count}" for spec, count in counts.items())
    text = f"Of {total} attention modules, {said}"
    text += "; the others stay softmax." if len(layers) < total else "."
    if all(layer.config.interval for _, layer in layers):
        text += " Their coefficients, and the interval of each head's scores, are saved with the weights."
    if lengths := layers[0][1].config.lengths:
        text += f" They were calibrated on rows of {lengths[0]} to {lengths[1]} keys; other lengths were not seen."
    if len(counts) > 1:
        rows = [[f"`{path}`", f"`{layer.config.spec}`"] for path, layer in layers]
        text += "\n\n" + markdown_table(["module", "polynomial"], rows)
    return text


def _limits(root: nn.Module) -> list[str]:
    """Returns what the polynomials of a model imply."""
    configs = [layer.config for _, layer in patched_layers(root)]
    limits = []
    if all(config.clamp for config in configs):
        limits.append(
            "- Scores outside the interval of the calibration data are clamped to its ends. On data unlike it, look "
            "with `hf_polyattn.diagnose` and calibrate again."
        )
    else:
        limits.append("- Scores are not limited to an interval: polynomials grow without bound on unusual inputs.")
    if any(config.spec.normalizer != "l1" for config in configs):
        limits.append("- Without a row sum the weights of a query do not add up to one, as softmax's do.")
    limits.append("- Whatever limits the base model has hold here too.")
    return limits
