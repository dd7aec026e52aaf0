"""What the explorer computes: one model, its dial, its maps, its answers. Knows nothing of the page."""

from __future__ import annotations

import statistics
import threading
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from typing import Any, Concatenate, ParamSpec, TypeVar

import torch
from transformers import PreTrainedTokenizerBase

from ..adaptation.calibration import CalibrationReport, calibrate
from ..adaptation.capture import model_inputs
from ..adaptation.quality import similarity
from ..errors import InputError, PolyAttnError
from ..examples import Examples, documentation_sentences, encode, from_anywhere, load_model, load_processor
from ..figures import AttentionMap, HeadCurve
from ..files import written_beside
from ..patching.core import is_patched
from ..patching.patch import patch_model, softmax_attention, unpatch_model
from ..patching.patched import patched_layers, pretrained_model, spec_of
from ..plot.seen import attention_map, head_curves
from ..spec import Polynomial
from .answers import Answers, answers
from .script import Calibration, script

#: Positions of the dial, from no division to as good as softmax, with what they are.
DIAL = {
    "poly3": "a cubic times n^(-1/2): no division by anything that data decide",
    "poly3~1": "the same, after one look at its own row sum: still no such division",
    "poly4-l1": "degree 4 over its row sum",
    "poly6-l1": "degree 6 over its row sum: loses next to nothing",
    "poly3^16-l1": "a cubic squared four times over its row sum: stands in for softmax",
}
BATCH, LENGTH, TURNS = 8, 128, 5
HELD_OUT = 4  # of so many examples one, the last ones, is not calibrated on; of fewer than twice as many none
_SAMPLES = 128

P = ParamSpec("P")
R = TypeVar("R")


@dataclass(frozen=True, slots=True)
class Position:
    """What one calibration came to.

    Attributes:
        report: of `calibrate`.
        agreement: of `similarity`, on the examples that were held out, all of them if none was; 1 is softmax.
        held_out: number of examples that the calibration did not see.
        time_ratio: median time of a batch divided by softmax's, in turns.
    """

    report: CalibrationReport
    agreement: float
    held_out: int
    time_ratio: float


def _one_at_a_time(method: Callable[Concatenate[Session, P], R]) -> Callable[Concatenate[Session, P], R]:
    """Lets one thread in at a time: a page asks for several things at once of one model."""

    @wraps(method)
    def alone(self: Session, /, *args: P.args, **kwargs: P.kwargs) -> R:
        with self._lock, torch.inference_mode(False), torch.no_grad():
            return method(self, *args, **kwargs)

    return alone


class Session:
    """One model that is being explored.

    Args:
        name: folder or Hub id, softmax or polynomial.
        device: where to run it; None takes a GPU if there is one.
        examples: texts or images to calibrate on; None takes sentences of Python's documentation for texts.

    Raises:
        InputError: there is no such model, or neither a tokenizer nor an image processor beside it.
    """

    def __init__(self, name: str, device: str | None = None, examples: Sequence[Any] | None = None) -> None:
        self.name = name
        self.model = load_model(name, device)
        self.processor = load_processor(name, self.model)
        if self.processor is None:
            kind = "ImageProcessor" if pretrained_model(self.model).main_input_name == "pixel_values" else "Tokenizer"
            raise InputError(
                f"{name!r} has neither a tokenizer nor an image processor beside it; save that of the original model "
                f"there: Auto{kind}.from_pretrained(original).save_pretrained({name!r})"
            )
        self.texts = isinstance(self.processor, PreTrainedTokenizerBase)
        if examples is None:
            sentences = documentation_sentences()[:_SAMPLES] if self.texts else []
            examples = Examples(sentences, "documentation_sentences()" if sentences else "")
        self.examples = examples
        self.position: Position | None = None
        self.loaded_polynomial = is_patched(self.model)
        self._calibration: Calibration | None = None
        longest = getattr(pretrained_model(self.model).config, "max_position_embeddings", None)
        self.length = min(LENGTH, longest or LENGTH)
        self._batches: list[dict[str, Any]] = []
        self._lock = threading.RLock()

    @property
    def spec(self) -> str | None:
        """The spec that the model has; None for a softmax model."""
        return spec_of(self.model) if is_patched(self.model) else None

    @property
    def layers(self) -> list[tuple[str, int]]:
        """(path, heads) of each polynomial layer; empty for a softmax model."""
        return [(path, child.heads) for path, child in patched_layers(self.model)] if self.spec else []

    @_one_at_a_time
    def turn(self, spec: str, examples: Sequence[Any] | None = None) -> Position:
        """Turns the dial: makes the model this polynomial, calibrated on the examples, the last of which are held out.

        Args:
            spec: of the dial, or any other.
            examples: texts or images; None takes those of the session.

        Raises:
            SpecError: of the spec.
            InputError: there are no examples.
            PolyAttnError: the model cannot be patched or calibrated. It is left as it was.
        """
        Polynomial.parse(spec)
        given = self._given(self.examples if examples is None else examples)
        call = ""
        if [_plain(one) for one in given] == [_plain(one) for one in self.examples]:
            given, call = list(self.examples), getattr(self.examples, "call", "")
        held = len(given) // HELD_OUT if len(given) >= 2 * HELD_OUT else 0
        seen = given[: len(given) - held]
        batches = encode(self.processor, seen, BATCH, self.length)
        softmax = not is_patched(self.model)
        try:
            if softmax:
                patch_model(self.model, spec)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", UserWarning)  # too few rows: the report says so itself
                report = calibrate(self.model, batches, spec=spec, max_batches=None)
        except PolyAttnError:
            if softmax and is_patched(self.model):
                unpatch_model(self.model)
            raise
        self._batches, self._calibration = batches, Calibration(spec, seen, call, BATCH, self.length)
        unseen = encode(self.processor, given[len(seen) :], BATCH, self.length) if held else batches
        self.position = Position(report, similarity(self.model, unseen), held, self._time_ratio(batches[0]))
        return self.position

    @_one_at_a_time
    def map(self, example: Any, layer: int, head: int, query: int | None = None) -> AttentionMap:
        """Returns the attention maps of one head on one text or image; see `hp.plot.maps`."""
        self._require_polynomial()
        (inputs,) = encode(self.processor, self._given([example])[:1], 1, self.length)
        tokens = None
        if self.texts:
            tokens = [readable(token) for token in self.processor.convert_ids_to_tokens(inputs["input_ids"][0])]
        return attention_map(self.model, inputs, layer, head, tokens=tokens, query=query)

    @_one_at_a_time
    def curves(self, layer: int) -> tuple[str, list[HeadCurve]]:
        """Returns the title and the curves of a layer's heads, over the scores that they were fitted to."""
        self._require_polynomial()
        report = None if self.position is None else self.position.report
        return head_curves(self.model, report, layer=layer, batches=self._batches or None)

    @_one_at_a_time
    def answer(self, examples: Sequence[Any]) -> Answers:
        """Returns what softmax and the polynomials say to the same texts or images, side by side."""
        self._require_polynomial()
        return answers(self.model, self.processor, self._given(examples), self.length)

    @_one_at_a_time
    def save(self, folder: str) -> Path:
        """Saves the polynomial model and its processor to a new folder.

        Raises:
            InputError: no name, something is there, or it cannot be written.
        """
        self._require_polynomial()
        if not folder.strip():
            raise InputError("name a folder to save to")
        path = Path(folder.strip()).expanduser()
        if path.exists():
            raise InputError(f"{path} is there already; name a folder that is not")
        try:
            with written_beside(path) as partial:
                self.model.save_pretrained(partial)
                self.processor.save_pretrained(partial)
        except OSError as error:
            raise InputError(f"{path} cannot be written: {error}") from error
        return path

    def code(self, folder: str = "polynomial-model") -> str:
        """Returns the lines of a script that do what was done here; see `script`."""
        return script(
            self.model,
            from_anywhere(self.name),
            self.processor,
            polynomial=self.loaded_polynomial,
            calibration=self._calibration,
            folder=folder.strip() or "polynomial-model",
        )

    def _require_polynomial(self) -> None:
        if not is_patched(self.model):
            raise InputError("this is still the softmax model: calibrate a polynomial first")

    def _given(self, examples: Sequence[Any]) -> list[Any]:
        """Returns the examples without empty ones."""
        kept = [one.strip() if isinstance(one, str) else one for one in examples if one is not None]
        kept = [one for one in kept if not isinstance(one, str) or one]
        if not kept:
            raise InputError(f"there is nothing to look at: give {'a text' if self.texts else 'an image'}")
        return kept

    def _time_ratio(self, batch: dict[str, Any]) -> float:
        """Returns the median time of a forward pass divided by softmax's, measured in turns."""
        inputs, own, theirs = model_inputs(self.model, batch), [], []
        for turn in range(TURNS + 1):
            elapsed = self._timed(inputs)
            with softmax_attention(self.model):
                beside = self._timed(inputs)
            if turn:  # the first is warm-up
                own.append(elapsed)
                theirs.append(beside)
        return statistics.median(own) / statistics.median(theirs)

    def _timed(self, inputs: dict[str, Any]) -> float:
        started = time.perf_counter()
        self.model(**inputs)
        if self.model.device.type == "cuda":
            torch.cuda.synchronize(self.model.device)
        return time.perf_counter() - started


def _plain(example: Any) -> Any:
    """Returns what an example is on the page: a line, or the pixels of a picture."""
    return " ".join(example.split()) if isinstance(example, str) else example.convert("RGB").tobytes()


def readable(token: str) -> str:
    """Returns a token without the marks of its tokenizer for spaces and line ends."""
    return token.replace("Ġ", "·").replace("▁", "·").replace("Ċ", "↵").removeprefix("##") or "·"
