"""Saving and loading: patched models go through `save_pretrained` and `from_pretrained` like any others.

The hooks that importing `hf_polyattn` installs on `PreTrainedModel` and on `Trainer`. They may run in
the middle of any import of Transformers, so this file imports nothing that needs `transformers.modeling_utils`.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Iterable
from dataclasses import replace
from functools import wraps
from pathlib import Path
from typing import Any

from ..errors import PatchError
from ..patching.attention import register
from ..patching.core import CHILD_NAME, PolyAttention, is_patched
from .softmax_requests import keep_polynomials

_PUSH_DOCUMENTATION = """
    `hf_polyattn` adds, for models with polynomial attention:

        card: the `ModelCard` to upload, for example from `hf_polyattn.model_card`; default: one without results, and
            only where the repository has none. A card that was edited on the Hub is kept.
        overwrite_card (`bool`): also replace a card that was edited on the Hub.
        processor: a tokenizer or image processor to upload in the same commit.
"""


def install_on_models(modeling_utils: Any) -> None:
    """Registers "polyattn", and makes models build, load, save and push their polynomial modules.

    Wraps what each of these goes through in `transformers.modeling_utils`.
    """
    register(modeling_utils.AttentionInterface)
    _install_building(modeling_utils.PreTrainedModel)
    keep_polynomials(modeling_utils.PreTrainedModel)
    _install_loading(modeling_utils, modeling_utils.PreTrainedModel)
    _install_pushing(modeling_utils.PreTrainedModel)


def _install_building(model_class: Any) -> None:
    """Makes models build the polynomial modules that their config names, and name those that they have.

    `post_init` runs for every model and submodel once its modules exist; `_initialize_weights` fills polynomials that
    a checkpoint does not have, and no others: not those of a patched model that becomes part of another one;
    `save_pretrained` writes the config of a model whose submodel was patched by itself.
    """
    post_init, initialize, save = model_class.post_init, model_class._initialize_weights, model_class.save_pretrained

    @wraps(post_init)
    def post_init_with_polyattn(self: Any, *args: Any, **kwargs: Any) -> None:
        from ..patching.governing import attach_saved

        attach_saved(self)
        post_init(self, *args, **kwargs)
        if is_patched(self):
            self._keep_in_fp32_modules_strict.add(CHILD_NAME)

    @wraps(initialize)
    def initialize_with_polyattn(self: Any, module: Any, *args: Any, **kwargs: Any) -> None:
        if not isinstance(module, PolyAttention):
            initialize(self, module, *args, **kwargs)
        elif not module._is_hf_initialized:  # the loader found it missing
            if not module.coefficients.is_meta:  # which is filled later
                _say_uncalibrated(module)
            module.reset_parameters()
            module.freeze_unused()
            module._is_hf_initialized = True

    @wraps(save)
    def save_with_guard(self: Any, *args: Any, **kwargs: Any) -> Any:
        from ..patching.description import warn_of_uncalibrated
        from ..patching.governing import armed_configs
        from ..patching.running import require_polynomial

        if is_patched(self):
            require_polynomial(self, in_softmax_block=True)
            warn_of_uncalibrated(self, stacklevel=2)
        armed_configs(self)
        result = save(self, *args, **kwargs)
        given = inspect.signature(save).bind(self, *args, **kwargs)
        given.apply_defaults()
        if getattr(self, "_hf_peft_config_loaded", False) and given.arguments["is_main_process"]:
            from .adapters import save_polynomials

            save_polynomials(self, Path(given.arguments["save_directory"]), given.arguments["state_dict"])
        return result

    model_class.post_init = post_init_with_polyattn
    model_class._initialize_weights = initialize_with_polyattn
    model_class.save_pretrained = save_with_guard


def _say_uncalibrated(module: PolyAttention) -> None:
    """Warns where a config says that polynomials were calibrated, and there is no checkpoint that has them."""
    if module.config.interval:
        warnings.warn(
            "the config has polynomial attention on intervals of scores (interval=True), but no coefficients, centers "
            "and radii for them: the model is uncalibrated. Load weights, or call calibrate(model, batches).",
            stacklevel=2,
        )


def _install_loading(modeling_utils: Any, model_class: Any) -> None:
    """Checks checkpoints with polynomials: before they are read, and once it is known what they lack.

    `_get_dtype` is the first function of a load that knows both the config and the files, and that may read them;
    `_load_pretrained_model` returns what a checkpoint has; `load_adapter` must not leave trained polynomials out.
    """
    load, get_dtype = model_class._load_pretrained_model, modeling_utils._get_dtype
    load_adapter, read_index = model_class.load_adapter, modeling_utils.get_checkpoint_shard_files

    @wraps(read_index)
    def read_index_with_polyattn(repository: Any, index_filename: str, *args: Any, **kwargs: Any) -> Any:
        from .checkpoint import check_index

        check_index(index_filename)
        return read_index(repository, index_filename, *args, **kwargs)

    @wraps(get_dtype)
    def get_dtype_with_polyattn(
        dtype: Any,
        checkpoint_files: Any,
        config: Any,
        sharded_metadata: Any,
        state_dict: Any,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        from .checkpoint import check_files

        check_files(config, checkpoint_files, state_dict, sharded_metadata)
        return get_dtype(dtype, checkpoint_files, config, sharded_metadata, state_dict, *args, **kwargs)

    @wraps(load)
    def load_with_polyattn(
        model: Any, state_dict: Any, checkpoint_files: Any, load_config: Any, *args: Any, **kwargs: Any
    ) -> Any:
        from .loaded import check_loaded

        result = load(model, state_dict, checkpoint_files, load_config, *args, **kwargs)
        if not args and not kwargs:  # `expected_keys`: an adapter's, not the model's
            check_loaded(model, result[0], str(load_config.pretrained_model_name_or_path or "the state dict"))
        return result

    @wraps(load_adapter)
    def load_adapter_with_polyattn(self: Any, peft_model_id: Any = None, *args: Any, **kwargs: Any) -> Any:
        if peft_model_id is not None:
            from .adapters import restore_polynomials

            options = {**kwargs, **(kwargs.get("adapter_kwargs") or {})}
            restore_polynomials(self, peft_model_id, alone=not getattr(self, "peft_config", None), **options)
        result = load_adapter(self, peft_model_id, *args, **kwargs)
        check_adapter(self, getattr(result, "unexpected_keys", ()))
        return result

    modeling_utils.get_checkpoint_shard_files = read_index_with_polyattn
    modeling_utils._get_dtype = get_dtype_with_polyattn
    model_class._load_pretrained_model = staticmethod(load_with_polyattn)
    model_class.load_adapter = load_adapter_with_polyattn


def _install_pushing(model_class: Any) -> None:
    """Lets pushes write the model card; all of them go through `_upload_modified_files`."""
    push_to_hub, upload = model_class.push_to_hub, model_class._upload_modified_files

    @wraps(push_to_hub)
    def push_with_card(self: Any, *args: Any, **kwargs: Any) -> Any:
        if not is_patched(self):
            return push_to_hub(self, *args, **kwargs)
        from .pushing import Push, pushing

        own = {name: kwargs.pop(name) for name in ("card", "overwrite_card", "processor") if name in kwargs}
        tags = kwargs.get("tags") or ()
        tags = (*(self.model_tags or ()), *([tags] if isinstance(tags, str) else tags))
        with pushing(Push(**own, tags=tags, revision=kwargs.get("revision"), token=kwargs.get("token"))):
            return push_to_hub(self, *args, **kwargs)

    @wraps(upload)
    def upload_with_card(self: Any, working_dir: Any, repo_id: str, *args: Any, **kwargs: Any) -> Any:
        if is_patched(self):
            from .pushing import current_push, write_card

            push = current_push(kwargs.get("token"))  # save_pretrained(push_to_hub=True) announces none
            if push.processor is not None:
                push.processor.save_pretrained(working_dir)
            write_card(self, Path(working_dir) / "README.md", repo_id, push)
        return upload(self, working_dir, repo_id, *args, **kwargs)

    push_with_card.__doc__ = (push_to_hub.__doc__ or "") + _PUSH_DOCUMENTATION
    model_class.push_to_hub = push_with_card
    model_class._upload_modified_files = upload_with_card


def install_on_trainer(trainer: Any) -> None:
    """Keeps weight decay away from polynomials in `Trainer`, lets its trackers log what `MonitorCallback` has, writes
    the cards of its pushes, and notes the weights that a training begins with.

    A decayed center is another interval. And `Trainer` calls its trackers before any callback of the user,
    so that what a callback adds to the logs would not reach them. Its card is a draft that knows nothing of polynomials
    and that it writes over whatever card the repository has.
    """
    trainer_class = trainer.Trainer
    decay_names, log, train = trainer_class.get_decay_parameter_names, trainer_class.log, trainer_class.train
    create_card, push_to_hub = trainer_class.create_model_card, trainer_class.push_to_hub
    parameters = inspect.signature(push_to_hub)

    @wraps(train)
    def train_with_polyattn(self: Any, *args: Any, **kwargs: Any) -> Any:
        if is_patched(self.model):
            from ..patching.as_patched import note_weights
            from ..patching.patched import pretrained_model

            note_weights(pretrained_model(self.model))
        return train(self, *args, **kwargs)

    @wraps(decay_names)
    def decay_names_without_polyattn(self: Any, model: Any) -> list[str]:
        return [name for name in decay_names(self, model) if CHILD_NAME not in name.split(".")]

    @wraps(log)
    def log_with_polyattn(self: Any, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if "loss" in logs:  # of a training step, not of an evaluation or of the whole training
            for callback in self.callback_handler.callbacks:
                logs.update(getattr(callback, "polyattn_scalars", dict)())
        log(self, logs, *args, **kwargs)

    @wraps(create_card)
    def create_card_with_polyattn(self: Any, *args: Any, **kwargs: Any) -> None:
        create_card(self, *args, **kwargs)
        model = self.accelerator.unwrap_model(self.model)
        if not self.is_world_process_zero() or hasattr(model, "peft_config") or not is_patched(model):
            return
        from huggingface_hub import ModelCard

        from .cards import training_card
        from .pushing import current_push, write_card

        file, push = Path(self.args.output_dir) / "README.md", current_push(self.args.hub_token)
        card = push.card or training_card(model, ModelCard.load(file))
        write_card(model, file, self.hub_model_id, replace(push, card=card))

    @wraps(push_to_hub)
    def push_with_card(self: Any, *args: Any, **kwargs: Any) -> Any:
        if not is_patched(self.model):
            return push_to_hub(self, *args, **kwargs)
        from .pushing import Push, pushing

        own = {name: kwargs.pop(name) for name in ("card", "overwrite_card") if name in kwargs}
        given = parameters.bind_partial(self, *args, **kwargs).arguments
        revision = given.get("revision") or getattr(self.args, "hub_revision", None)
        with pushing(Push(**own, revision=revision, token=given.get("token") or self.args.hub_token)):
            return push_to_hub(self, *args, **kwargs)

    push_with_card.__doc__ = (push_to_hub.__doc__ or "") + _PUSH_DOCUMENTATION.partition("        processor")[0]
    trainer_class.train = train_with_polyattn
    trainer_class.get_decay_parameter_names = decay_names_without_polyattn
    trainer_class.log = log_with_polyattn
    trainer_class.create_model_card = create_card_with_polyattn
    trainer_class.push_to_hub = push_with_card


def install_on_sentence_transformers(base_model: Any) -> None:
    """Makes the cards of Sentence Transformers name the polynomials of the model inside."""
    model_class = base_model.BaseModel
    create_card = model_class._create_model_card

    @wraps(create_card)
    def create_card_with_polyattn(self: Any, path: str, *args: Any, **kwargs: Any) -> None:
        create_card(self, path, *args, **kwargs)
        file = Path(path) / "README.md"
        if is_patched(self) and file.is_file():
            from .cards import name_polynomials

            name_polynomials(self, file)

    model_class._create_model_card = create_card_with_polyattn


def check_adapter(model: Any, unexpected_keys: Iterable[str]) -> None:
    """Raises PatchError if an adapter has polynomials for modules that its base model runs as softmax.

    And CheckpointError if those that it brought are damaged.
    """
    from .checkpoint import polynomial_paths
    from .loaded import check_polynomials

    check_polynomials(model, "the adapter")
    softmax = polynomial_paths(unexpected_keys)
    if softmax:
        raise PatchError(
            f"the adapter has trained polynomial attention at {sorted(softmax)}, but the base model is softmax "
            "there. Call patch_model(base_model, spec) with the spec of the training before loading the adapter."
        )
