"""The page: where things stand and what happens when something is pressed. What is computed is in `session`."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any, ClassVar

import gradio as gr

from ..errors import PolyAttnError
from ..figures import draw_curves, draw_fits, draw_maps, svg
from . import markup
from .session import DIAL, Session

OTHER = "another"
_WAIT = "Calibrate a polynomial, and this shows it beside softmax."


def theme() -> Any:
    """Returns the theme: fonts of the machine that looks at it, nothing that is fetched."""
    plain = ("ui-sans-serif", "system-ui", "sans-serif")
    mono = ("ui-monospace", "Consolas", "monospace")
    return gr.themes.Base(primary_hue="blue", neutral_hue="slate", font=plain, font_mono=mono)


def build(session: Session) -> Any:
    """Returns the page of a session, a `gradio.Blocks`."""
    with gr.Blocks(title=f"{markup.short_name(session.name)} · polyattn explore", analytics_enabled=False) as page:
        _Page(session).lay_out(page)
    return page


def answering(handler: Callable[..., Any]) -> Callable[..., Any]:
    """Puts what went wrong as a sentence into the status, the handler's last output, and leaves the others."""

    @wraps(handler)
    def answer(self: _Page, *values: Any) -> Any:
        try:
            return handler(self, *values)
        except (PolyAttnError, OSError) as error:
            self.alerted = True
            return (*(gr.skip() for _ in range(self.outputs_of[handler.__name__] - 1)), markup.status(str(error), True))

    return answer


class _Page:
    """The parts of the page and what they do."""

    outputs_of: ClassVar = {"turn": 8, "show_map": 2, "show_answers": 2, "show_curves": 2, "save": 2}

    def __init__(self, session: Session) -> None:
        self.session = session
        self.alerted, self.turns = False, 0

    def lay_out(self, page: Any) -> None:
        """Makes the parts, top to bottom, and connects them."""
        self.title = gr.HTML(markup.title(self.session))
        self.status = gr.HTML(markup.status(""))
        self.turned = gr.State(0)  # changes where the dial was turned, not where that failed
        with gr.Row(equal_height=False):
            with gr.Column(scale=2, min_width=320):
                self._dial()
            with gr.Column(scale=5, min_width=480):
                self.cards = gr.HTML(markup.empty(_WAIT))
                self.fit = gr.HTML()
                with gr.Accordion("Each layer in figures", open=False):
                    self.layers = gr.HTML(markup.empty(_WAIT))
        with gr.Row(equal_height=False):
            with gr.Column(scale=2, min_width=320):
                self._choices()
            with gr.Column(scale=5, min_width=480), gr.Tabs():
                with gr.Tab("Attention maps"):
                    self.map = gr.HTML(markup.empty(_WAIT))
                with gr.Tab("Outputs"):
                    self.answers = gr.HTML(markup.empty(_WAIT))
                with gr.Tab("Curves"):
                    self.curves = gr.HTML(markup.empty(_WAIT))
        self._keep()
        self._connect(page)

    def _saying(self) -> str:
        if self.session.texts:
            return "Your own text: maps show its first line, outputs compare its lines where the model has no head."
        return "Your own picture."

    def _example(self) -> Any:
        first = self.session.examples[:1]
        if not self.session.texts:
            value = first[0] if first else None
            return gr.Image(
                value, type="pil", label="Your picture", height=240, elem_id="picture", sources=["upload", "clipboard"]
            )
        mask = getattr(self.session.processor, "mask_token", None)
        said = f"; write {mask} for a word to fill in" if mask and "Masked" in type(self.session.model).__name__ else ""
        value = (
            f"The capital of France is {mask}." if said else "A dog runs over the grass.\nA puppy plays in a meadow."
        )
        return gr.Textbox(value, label=f"Your text, a line for each{said}", lines=2, max_lines=8)

    def _dial(self) -> None:
        gr.HTML(markup.heading("1 · Dial", "From no division at all to a stand-in for softmax."))
        choices = [(f"{spec}: {what}", spec) for spec, what in DIAL.items()]
        current = self.session.spec
        chosen = current if current in DIAL else OTHER if current else "poly6-l1"
        self.spec = gr.Radio([*choices, ("another spec", OTHER)], value=chosen, label="Polynomial")
        other = current if chosen == OTHER else ""
        self.other = gr.Textbox(other, label="Another spec, such as poly4~1 or taylor2-l1", max_lines=1)
        with gr.Accordion("Examples to calibrate on", open=True):
            if self.session.texts:
                lines = "\n".join(" ".join(str(one).split()) for one in self.session.examples)
                self.examples = gr.Textbox(lines, label=self._examples_label(), lines=6, max_lines=12)
            else:
                self.examples = gr.Gallery(
                    self.session.examples or None, type="pil", label="Pictures", columns=4, height=220, format="png"
                )
        self.button = gr.Button("Calibrate", variant="primary", elem_id="calibrate")

    def _examples_label(self) -> str:
        """Says what the texts are: those of Python's documentation are nobody's own."""
        if getattr(self.session.examples, "call", "").startswith("documentation_sentences"):
            return "Texts, a line for each: at first Python's documentation, for want of --data; put your own here"
        return "Texts, a line for each"

    def _choices(self) -> None:
        gr.HTML(markup.heading("2 · Look", self._saying()))
        self.example = self._example()
        layers = self.session.layers
        heads = layers[0][1] if layers else 0
        self.layer = gr.Dropdown(_numbered(layers), value=0 if layers else None, label="Layer")
        self.head = gr.Dropdown(list(range(heads)), value=0 if heads else None, label="Head of the attention maps")
        rows = [("mean over the queries", -1), ("the first token's query", 0)]
        self.query = gr.Radio(rows, value=-1, label="Rows of the attention maps", visible=not self.session.texts)
        self.look = gr.Button("Show", variant="secondary", elem_id="show")

    def _keep(self) -> None:
        gr.HTML(markup.heading("3 · Keep", "Save the model as it is now, or do the same in a script."))
        with gr.Row(equal_height=False):
            with gr.Column(scale=2, min_width=320):
                self.folder = gr.Textbox("polynomial-model", label="Folder to save to, a new one", max_lines=1)
                self.save_button = gr.Button("Save the polynomial model", elem_id="save")
            with gr.Column(scale=5, min_width=480):
                self.code = gr.Code(
                    self.session.code(),
                    language="python",
                    label="The same in a script",
                    lines=8,
                    show_line_numbers=False,
                )

    def _connect(self, page: Any) -> None:
        looks = (
            (self.show_map, [self.example, self.layer, self.head, self.query], [self.map, self.status]),
            (self.show_answers, [self.example], [self.answers, self.status]),
            (self.show_curves, [self.layer], [self.curves, self.status]),
        )
        positions = [
            self.title,
            self.cards,
            self.fit,
            self.layers,
            self.layer,
            self.head,
            self.turned,
            self.status,
        ]
        self.button.click(
            self.turn, [self.spec, self.other, self.examples], positions, api_name="turn", show_progress_on=[self.cards]
        )
        self.turned.change(self.session.code, [self.folder], [self.code], api_visibility="private")
        for event in (self.turned.change, self.look.click):
            for show, given, to in looks:
                event(show, given, to, show_progress_on=[to[0]], api_visibility="private")
        (show_map, of_map, map_to), _, (show_curves, of_curves, curves_to) = looks
        for part in (self.layer, self.query):
            part.input(show_map, of_map, map_to, api_visibility="private")
        self.layer.input(self.list_heads, [self.layer, self.head], [self.head], api_visibility="private")
        self.head.input(show_map, of_map, map_to, api_name="map")
        self.layer.input(show_curves, of_curves, curves_to, api_name="curves")
        self.save_button.click(self.save, [self.folder], [self.code, self.status], api_name="save")
        if self.session.spec:
            for show, given, to in looks:
                page.load(show, given, to, api_visibility="private")

    @answering
    def turn(self, spec: str, other: str, examples: Any, progress: Any = gr.Progress(track_tqdm=True)) -> Any:  # noqa: B008
        """Turns the dial and shows where it stands."""
        if self.session.texts:
            given = str(examples or "").splitlines()
        else:
            given = [one[0] if isinstance(one, tuple) else one for one in examples or []]
        position = self.session.turn(other.strip() if spec == OTHER else spec, given)
        layers = self.session.layers
        self.alerted, self.turns = False, self.turns + 1
        description = f"How well {position.report.spec} fits each layer, and what its row shift leaves; see the table."
        said = f"{position.report.spec} is calibrated."
        return (
            markup.title(self.session),
            markup.cards(position),
            markup.figure(svg(draw_fits([position.report]), description)),
            markup.layers_table(position),
            gr.update(choices=_numbered(layers), value=0),
            gr.update(choices=list(range(layers[0][1])), value=0),
            self.turns,
            markup.status(said),
        )

    def _said(self) -> Any:
        """Takes an error back once what it was about has gone well; leaves any other sentence."""
        alerted, self.alerted = self.alerted, False
        return markup.status("") if alerted else gr.skip()

    def list_heads(self, layer: int, head: int) -> Any:
        """Offers the heads of the chosen layer."""
        heads = self.session.layers[layer][1]
        return gr.update(choices=list(range(heads)), value=min(head, heads - 1))

    @answering
    def show_map(self, example: Any, layer: int | None, head: int | None, query: int) -> Any:
        """Draws the maps of one head."""
        first = example.strip().partition("\n")[0] if isinstance(example, str) else example
        found = self.session.map(first, layer or 0, head or 0, None if query < 0 or self.session.texts else query)
        return markup.figure(svg(draw_maps(found), found.describe())), self._said()

    @answering
    def show_answers(self, example: Any) -> Any:
        """Shows what both models say."""
        examples = example.splitlines() if isinstance(example, str) else [example]
        return markup.answers_table(self.session.answer(examples)), self._said()

    @answering
    def show_curves(self, layer: int | None) -> Any:
        """Draws the polynomials of a layer's heads."""
        title, curves = self.session.curves(layer or 0)
        description = f"The polynomial of each head of {title}, over the histogram of its scores, with exp behind it."
        return markup.figure(svg(draw_curves(curves, title), description)), self._said()

    @answering
    def save(self, folder: str) -> Any:
        """Saves the model and says where."""
        path = self.session.save(folder)
        said = f"Saved to {path}. It loads with from_pretrained after `import hf_polyattn`."
        return self.session.code(folder), markup.status(said)


def _numbered(layers: list[tuple[str, int]]) -> list[tuple[str, int]]:
    return [(f"{number}: {path}", number) for number, (path, _) in enumerate(layers)]
