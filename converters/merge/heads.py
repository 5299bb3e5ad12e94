"""The head that an adapter's task asks for, where the base's own model has another one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

# PEFT's task type → the transformers auto class that the adapter was trained with.
_AUTO_CLASSES = {
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
}


def model_class_name(config: Any, settings: Mapping[str, Any], task_type: str | None) -> str | None:
    """Return the name of the model class that a base and an adapter make together.

    Args:
        config: The base's transformers configuration.
        settings: The base's ``config.json``.
        task_type: PEFT's task type of the adapter.
    """
    import transformers

    if task_type in _AUTO_CLASSES:
        mapping = getattr(transformers, _AUTO_CLASSES[task_type])._model_mapping
        try:
            return str(mapping[type(config)].__name__)
        except KeyError:
            pass
    architectures = settings.get("architectures")
    if isinstance(architectures, list) and architectures and isinstance(architectures[0], str):
        return architectures[0]
    return None
