"""The class by which tests load each checkpoint whose output they look at."""

from __future__ import annotations

AUTO_CLASSES = {
    "minilm": "AutoModel",
    "gpt2-zinc": "AutoModelForCausalLM",
    "llama": "AutoModelForCausalLM",
    "vit": "AutoModelForImageClassification",
}

#: Those that tests of loading save and load; here GPT-2 has four heads.
SAVED = {
    "minilm": "AutoModel",
    "gpt2-tinystories": "AutoModelForCausalLM",
    "llama": "AutoModelForCausalLM",
    "vit": "AutoModelForImageClassification",
}
