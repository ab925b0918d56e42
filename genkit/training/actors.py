"""The networks of an alignment: the policy, the reference that it started from, and values."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from transformers import PreTrainedModel

from genkit import files
from genkit.models import completions, lm, lora
from genkit.models.completions import Rows
from genkit.text.language_model import LanguageModel
from genkit.training.optim import optimizers
from genkit.training.run import Run

Policy = Callable[[Rows], tuple[torch.Tensor, torch.Tensor]]  # log π and entropies, (n, length)


@dataclass
class Actors:
    """The networks of a run, as functions of rows."""

    network: PreTrainedModel  # the policy, which learns
    inner: PreTrainedModel  # the same without peft's wrapper, which writes
    policy: Policy
    reference: Policy
    value: Callable[[Rows], torch.Tensor] | None  # V before each token, (n, length)
    before: LanguageModel  # the reference, to write with
    sha256: str  # of the reference's weights

    @property
    def language(self) -> LanguageModel:
        """The policy as it is now, to write with."""
        return LanguageModel(self.inner, self.before.tokenizer, "this run")

    @property
    def vocabulary(self) -> int:
        """The number of logits of a token."""
        return int(self.network.config.vocab_size)

    def save(self, folder: Path) -> None:
        """Write the policy as transformers does, adapters merged, with its tokenizer."""
        adapted = self.network is not self.inner
        network = lora.merge_adapters(self.network) if adapted else self.network
        network.save_pretrained(folder)
        lm.save_tokenizer(self.before.tokenizer, folder)


def make_actors(
    run: Run,
    init_from: str,
    revision: str | None = None,
    lora_rank: int = 0,
    value_learning_rate: float | None = None,
) -> Actors:
    """Load a policy with its frozen copy, and add what learns to the run.

    Args:
        init_from: a folder or a Hub id.
        revision: a branch, tag or commit on the Hub.
        lora_rank: of the adapters that learn; 0: the weights do.
        value_learning_rate: makes a network of values, "value" in the run, which starts at 0.
    """
    with run.accelerator.local_main_process_first():
        inner, tokenizer = lm.load_lm(init_from, revision)
    sha256 = files.weights_hash(inner)
    frozen = copy.deepcopy(inner).to(run.device).eval().requires_grad_(False)
    value = None
    if value_learning_rate is not None:
        critic = lm.make_critic(inner)
        rate = dataclasses.replace(run.settings, learning_rate=value_learning_rate)
        wrapped = run.network("value", critic, optimizers(critic, rate), averaged=False)
        value = partial(completions.token_values, wrapped)
    network = lora.add_adapters(inner, lora_rank) if lora_rank else inner
    wrapped = run.network("model", network, optimizers(network, run.settings), averaged=False)
    for each in run.networks.values():
        each.module.eval()  # no dropout: probabilities are those that drew
    return Actors(
        network,
        inner,
        run.autocast(partial(completions.log_probabilities, wrapped)),
        run.autocast(partial(completions.log_probabilities, frozen)),
        value,
        LanguageModel(frozen, tokenizer, init_from),
        sha256,
    )
