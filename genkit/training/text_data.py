"""Text of a run: the settings that every recipe of language models has."""

from __future__ import annotations

from dataclasses import dataclass

from genkit.data import tables
from genkit.data.text import EMBEDDED, check_source
from genkit.training.settings import RunSettings, setting


@dataclass
class TextSettings(RunSettings):
    """Settings of a recipe that trains on text."""

    text: str = setting(EMBEDDED, "file, folder or dataset; or the embedded corpus")
    text_column: str = setting("text", "column of a dataset that holds the text")
    val_text: str | None = setting(None, "text to validate on, instead of the end of --text")
    val_fraction: float = setting(
        0.1, "part of the text, at its end, to validate on", above=0, below=1
    )
    table_memory: int = setting(
        tables.MEMORY, "MiB of the process that reads a table", least=tables.MIN_MEMORY
    )

    def __post_init__(self) -> None:
        """Refuse what cannot work, before any long work."""
        super().__post_init__()
        check_source(self.text)
        if self.val_text is not None:
            check_source(self.val_text, "val_text")
