"""Prompts and pairs of answers of a run: the settings of the recipes that learn preferences."""

from __future__ import annotations

from dataclasses import dataclass

from genkit.data import table_sources, tables
from genkit.hub import download
from genkit.training.settings import RunSettings, setting


@dataclass
class PreferenceSettings(RunSettings):
    """Settings of a recipe that starts from a language model and learns what people prefer."""

    init_from: str | None = setting(
        None, "language model to start from: a folder or a Hub id; required"
    )
    init_revision: str | None = setting(None, "branch, tag or commit of a model on the Hub")
    data: str | None = setting(
        None, "pairs of answers, one preferred: a table or a dataset; required"
    )
    val_fraction: float = setting(0.1, "part of the pairs to validate on", above=0, below=1)
    table_memory: int = setting(
        tables.MEMORY, "MiB of the process that reads a table", least=tables.MIN_MEMORY
    )
    epochs: float | None = setting(
        None, "passes over the pairs, unless max_steps is fewer steps", above=0
    )

    def __post_init__(self) -> None:
        """Refuse what cannot work, before any long work."""
        super().__post_init__()
        table_sources.check_source(self.data)
        download.check_exists(self.init_from, "--init_from")
        download.check_revision(self.init_from, self.init_revision)
