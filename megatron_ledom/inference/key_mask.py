"""Hides an API key in text that a server sent: as it is, cut, encoded as base64, hex or percent, or with JSON escapes."""

import base64
import html
import json
import re
from urllib.parse import quote

SHORTEST_PART = 6
"""Characters in a row of a longer key, or of an encoded form of it, that are hidden too."""
LONGEST_READ = 20_000
"""Characters of a text that are searched; the rest is left out, because no message shows it."""
MASK = "[key]"
ESCAPE = re.compile(r"\\u00([2-7][0-9a-fA-F])|%([2-7][0-9a-fA-F])")


class KeyMask:
    """Replaces a key in texts. An empty key hides nothing."""

    def __init__(self, key: str | None) -> None:
        self._key = key or ""
        self._forms = [form.lower() for form in _forms(self._key)] if self._key else []
        self._shortest = min(len(self._key), SHORTEST_PART)
        self._starts = {form[i : i + self._shortest] for form in self._forms for i in range(len(form) - self._shortest + 1)}

    def is_told_by(self, text: str) -> bool:
        """Return True if a text holds the whole key; a placeholder of less than 8 characters, such as EMPTY, is no secret."""
        return len(self._key) >= 8 and self._key in text

    def masked(self, text: str) -> str:
        """Return the text with MASK for each part of the key. Call it before a text is cut."""
        if not self._key:
            return text
        text = ESCAPE.sub(lambda found: chr(int(found[1] or found[2], 16)), text[:LONGEST_READ])
        lowered = "".join(c.lower() if c.isascii() else c for c in text)
        parts, position = [], 0
        while position < len(text):
            length = self._length_at(lowered, position)
            parts.append(MASK if length else text[position])
            position += length or 1
        return "".join(parts)

    def _length_at(self, text: str, start: int) -> int:
        """Return how many characters from `start` on are in one of the forms; 0 if they are fewer than the shortest part."""
        if text[start : start + self._shortest] not in self._starts:
            return 0
        longest = 0
        for form in self._forms:
            length = self._shortest
            while text[start : start + length] in form and start + length <= len(text):
                longest = length
                length += 1
        return longest


def _forms(key: str) -> list[str]:
    """Return the key and its encodings; base64 of a longer text that holds the key depends on where the key begins in it."""
    data = key.encode()
    forms = [key, data.hex(), quote(key, safe=""), html.escape(key), json.dumps(key)[1:-1], repr(key)[1:-1]]
    for before in range(3):
        encoded = base64.b64encode(b"\0" * before + data).rstrip(b"=").decode()
        whole = encoded[-(-before * 8 // 6) :][: len(data) * 8 // 6]
        forms += [whole, whole.replace("+", "-").replace("/", "_")]
    shortest = min(len(key), SHORTEST_PART)
    return list(dict.fromkeys(form for form in forms if len(form) >= shortest))
