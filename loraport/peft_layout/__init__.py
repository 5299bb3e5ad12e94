"""PEFT's layout, ``adapter_config.json`` + ``adapter_model.safetensors``: loraport's own too.

Both directions are compatible with PEFT 0.21.
"""

from loraport.peft_layout.read import CONFIG_FILE, WEIGHTS_FILE, is_peft, read_peft
from loraport.peft_layout.write import write_peft

__all__ = ["CONFIG_FILE", "WEIGHTS_FILE", "is_peft", "read_peft", "write_peft"]
