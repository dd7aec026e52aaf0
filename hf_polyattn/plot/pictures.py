"""The pictures that `hp.plot` makes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from torch import nn

from ..adaptation.calibration import CalibrationReport
from ..adaptation.conversion import ConversionReport
from ..diagnosis.report import Diagnosis
from ..errors import InputError
from ..figures import draw_conversion, draw_curves, draw_fits, draw_maps, draw_norms
from .seen import attention_map, head_curves


def dial(report: CalibrationReport | ConversionReport | Sequence[CalibrationReport]) -> Any:
    """Returns a figure of what a position of the dial keeps.

    Of a calibration, or of several side by side: how much of softmax's outputs each layer leaves unexplained, and what
    its row shift leaves of the log partition sums. Of a conversion: quality against cost along the dial.

    Args:
        report: of `calibrate` or `convert`, or a sequence of reports of `calibrate`.

    Raises:
        InputError: anything else.
        ImportError: matplotlib is not installed.
    """
    if isinstance(report, ConversionReport):
        return draw_conversion(report)
    reports = [report] if isinstance(report, CalibrationReport) else report
    if not isinstance(reports, Sequence) or not reports or not all(isinstance(r, CalibrationReport) for r in reports):
        raise InputError(f"dial draws reports of calibrate or convert, got {report!r}")
    return draw_fits(reports)


def heads(
    model: nn.Module,
    report: CalibrationReport | None = None,
    *,
    layer: int | str | None = None,
    batches: Iterable[Any] | None = None,
) -> Any:
    """Returns a figure of the polynomials of one layer's heads, exp behind them.

    Args:
        model: patched.
        report: of its calibration, which says how well each head fits and where its interval lies.
        layer: number among the patched layers, or path of the attention module; None takes the one that fits worst
            or, without a report, the first.
        batches: model inputs, those of the calibration for example; with them the scores' histogram lies behind.

    Raises:
        PatchError: the model is not patched.
        InputError: there is no such layer.
        ImportError: matplotlib is not installed.
    """
    title, curves = head_curves(model, report, layer=layer, batches=batches)
    return draw_curves(curves, title)


def maps(
    model: nn.Module,
    inputs: Any,
    layer: int | str,
    head: int,
    *,
    tokens: Sequence[str] | None = None,
    query: int | None = None,
) -> Any:
    """Returns a figure of one head's attention: softmax's, the polynomial's, and their difference.

    Both activations are applied to the same queries and keys, those that the layer sees while the model runs softmax.
    Of a model of images the maps lie over the picture.

    Args:
        model: patched.
        inputs: model inputs, see `calibrate`; the first sequence is drawn, without its padding.
        layer: number among the patched layers, or path of the attention module.
        head: number of the query head.
        tokens: their names, for the axes; None leaves numbers.
        query: the query row that is drawn over a picture; None takes the mean over all of them.

    Raises:
        PatchError: the model is not patched.
        InputError: there is no such layer, head or query.
        ImportError: matplotlib is not installed.
    """
    return draw_maps(attention_map(model, inputs, layer, head, tokens=tokens, query=query))


def norms(diagnosis: Diagnosis) -> Any:
    """Returns a figure of the norms of attention matrices and of their Jacobians beside softmax's, layer by layer.

    Args:
        diagnosis: of `diagnose`.

    Raises:
        ImportError: matplotlib is not installed.
    """
    return draw_norms(diagnosis)
