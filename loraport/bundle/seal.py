"""The manifest's own sha256, at its end: a manifest that changed on the way is refused.

The last member is ``"manifest_sha256"``. It is the digest of every byte before its own 64
hexadecimal digits, so it can be checked before anything else of the file is believed, with no
more than a hash function. It tells damage and hand edits from what was written; it proves nothing
against someone who writes a new one.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from loraport.errors import LoraportError

_MEMBER = b'"manifest_sha256": "'
_END = b'"\n}\n'
_DIGITS = 64


def sealed(document: Mapping[str, Any], name: str) -> str:
    """Return a document's text with its seal.

    Args:
        document: What to write; not empty, a seal in it is replaced.
        name: Of the file, for messages.

    Raises:
        LoraportError: If the text would not be one that readers check.
    """
    body = {key: value for key, value in document.items() if key != "manifest_sha256"}
    head = json.dumps(body, indent=1).removesuffix("\n}").encode() + b",\n " + _MEMBER
    digest = hashlib.sha256(head).hexdigest()
    text = head + digest.encode() + _END
    require_seal(text, name)
    return text.decode()


def require_seal(content: bytes, name: str) -> None:
    """Check a text's seal.

    Args:
        content: The file's content.
        name: Of the file, for messages.

    Raises:
        LoraportError: If there is no seal at the end, or it is another text's.
    """
    head = content[: -_DIGITS - len(_END)]
    digits = content[len(head) : -len(_END)]
    if not (head.endswith(_MEMBER) and content.endswith(_END)):
        raise LoraportError(
            f"{name}: expected its own sha256 at its end, got none; it is damaged or was edited: "
            "copy the bundle again"
        )
    got = hashlib.sha256(head).hexdigest()
    if digits != got.encode():
        raise LoraportError(
            f"{name}: expected sha256 {digits[:12].decode(errors='replace')}, got {got[:12]}; it "
            "is damaged or was edited: copy the bundle again"
        )
