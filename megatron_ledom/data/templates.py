"""Chat templates that stand beside a tokenizer as files, where stock transformers reads them."""

from pathlib import Path

DEFAULT, FOLDER = "chat_template.jinja", "additional_chat_templates"


def read_chat_templates(tokenizer: str) -> dict[str, bytes]:
    """Return the content of each template file beside a tokenizer (its folder, or a file in it), by its path in the folder."""
    folder = Path(tokenizer) if Path(tokenizer).is_dir() else Path(tokenizer).parent
    files = [folder / DEFAULT, *sorted((folder / FOLDER).glob("*.jinja"))]
    return {str(file.relative_to(folder)): file.read_bytes() for file in files if file.is_file()}
