"""Models from scratch: a config that fits the data, new weights, and a tokenizer trained where there is none."""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import CONFIG_MAPPING, AutoConfig, AutoTokenizer, PreTrainedConfig, PreTrainedModel
from transformers import PreTrainedTokenizerFast as FastTokenizer

from hf_polyattn import InputError

from .arguments import FinetuningArguments
from .runs import write_beside

PADDING, START, END = "<pad>", "<s>", "</s>"  # of a trained tokenizer: the first tokens, in this order
BYTES = 256
TOKENIZER_ROWS = 100_000  # at most, that a tokenizer is trained on
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "source.spm", "spiece.model")


def read_config(arguments: FinetuningArguments) -> PreTrainedConfig:
    """Returns the config of --model, with --config_overrides, of which there are none for a checkpoint.

    Raises:
        InputError: there is no such config, or it has no such setting, or none of such a value.
    """
    if arguments.from_scratch and is_model_type(arguments.model):
        config = AutoConfig.for_model(arguments.model)
    else:
        config = AutoConfig.from_pretrained(arguments.model)
    given = dict(override(config, words) for words in arguments.config_overrides)
    if not given:
        return config
    try:
        return type(config).from_dict({**config.to_diff_dict(), **given})
    except (StrictDataclassError, ValueError, TypeError) as error:
        raise InputError(
            f"--config_overrides {' '.join(arguments.config_overrides)} makes no config: {error}"
        ) from error


def is_model_type(model: str) -> bool:
    """Returns whether --model names no folder but a model type of Transformers, such as `marian`."""
    return model in CONFIG_MAPPING and not Path(model).exists()


def override(config: PreTrainedConfig, words: str) -> tuple[str, Any]:
    """Returns the name and the value of a setting that `name=value` changes.

    Raises:
        InputError: not of that form, no such setting, or a value of another type.
    """
    name, equals, text = words.partition("=")
    if not equals:
        raise InputError(f"--config_overrides takes name=value, got {words!r}")
    name = type(config).attribute_map.get(name, name)
    known = config.to_dict()
    if name == "num_labels":  # which a config has, and does not save
        known[name] = config.num_labels
    if name not in known:
        raise InputError(f"{type(config).__name__} has no {name!r} to override; it has {', '.join(sorted(known))}")
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError):
        value = text
    kinds = (int, float) if isinstance(known[name], float) else (type(known[name]),)
    if known[name] is not None and not isinstance(value, kinds):
        raise InputError(f"--config_overrides {words}: {name} is a {kinds[-1].__name__}, such as {known[name]!r}")
    return name, value


def tokenizer_of(arguments: FinetuningArguments, config: PreTrainedConfig, texts: Iterable[str | None]) -> Any:
    """Returns the tokenizer of --tokenizer or --model; from scratch, where the model has none, one trained on texts.

    What is trained is kept in `<output_dir>/tokenizer`, for --resume and for the other processes. The config is
    changed to fit it.

    Raises:
        InputError: the tokenizer has more tokens than the config, or is to have less than there are bytes.
    """
    source = arguments.tokenizer or arguments.model
    if not arguments.from_scratch or not lacks_tokenizer(source):
        tokenizer = AutoTokenizer.from_pretrained(source)
        if arguments.from_scratch and len(tokenizer) > config.vocab_size:
            raise InputError(
                f"the tokenizer of {source} has {len(tokenizer)} tokens, more than the config's vocab_size of "
                f"{config.vocab_size}; set --config_overrides vocab_size={len(tokenizer)}"
            )
        return tokenizer
    folder = Path(arguments.output_dir or ".") / "tokenizer"
    if arguments.process_index == 0 and not (arguments.resume and folder.exists()):
        trained = train_tokenizer((text for text in texts if text), config.vocab_size)
        write_beside(folder, trained.save_pretrained)
        print(f"A tokenizer of {len(trained)} tokens was trained on the training texts: {folder}")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    fit_tokens(config, tokenizer)
    return tokenizer


def lacks_tokenizer(source: str) -> bool:
    """Returns whether a folder has no tokenizer; a name on the Hub is taken to have one, a bare model type has none."""
    if Path(source).is_dir():
        return not any((Path(source) / name).exists() for name in TOKENIZER_FILES)
    return is_model_type(source)


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> FastTokenizer:
    """Returns a byte-level BPE tokenizer of at most so many tokens, which ends each text with `</s>`.

    Raises:
        InputError: fewer tokens than bytes and marks.
    """
    marks = [PADDING, START, END]
    if vocab_size < BYTES + len(marks):
        raise InputError(
            f"vocab_size {vocab_size} has no room for all bytes and marks; set {BYTES + len(marks)} or more"
        )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=marks, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"$A {END}", pair=f"$A {END} $B {END}", special_tokens=[(END, marks.index(END))]
    )
    return FastTokenizer(
        tokenizer_object=tokenizer,
        pad_token=PADDING,
        bos_token=START,
        eos_token=END,
        model_input_names=["input_ids", "attention_mask"],
    )


def fit_tokens(config: PreTrainedConfig, tokenizer: Any) -> None:
    """Gives a config the vocabulary and the marks of a trained tokenizer; decoders start from padding, as Marian's."""
    for name in ("vocab_size", "decoder_vocab_size"):
        if hasattr(config, name):
            setattr(config, name, len(tokenizer))
    config.pad_token_id, config.bos_token_id = tokenizer.pad_token_id, tokenizer.bos_token_id
    config.eos_token_id = tokenizer.eos_token_id
    if config.is_encoder_decoder:
        config.decoder_start_token_id = tokenizer.pad_token_id
        config.forced_eos_token_id = tokenizer.eos_token_id


def maker(
    auto_class: Any, config: PreTrainedConfig, arguments: FinetuningArguments
) -> Callable[[], PreTrainedModel] | None:
    """Returns the function that makes a model of a config with new weights; None if it is to be a checkpoint's."""
    return partial(make_model, auto_class, config, arguments.dtype) if arguments.from_scratch else None


def make_model(auto_class: Any, config: PreTrainedConfig, dtype: str) -> PreTrainedModel:
    """Returns a model with weights drawn from the generator of PyTorch, in the dtype of the arguments.

    Raises:
        InputError: the config's settings do not go together.
    """
    wanted = {} if dtype == "auto" else {"dtype": dtype}
    try:
        return auto_class.from_config(config, **wanted)
    except (ValueError, RuntimeError, ZeroDivisionError) as error:
        raise InputError(f"no model can be made of this {type(config).__name__}: {error}") from error
