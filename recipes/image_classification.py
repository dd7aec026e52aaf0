"""Fine-tunes an image classifier with polynomial attention beside its softmax original.

    accelerate launch recipes/image_classification.py --model google/vit-base-patch16-224 --dataset uoft-cs/cifar10 \
        --image_column img --eval_split test --spec softmax poly6-l1 --num_train_epochs 1 --output_dir outputs/cifar10

ViT and other models of `AutoModelForImageClassification`; a head for other labels is replaced by a new one. All weights
are trained, or with --lora_rank adapters, the polynomials and a new head; with --from_scratch a model of the config has
new ones. Images are mirrored at random.
"""

from __future__ import annotations

import dataclasses
import inspect
import random
from functools import partial
from typing import Any

import torch
from datasets import Image
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import Dataset as TorchDataset
from transformers import AutoImageProcessor, AutoModelForImageClassification, PreTrainedConfig
from transformers.models.auto.image_processing_auto import IMAGE_PROCESSOR_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING

from hf_polyattn import InputError
from parts.arguments import FinetuningArguments
from parts.classification import COLUMNS, classifier_loader, labelled, load_metrics, new_modules, predict, scorer
from parts.finetuning import finetune
from parts.runs import errors_in_a_line, read_arguments
from parts.scratch import is_model_type, maker, read_config
from parts.sources import DataArguments, Rows, label_index, label_names, read_rows
from parts.task import Task

CHANNELS = 3  # of an image: red, green, blue


@dataclasses.dataclass
class ImageArguments(DataArguments):
    """The images and their labels."""

    image_column: str = dataclasses.field(default="image", metadata={"help": "column that holds the images"})
    label_column: str = dataclasses.field(default="label", metadata={"help": "column that holds numbers or names"})
    num_labels: int | None = dataclasses.field(default=None, metadata={"help": "how many labels; default: those found"})
    image_size: int | None = dataclasses.field(
        default=None, metadata={"help": "height and width in pixels; default: the checkpoint's"}
    )
    augment: bool = dataclasses.field(default=True, metadata={"help": "mirror each image at random, and crop it"})
    crop_padding: int = dataclasses.field(
        default=0, metadata={"help": "border in pixels, with which an image is cropped to its size at random; 0: none"}
    )
    in_memory: bool = dataclasses.field(
        default=False, metadata={"help": "decode the images once and keep their pixels; for small images, many epochs"}
    )
    metrics: list[str] = dataclasses.field(
        default_factory=list, metadata={"help": "of the evaluate library, beside accuracy and macro_f1"}
    )


@dataclasses.dataclass(frozen=True)
class Decoded(TorchDataset):
    """Images whose pixels are kept.

    Attributes:
        pixels: (images, channels, height, width), float32.
        labels: of all images.
        order: the images that these rows are.
    """

    pixels: Tensor
    labels: list[int]
    order: list[int]

    @classmethod
    def of(cls, rows: Rows) -> Decoded:
        """Returns all rows of `encode_rows`, decoded."""
        batches = list(rows.iter(batch_size=1000))
        pixels = torch.stack([image for batch in batches for image in batch["pixel_values"]])
        labels = [label for batch in batches for label in batch["labels"]]
        return cls(pixels, labels, list(range(len(labels))))

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, row: int) -> dict[str, Any]:
        return {"pixel_values": self.pixels[self.order[row]], "labels": self.labels[self.order[row]]}

    def shuffle(self, seed: int) -> Decoded:
        """Returns the same images in another order."""
        order = list(self.order)
        random.Random(seed).shuffle(order)
        return dataclasses.replace(self, order=order)


def main() -> None:
    arguments, data = read_arguments((FinetuningArguments, ImageArguments))
    config = read_config(arguments)
    processor = read_processor(arguments, config, data.image_size)

    # Data: images become pixels when they are needed, labels whole numbers.
    columns = [data.image_column, data.label_column]
    train, held_out = read_rows(data, columns)
    names = label_names(train, data.label_column, data.num_labels)
    for rows in (train, held_out):
        for value in rows.unique(data.label_column):
            label_index(value, names, data.label_column)
    encode = partial(encode_rows, processor=processor, columns=columns, names=names)
    train, held_out = (
        rows.cast_column(data.image_column, Image(mode="RGB")).with_transform(encode) for rows in (train, held_out)
    )
    if data.in_memory:
        train, held_out = Decoded.of(train), Decoded.of(held_out)

    # Softmax baseline, patch, calibrate, anneal, fine-tune, evaluate, save, push.
    finetune(
        Task(
            data={**dataclasses.asdict(data), "labels": names, "held_out_examples": len(held_out)},
            load_model=classifier_loader(AutoModelForImageClassification, names),
            make_model=maker(AutoModelForImageClassification, labelled(config, names, arguments), arguments),
            processor=processor,
            train=train,
            held_out=held_out,
            collate=partial(collate, options=size_options(config, data.image_size)),
            predict=predict,
            score=scorer(load_metrics(data.metrics)),
            columns=COLUMNS,
            unit="images",
            new_modules=()
            if arguments.from_scratch
            else new_modules(AutoModelForImageClassification, arguments.model, names),
            augment=partial(augment, crop_padding=data.crop_padding) if data.augment else None,
        ),
        arguments,
    )


def read_processor(arguments: FinetuningArguments, config: PreTrainedConfig, size: int | None) -> Any:
    """Returns the processor of --model, which makes images of `size` pixels; from scratch, of the config's size.

    A bare model type has a processor with the mean and the standard deviation of its class.

    Raises:
        InputError: from scratch, a config that does not fit the images.
    """
    if arguments.from_scratch:
        size = config.image_size = size or config.image_size
        if config.num_channels != CHANNELS:
            raise InputError(
                f"the config is of {config.num_channels} channels, and images have {CHANNELS}; leave it out"
            )
        if size % config.patch_size:
            raise InputError(
                f"images of {size} pixels have no patches of {config.patch_size}; set patch_size or --image_size"
            )
    square = {"height": size, "width": size}
    sizes = {} if size is None else {"size": square, "crop_size": square}
    if arguments.from_scratch and is_model_type(arguments.model):
        return IMAGE_PROCESSOR_MAPPING[type(config)]["pil"](**sizes)
    return AutoImageProcessor.from_pretrained(arguments.model, **sizes)


def size_options(config: PreTrainedConfig, size: int | None) -> dict[str, bool]:
    """Returns what the model must be told of images of another size than its checkpoint's.

    Raises:
        InputError: it takes no other size.
    """
    if size is None or size == config.image_size:
        return {}
    kind = MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING[type(config)]
    if "interpolate_pos_encoding" not in inspect.signature(kind.forward).parameters:
        raise InputError(f"{kind.__name__} takes images of {config.image_size} pixels only; leave --image_size out")
    return {"interpolate_pos_encoding": True}


def encode_rows(
    rows: dict[str, list[Any]], *, processor: Any, columns: list[str], names: list[str]
) -> dict[str, list[Any]]:
    """Returns images as pixel tensors and labels as whole numbers."""
    images, labels = columns
    pixels = processor([image.convert("RGB") for image in rows[images]], return_tensors="pt")["pixel_values"]
    return {"pixel_values": list(pixels), "labels": [label_index(value, names, labels) for value in rows[labels]]}


def collate(examples: list[dict[str, Any]], *, options: dict[str, bool]) -> dict[str, Any]:
    """Returns a batch of pixels, (images, channels, height, width), and labels."""
    pixels = torch.stack([example["pixel_values"] for example in examples])
    return {"pixel_values": pixels, "labels": torch.tensor([example["labels"] for example in examples]), **options}


def augment(batch: dict[str, Any], *, crop_padding: int) -> dict[str, Any]:
    """Returns the batch with each image mirrored by the toss of a coin, and cut out of one with a border at random."""
    batch = mirror(batch)
    if crop_padding == 0:
        return batch
    pixels = batch["pixel_values"]
    images, _, height, width = pixels.shape
    bordered = F.pad(pixels, (crop_padding,) * 4)
    top, left = (torch.randint(2 * crop_padding + 1, (images, 1), device=pixels.device) for _ in range(2))
    rows, columns = (start + torch.arange(size, device=pixels.device) for start, size in ((top, height), (left, width)))
    picture = torch.arange(images, device=pixels.device)[:, None, None]
    cut = bordered.movedim(1, -1)[picture, rows[:, :, None], columns[:, None, :]]
    return {**batch, "pixel_values": cut.movedim(-1, 1).contiguous()}


def mirror(batch: dict[str, Any]) -> dict[str, Any]:
    """Returns the batch with each image mirrored, left to right, by the toss of a coin."""
    pixels = batch["pixel_values"]
    chosen = torch.rand(len(pixels), 1, 1, 1, device=pixels.device) < 0.5
    return {**batch, "pixel_values": torch.where(chosen, pixels.flip(-1), pixels)}


if __name__ == "__main__":
    with errors_in_a_line():
        main()
