"""Text of a run: what every recipe of language models has, its settings and its samples."""

from __future__ import annotations

from dataclasses import dataclass

from transformers import PreTrainedModel

from genkit.data import tables
from genkit.data.character_corpus import CharacterCorpus
from genkit.data.corpus import Corpus
from genkit.data.text import EMBEDDED, check_source
from genkit.training.run import Run
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
        check_source(self.val_text, "val_text")


def write_samples(
    run: Run, corpus: Corpus | CharacterCorpus, network: PreTrainedModel, prompt: int, most: int
) -> None:
    """Write samples of a step into the run's folder, on the main process.

    Args:
        corpus: whose validation text the prompt is taken from.
        prompt: tokens of the prompt.
        most: the most tokens of a sample.
    """
    from genkit.text.samples import example_prompt, sample_page  # settings do without

    if run.is_main:
        step = run.progress.step
        text = example_prompt(corpus.val, network, corpus.tokenizer, prompt)
        page = sample_page(step, text, network, corpus.tokenizer, most)
        run.folder.write_samples(step, page)
