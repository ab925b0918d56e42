"""Pages of samples of an alignment: what the reference writes, and what the policy writes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from genkit.data.dialogues import Prompt
from genkit.text.language_model import LanguageModel
from genkit.training.run import Run

if TYPE_CHECKING:
    from genkit.training.rollouts import Completion

SHOWN = 8  # prompts on a page


class AnswerPages:
    """Answers of reference and policy to the same prompts, from the same seeds every time.

    Args:
        run: whose main process draws and writes them.
        prompts: of which the first ones are shown, each once.
        reference: the model that the run started from.
    """

    def __init__(self, run: Run, prompts: Sequence[Prompt], reference: LanguageModel) -> None:
        from genkit.text.samples import draw_answers

        self.run = run
        self.prompts = list({str(prompt): prompt for prompt in prompts}.values())[:SHOWN]
        self.before = draw_answers(self.prompts, reference) if run.is_main else []

    def write(self, policy: LanguageModel) -> None:
        """Put a page with the policy's answers of this step into the run's folder."""
        from genkit.text.samples import comparison_page, draw_answers

        if self.run.is_main:
            step, after = self.run.progress.step, draw_answers(self.prompts, policy)
            page = comparison_page(step, self.prompts, self.before, after)
            self.run.folder.write_samples(step, page)


def write_completions(
    run: Run, prompts: Sequence[Prompt], before: Sequence[Completion], after: Sequence[Completion]
) -> None:
    """Put a page with a completion of each of the first prompts into the run's folder.

    Args:
        before, after: completions by reference and policy, as many of each prompt, in their order.
    """
    from genkit.text.samples import comparison_page

    if run.is_main:
        times = len(after) // len(prompts)
        old, new = before[::times][:SHOWN], after[::times][:SHOWN]
        scores = [(a.reward, b.reward) for a, b in zip(old, new, strict=True)]
        texts = [[each.text for each in drawn] for drawn in (old, new)]
        step, shown = run.progress.step, prompts[:SHOWN]
        page = comparison_page(step, shown, texts[0], texts[1], scores)
        run.folder.write_samples(step, page)
