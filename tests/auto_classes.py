"""The class by which tests load each checkpoint whose output they look at."""

from __future__ import annotations

AUTO_CLASSES = {
    "minilm": "AutoModel",
    "gpt2-zinc": "AutoModelForCausalLM",
    "llama": "AutoModelForCausalLM",
    "vit": "AutoModelForImageClassification",
}
