"""A language model's keys and values of texts that grow, and branch, token by token.

A reader holds texts, each with one or more branches that share their beginning. It gives the logits
of every branch's next token; `step` adds a token to every branch, and `branch` says which of them
go on, and how often.
"""

from __future__ import annotations

import inspect
import sys
from typing import Any

import torch
from torch.nn.functional import pad
from torch.nn.utils.rnn import pad_sequence
from transformers import DynamicCache, EncoderDecoderCache, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput

from genkit.engine.decoder import (
    Stepper,
    cache_argument,
    empty_pool,
    takes_trees,
)
from genkit.engine.kernels import Choice
from genkit.text.kept_keys import KeptText, KeptTexts, shared_length

BLOCK = 64  # slots by which the pool of keys and values grows


def context_length(model: PreTrainedModel) -> int:
    """How many tokens the model can see at once; some, such as BLOOM and T5, have no limit."""
    return int(getattr(model.config, "max_position_embeddings", sys.maxsize))


class Tree:
    """Texts in a pool of keys and values, with a mask of what each branch attends to.

    Branching moves no key and no value: it picks rows of the mask. A text whose branches outgrow
    the context goes on with the later half of each, decided by its own length alone; and prompts
    are read one by one, so that a text depends on its neighbours in the rounding of steps only.

    Args:
        stepper: runs the model.
        prompts: token ids, none empty, none longer than the context.
        hidden: keep the last layer's states, too.
        kept: what has been read of the prompts before; states are not kept.
    """

    @torch.inference_mode()
    def __init__(
        self,
        stepper: Stepper,
        prompts: list[list[int]],
        hidden: bool = False,
        kept: KeptTexts | None = None,
    ) -> None:
        self.stepper, self.model, self._with_hidden = stepper, stepper.model, hidden
        self.context = context_length(self.model)
        self.texts = list(range(len(prompts)))  # which of the prompts still go on
        self.lines = [[list(prompt)] for prompt in prompts]  # the tokens of each branch
        self.starts = [[0] for _ in prompts]  # of what the model still sees of each
        texts, device = len(prompts), self.model.device
        self._positions = torch.zeros(texts, 1, dtype=torch.int64, device=device)  # of what comes
        self._written = torch.zeros(texts, 1, dtype=torch.int64, device=device)
        self._seen = torch.zeros(texts, 1, 0, dtype=torch.bool, device=device)
        self._keys, self._values = (empty_pool(self.model, texts, 0) for _ in range(2))
        self._used = self._reach = 0  # the most slots written, the furthest position
        self.hidden: list[torch.Tensor] = []  # states of the tokens read last, (tokens, size) each
        if hidden:
            kept = None
        self.logits = self._read_prompts(prompts, kept)  # (texts, branches, vocabulary), float32

    # ---- reading

    def _read_prompts(self, prompts: list[list[int]], kept: KeptTexts | None) -> torch.Tensor:
        self._make_room(max(map(len, prompts)))
        known: dict[tuple[int, ...], int] = {}
        logits: list[torch.Tensor] = []
        for i, prompt in enumerate(prompts):
            twin = known.setdefault(tuple(prompt), i)
            if twin == i:
                begun = self._recall(i, kept.find(prompt)) if kept else 0
                logits.append(self._read(i, 0, prompt[begun:]))
            else:
                for whole in (*self._keys, *self._values, self._seen, self._positions):
                    whole[i] = whole[twin]
                self._written[i] = self._written[twin]
                logits.append(logits[twin])
                self.hidden += self.hidden[twin : twin + 1]
        self._used = self._reach = max(map(len, prompts))
        return torch.stack(logits)[:, None]

    def _recall(self, text: int, kept: KeptText | None) -> int:
        """Begin a text with what is kept of it; return the number of tokens."""
        if kept is None:
            return 0
        count = len(kept.tokens)
        for pool, own in ((self._keys, kept.keys), (self._values, kept.values)):
            for layer, part in zip(pool, own, strict=True):
                layer[text, :, :count] = part
        self._seen[text, 0, :count] = True
        self._written[text] = self._positions[text] = count
        return count

    @torch.inference_mode()
    def copy_keys(self, text: int, tokens: list[int]) -> KeptText:
        """Copy the keys and values of as much of a line of tokens as a branch of a text has."""
        pairs = zip(self.lines[text], self.starts[text], strict=True)
        shared = [0 if start else shared_length(line, tokens) for line, start in pairs]
        branch = max(range(len(shared)), key=shared.__getitem__)
        slots = self._seen[text, branch].nonzero()[: shared[branch], 0]  # in the order of tokens
        keys, values = (
            [own[text][:, slots] for own in pool] for pool in (self._keys, self._values)
        )
        return KeptText(tokens[: len(slots)], keys, values)

    @torch.inference_mode()
    def _read(self, text: int, branch: int, tokens: list[int]) -> torch.Tensor:
        """Read a line of tokens into one branch and return the logits after it, (vocabulary,)."""
        ids = torch.tensor([tokens], device=self.model.device)
        steps = torch.arange(len(tokens), device=self.model.device)
        slots = self._written[text] + steps
        seen = self._seen[text, branch].repeat(1, len(tokens), 1)  # (1, tokens, slots)
        seen[0, :, slots] = steps[:, None] >= steps
        keys, values = (
            [layer[text : text + 1] for layer in pool] for pool in (self._keys, self._values)
        )
        positions = self._positions[text, branch] + steps[None]
        logits, states = self.stepper(
            ids, positions, slots[None], seen, keys, values, kept=1, hidden=self._with_hidden
        )
        if states is not None:
            self.hidden.append(states[0])
        self._seen[text, branch] = seen[0, -1]
        self._written[text] += len(tokens)
        self._positions[text, branch] += len(tokens)
        return logits[0, 0]

    @torch.inference_mode()
    def read_alone(self, text: int, branch: int) -> torch.Tensor:
        """Logits after a branch read by itself, (vocabulary,): no batch, tree or pool."""
        return self.stepper.read_alone(self.lines[text][branch][self.starts[text][branch] :])

    # ---- growing

    @torch.inference_mode()
    def step(self, tokens: list[list[int]], chain: bool = False) -> torch.Tensor:
        """Give every branch a token and return the new logits, (texts, branches, vocabulary).

        Args:
            tokens: one for each branch of each text; for a chain, any number to follow each other
                in each text's only branch, no more than there is `room` for: the first, the first
                two, … of them become its branches.
        """
        ids = torch.tensor(tokens, device=self.model.device)
        width = ids.shape[1]
        if self._reach >= self.context:
            self._start_over()
        self._make_room(width)
        if chain or width > 1:
            steps = torch.arange(width, device=ids.device)
        slots = self._written if width == 1 else self._written + steps  # (texts, width)
        if chain:
            positions, seen = self._positions + steps, self._seen.repeat(1, width, 1)
            earlier = (steps[:, None] >= steps).repeat(len(tokens), 1, 1)
            # repeated: some devices scatter what is not contiguous in the order of memory
            seen.scatter_(2, slots[:, None].repeat(1, width, 1), earlier)
            pairs = zip(self.lines, tokens, strict=True)
            self.lines = [[line + own[: i + 1] for i in range(width)] for (line,), own in pairs]
            self.starts = [start * width for start in self.starts]
        else:
            positions, seen = self._positions, self._seen
            seen.scatter_(2, slots[..., None], True)
            for lines, own in zip(self.lines, tokens, strict=True):
                for line, token in zip(lines, own, strict=True):
                    line.append(token)
        self.logits = self._run(ids, positions, slots, seen)
        self._seen, self._positions = seen, positions + 1
        self._written = self._written + width
        self._used += width
        self._reach += width if chain else 1
        return self.logits

    def _run(
        self, ids: torch.Tensor, positions: torch.Tensor, slots: torch.Tensor, seen: torch.Tensor
    ) -> torch.Tensor:
        step = ids, positions, slots, seen, self._keys, self._values
        logits, states = self.stepper(*step, kept=ids.shape[1], hidden=self._with_hidden)
        if states is not None:
            self.hidden = list(states)
        return logits

    def steps_at_once(self) -> int:
        """Return how many tokens `write` can give every text's only branch in one call."""
        if self._with_hidden:
            return 0
        return min(self.stepper.steps_at_once(len(self.lines)), self.room)

    @torch.inference_mode()
    def write(self, count: int, choice: Choice) -> tuple[list[list[int]], torch.Tensor]:
        """Give every text's only branch tokens for as long as all are sure and none ends a text.

        Args:
            count: at most so many.

        Returns:
            The tokens of each text, and the logits before each, (tokens, texts, vocabulary).
        """
        self._make_room(count)
        assert self.stepper.native is not None, "see steps_at_once"
        step = self.logits[:, 0], self._positions, self._written, self._seen
        tokens, logits = self.stepper.native.write(*step, self._keys, self._values, count, choice)
        done = len(tokens)
        slots = self._written + torch.arange(done)
        self._seen.scatter_(2, slots[:, None], True)
        self._positions, self._written = self._positions + done, self._written + done
        self._used, self._reach = self._used + done, self._reach + done
        self.logits = logits[-1][:, None]
        written: list[list[int]] = tokens.T.tolist()
        for (line,), own in zip(self.lines, written, strict=True):
            line += own
        return written, logits[:-1]

    def mark(self, ahead: int) -> tuple[Any, ...]:
        """Return the state to go back to; so many steps, within the room, can be undone."""
        self._make_room(ahead)
        lines = [[list(line) for line in own] for own in self.lines]
        starts = [list(own) for own in self.starts]
        return self._seen.clone(), self._positions.clone(), self._reach, lines, starts, self.logits

    def back_to(self, mark: tuple[Any, ...]) -> None:
        """Undo the steps since a mark; no branch attends to what they have written."""
        self._seen, self._positions, self._reach, self.lines, self.starts, self.logits = mark

    @property
    def room(self) -> int:
        """How many more tokens fit into the context of every branch."""
        return self.context - self._reach

    @torch.inference_mode()
    def branch(self, parents: list[list[int]]) -> None:
        """Go on with these branches of each text, in this order; one may go on more than once."""
        index = torch.tensor(parents, device=self.model.device)
        texts = torch.arange(len(parents), device=self.model.device)[:, None]
        self._seen, self._positions = self._seen[texts, index], self._positions[texts, index]
        self.logits = self.logits[texts, index]
        self.lines = _chosen(self.lines, parents, list)
        self.starts = _chosen(self.starts, parents, int)
        self._reach = int(self._positions.max())

    @torch.inference_mode()
    def keep(self, texts: list[int]) -> None:
        """Go on with these texts only."""
        index = torch.tensor(texts, device=self.model.device)
        for name in ("_seen", "_positions", "_written", "logits"):
            setattr(self, name, getattr(self, name)[index])
        self._keys = [layer[index] for layer in self._keys]
        self._values = [layer[index] for layer in self._values]
        self.texts = [self.texts[i] for i in texts]
        self.lines = [self.lines[i] for i in texts]
        self.starts = [self.starts[i] for i in texts]
        self._used, self._reach = int(self._written.max()), int(self._positions.max())

    # ---- room

    def _make_room(self, width: int) -> None:
        """Make room for so many more tokens in each text."""
        slots = self._seen.shape[2]
        if self._used + width <= slots:
            return
        self._forget_unseen()
        slots = -(-(self._used + width) // BLOCK) * BLOCK
        more = slots - self._seen.shape[2]
        if more > 0:
            self._seen = pad(self._seen, (0, more))
            for pool in (self._keys, self._values):
                pool[:] = [pad(layer, (0, 0, 0, more)) for layer in pool]

    def _forget_unseen(self) -> None:
        """Move the slots that some branch attends to together, and free the others."""
        live = self._seen.any(1)  # (texts, slots)
        counts = live.sum(1, keepdim=True)
        if torch.equal(counts, self._written):
            return
        order = live.int().argsort(dim=1, descending=True, stable=True)
        texts = torch.arange(len(order), device=order.device)[:, None]
        self._seen = self._seen.gather(2, order[:, None].expand_as(self._seen))
        for pool in (self._keys, self._values):
            pool[:] = [
                layer.transpose(1, 2)[texts, order].transpose(1, 2).contiguous() for layer in pool
            ]
        self._written, self._used = counts, int(counts.max())

    def _start_over(self) -> None:
        """Read the later half of the branches that have reached the end of the context."""
        half = max(1, self.context // 2)
        for text in (self._positions.max(1).values >= self.context).nonzero().flatten().tolist():
            self._seen[text], self._written[text], self._positions[text] = False, 0, 0
            self._used = int(self._written.max())
            for branch, line in enumerate(self.lines[text]):
                self.starts[text][branch] = len(line) + 1 - half
                if half > 1:
                    self._make_room(half - 1)
                    self._read(text, branch, line[len(line) + 1 - half :])
                    self._used = int(self._written.max())
        self._reach = int(self._positions.max())


class Rows:
    """Texts of any other model, encoder-decoders included: a row of a cache for each branch.

    The interface is that of `Tree`, without chains; branching copies rows. A branch that outgrows
    the context goes on with its later half. The lines of an encoder-decoder are the decoder's.
    """

    @torch.inference_mode()
    def __init__(self, stepper: Stepper, prompts: list[list[int]], hidden: bool = False) -> None:
        self.model, self._with_hidden = stepper.model, hidden
        self.context = context_length(self.model)
        arguments = inspect.signature(self.model.forward).parameters
        self._positioned = "position_ids" in arguments
        self._argument = cache_argument(self.model)  # "": read from the start each time
        self._encoded: tuple[torch.Tensor, torch.Tensor] | None = None  # states and their mask
        if self.model.config.is_encoder_decoder:
            self._encoded = self._encode(prompts)
            prompts = [[decoder_start(self.model)] for _ in prompts]
        self.lines = [[list(prompt)] for prompt in prompts]
        self.starts = [[0] for _ in prompts]
        self.hidden: list[torch.Tensor] = []
        self._states = torch.empty(0)
        self._mask = torch.empty(0)  # (rows, tokens): which are no padding
        self.logits = self._read_all()
        if hidden:
            real = self._mask.bool()
            self.hidden = [own[here] for own, here in zip(self._states, real, strict=True)]

    def _encode(self, prompts: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
        """Read prompts one by one, so that none depends on the others' rounding."""
        encoder, device = self.model.get_encoder(), self.model.device
        states, masks = [], []
        for prompt in prompts:
            ids = torch.tensor([prompt], device=device)
            masks.append(torch.ones_like(ids)[0])
            states.append(encoder(input_ids=ids, attention_mask=masks[-1][None])[0][0])
        return pad_sequence(states, batch_first=True), pad_sequence(masks, batch_first=True)

    @torch.inference_mode()
    def read_alone(self, text: int, branch: int) -> torch.Tensor:
        """Logits after a branch read by itself, (vocabulary,): no batch, pad or cache."""
        line = self.lines[text][branch][self.starts[text][branch] :]
        ids = torch.tensor([line], device=self.model.device)
        if self._encoded is None:
            return self.model(input_ids=ids, use_cache=False).logits[0, -1].float()
        row = sum(map(len, self.lines[:text])) + branch
        states, mask = (part[row : row + 1] for part in self._encoded)
        real = mask[0].bool()
        output = self.model(
            encoder_outputs=BaseModelOutput(last_hidden_state=states[:, real]),
            attention_mask=mask[:, real],
            decoder_input_ids=ids,
            use_cache=False,
        )
        return output.logits[0, -1].float()

    @torch.inference_mode()
    def step(self, tokens: list[list[int]]) -> torch.Tensor:
        """Give every branch a token and return the new logits, (texts, branches, vocabulary)."""
        over = False
        for lines, starts, own in zip(self.lines, self.starts, tokens, strict=True):
            for b, token in enumerate(own):
                lines[b].append(token)
                if len(lines[b]) - starts[b] > self.context:
                    starts[b], over = len(lines[b]) - max(1, self.context // 2), True
        if over or not self._argument:
            self.logits = self._read_all()
        else:
            self._mask = pad(self._mask, (0, 1), value=1)
            self.logits = self._forward([[line[-1]] for lines in self.lines for line in lines])
        if self._with_hidden:
            last = self._states[:, -1]
            self.hidden = list(last.view(len(self.lines), -1, last.shape[-1]))
        return self.logits

    def _read_all(self) -> torch.Tensor:
        pairs = zip(self.lines, self.starts, strict=True)
        seen = [x[start:] for lines, at in pairs for x, start in zip(lines, at, strict=True)]
        longest = max(map(len, seen))
        mask = [[0] * (longest - len(line)) + [1] * len(line) for line in seen]
        self._mask = torch.tensor(mask, device=self.model.device)
        self._cache: Any = DynamicCache(config=self.model.config)
        if self._encoded is not None:
            self._cache = EncoderDecoderCache(self._cache, DynamicCache(config=self.model.config))
        return self._forward([[0] * (longest - len(line)) + line for line in seen])

    def _forward(self, tokens: list[list[int]]) -> torch.Tensor:
        ids = torch.tensor(tokens, device=self.model.device)
        options: dict[str, Any] = {"use_cache": False}
        if self._argument:
            options = {self._argument: self._cache, "use_cache": True}
        if self._with_hidden:
            options["output_hidden_states"] = True
        if self._encoded is not None:
            states, mask = self._encoded
            encoded = BaseModelOutput(last_hidden_state=states)
            options |= {"encoder_outputs": encoded, "attention_mask": mask}
            output = self.model(decoder_input_ids=ids, decoder_attention_mask=self._mask, **options)
        else:
            if self._positioned:
                positions = (self._mask.cumsum(-1) - 1).clamp(min=0)
                options["position_ids"] = positions[:, -ids.shape[1] :]
            output = self.model(input_ids=ids, attention_mask=self._mask, **options)
        if self._with_hidden:
            decoder = self._encoded is not None
            states = output.decoder_hidden_states if decoder else output.hidden_states
            self._states = states[-1]  # (rows, width, size)
        texts = len(self.lines)
        return output.logits[:, -1].float().view(texts, -1, output.logits.shape[-1])

    @torch.inference_mode()
    def branch(self, parents: list[list[int]]) -> None:
        """Go on with these branches of each text, in this order; one may go on more than once."""
        firsts = [sum(map(len, self.lines[:i])) for i in range(len(self.lines))]
        rows = [first + b for first, own in zip(firsts, parents, strict=True) for b in own]
        texts = torch.arange(len(parents), device=self.model.device)[:, None]
        self.logits = self.logits[texts, torch.tensor(parents, device=self.model.device)]
        self._select(rows)
        self.lines = _chosen(self.lines, parents, list)
        self.starts = _chosen(self.starts, parents, int)

    @torch.inference_mode()
    def keep(self, texts: list[int]) -> None:
        """Go on with these texts only."""
        firsts = [sum(map(len, self.lines[:i])) for i in range(len(self.lines))]
        self._select([firsts[i] + b for i in texts for b in range(len(self.lines[i]))])
        self.logits = self.logits[torch.tensor(texts, device=self.model.device)]
        self.lines = [self.lines[i] for i in texts]
        self.starts = [self.starts[i] for i in texts]

    def _select(self, rows: list[int]) -> None:
        index = torch.tensor(rows, device=self.model.device)
        if self._argument:
            self._cache.batch_select_indices(index)
        self._mask = self._mask[index]
        if self._encoded is not None:
            states, mask = self._encoded
            self._encoded = states[index], mask[index]


def _chosen(things: list[list[Any]], parents: list[list[int]], copy: Any) -> list[list[Any]]:
    return [[copy(own[b]) for b in index] for own, index in zip(things, parents, strict=True)]


def decoder_start(model: PreTrainedModel) -> int:
    """The token that an encoder-decoder's answer begins with."""
    config = model.generation_config
    start = config.decoder_start_token_id
    return int(config.bos_token_id if start is None else start)


def read_prompts(
    stepper: Stepper,
    prompts: list[list[int]],
    hidden: bool = False,
    kept: KeptTexts | None = None,
) -> Tree | Rows:
    """Read prompts as a tree where the model can, else as rows, which keep nothing."""
    if takes_trees(stepper.model):
        return Tree(stepper, prompts, hidden, kept)
    return Rows(stepper, prompts, hidden)
