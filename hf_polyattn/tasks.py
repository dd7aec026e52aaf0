"""What a model is for: the auto class that loads it, and its task as the Hub names it."""

from __future__ import annotations

from typing import Any

# What loads a class, the table of Transformers that has it, and its task on the Hub. The first that fits counts.
_LOADERS = (
    ("AutoModelForCausalLM", "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES", "text-generation"),
    ("AutoModelForSeq2SeqLM", "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES", "text2text-generation"),
    ("AutoModelForMaskedLM", "MODEL_FOR_MASKED_LM_MAPPING_NAMES", "fill-mask"),
    ("AutoModelForSequenceClassification", "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES", "text-classification"),
    ("AutoModelForTokenClassification", "MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES", "token-classification"),
    ("AutoModelForQuestionAnswering", "MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES", "question-answering"),
    ("AutoModelForImageClassification", "MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES", "image-classification"),
    ("AutoModelForImageTextToText", "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES", "image-text-to-text"),
)


def loader_of(model: Any) -> tuple[str, str]:
    """Returns the auto class that loads a model, and its task on the Hub."""
    from transformers.models.auto import modeling_auto

    for auto_class, table, task in _LOADERS:
        names = getattr(modeling_auto, table, {}).get(model.config.model_type, ())
        if type(model).__name__ in ([names] if isinstance(names, str) else names):
            return auto_class, task
    images = model.main_input_name == "pixel_values"
    return "AutoModel", "image-feature-extraction" if images else "feature-extraction"
