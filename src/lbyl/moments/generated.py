"""Text that a language model generates itself: probes that resemble its training data."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional

from lbyl.errors import InputError
from lbyl.moments.base import Probes
from lbyl.moments.sentences import beginnings
from lbyl.moments.token_inputs import like_example, token_ids
from lbyl.runtime.batches import affordable, alike, first_rows, held_out_size, in_parts, macs_per_input
from lbyl.runtime.checks import check_number, check_switch
from lbyl.runtime.inputs import ExampleInputs, output_tensors
from lbyl.runtime.memory import ROOM, give_back, held_at_once, held_bytes
from lbyl.runtime.progress import Progress
from lbyl.runtime.tokenizers import frame, tokenizer_of

_LENGTH = 256
"""Default number of tokens in a sequence. Statistics of the first tokens of a text differ from those of later ones."""


@dataclass(frozen=True)
class Generated:
    """Text that a causal language model generates itself, token by token.

    For calibration, a model's own text was found to be as good as real text (Williams, Chrysostomou, Aletras 2024,
    "Self-calibration for Language Model Quantization and Pruning", arXiv 2410.17170). Each sequence starts with the
    model's start token, if it has one; it is removed again if the tokenizer beside the model's weights does not put it
    before texts. After that, half of the sequences continue with a random token, and the other half with the beginning
    of an English sentence that comes with lbyl. The latter requires a tokenizer in the folder that the model was loaded
    from; without one, all sequences continue with a random token. Special tokens are never drawn.

    Attributes:
        sequences: number of sequences on which moments are collected; a quarter more is held out. None chooses as many
            as 4e12 multiply-accumulates allow, between 16 and 128.
        length: number of tokens in each sequence. None chooses 256, or the model's number of positions if smaller.
        temperature: logits are divided by it; 1 is the model's own distribution.
        sentences: whether to use the beginnings of English sentences.
    """

    sequences: int | None = None
    length: int | None = None
    temperature: float = 1.0
    sentences: bool = True

    def __post_init__(self) -> None:
        check_number("Generated(sequences={})", self.sequences, whole=True, least=1, optional=True)
        check_number("Generated(length={})", self.length, whole=True, least=2, optional=True)
        check_number("Generated(temperature={})", self.temperature, above=0)
        check_switch("Generated(sentences={})", self.sentences)

    def lifelike(self, inputs: ExampleInputs) -> bool:
        """Whether its probes are like real inputs."""
        return True

    def probes(
        self, model: nn.Module, inputs: ExampleInputs, generator: torch.Generator, progress: Progress | None
    ) -> Probes:
        """Generated sequences, in batches of at most 16; the last ones are held out.

        Raises:
            InputError: the model does not give logits of the next token for integer tokens.
        """
        ids = token_ids(inputs)
        if ids is None or not continues_text(model, inputs):
            raise InputError(
                "Generated: the model is not a causal language model (integer tokens in, a logit for each token of the "
                "vocabulary out); use lbyl.Data with your own texts"
            )
        length = self.length or _longest(model, ids)
        each = macs_per_input(model, inputs) * length / ids.shape[1]
        count = self.sequences or affordable(each, 4e12, 16, 128, ceiling=4e13)
        held = held_out_size(count)
        allowed = _allowed(model, inputs)
        write = _Writer(model, inputs, length, self.temperature, allowed, generator)
        kinds = self._starts(model, allowed, count + held, min(_BEGINNING, length - 2), generator)
        # All are brought to one length, for a pass over many texts takes little longer than one over a few.
        longest = max(kind.shape[1] for kind in kinds)
        starts = torch.cat([replace(write, length=longest)(kind.to(ids), lambda tokens: None) for kind in kinds])
        texts: list[Tensor] = []
        for start in starts.split(alike(len(starts), _TOGETHER)):
            done = sum(map(len, texts))

            def report(tokens: int, done: int = done, now: int = len(start)) -> None:
                if progress:
                    progress("writing text", done * length + tokens * now, (count + held) * length)

            texts.append(write(start, report))
        written = torch.cat(texts)[torch.randperm(count + held, generator=generator).to(ids.device)]
        if _only_to_start(model, written):
            written = written[:, 1:]
        note = f"{count} texts of {written.shape[1]} tokens that the model wrote itself"
        if len(kinds) > 1:
            note += ", half of them from the beginnings of English sentences that come with lbyl"
        return Probes(
            tuple(like_example(inputs, part) for part in written[:count].split(16)),
            like_example(inputs, written[count:]),
            batch_statistics=False,
            note=note,
            matches_training_statistics=True,
        )

    def _starts(
        self,
        model: nn.Module,
        allowed: Bool[Tensor, " vocabulary"],
        count: int,
        length: int,
        generator: torch.Generator,
    ) -> list[Int[Tensor, "sequences tokens"]]:
        """The first tokens of all sequences: random tokens, and beginnings of sentences if there is a tokenizer."""
        drawn = allowed.nonzero().flatten()
        tokenizer = tokenizer_of(model) if self.sentences and length > 1 else None
        read = beginnings(tokenizer, count // 2, length, generator) if tokenizer is not None else drawn[:0, None]
        if len(read) and int(read.max()) > int(drawn.max()):  # another model's tokenizer
            read = read[:0]
        first = drawn[torch.randint(len(drawn), (count - len(read), 1), generator=generator)]
        begin = getattr(getattr(model, "config", None), "bos_token_id", None)
        kinds = [kind for kind in (first, read) if len(kind)]
        return [torch.cat([torch.full_like(k[:, :1], begin), k], 1) for k in kinds] if isinstance(begin, int) else kinds


@dataclass(frozen=True)
class _Writer:
    """Continues beginnings of texts until all have the same length.

    Attributes:
        model: the language model.
        inputs: the example inputs.
        length: number of tokens in each text.
        temperature: logits are divided by it.
        allowed: whether each token may be drawn.
        generator: draws the tokens.
    """

    model: Any
    inputs: ExampleInputs
    length: int
    temperature: float
    allowed: Bool[Tensor, " vocabulary"]
    generator: torch.Generator

    @torch.no_grad()
    def __call__(self, text: Int[Tensor, "sequences tokens"], report: Callable[[int], None]) -> Tensor:
        """The texts with these beginnings; ``report`` is called with the current number of tokens in each."""
        if text.shape[1] >= self.length:
            return text
        return (self._by_generate if _generates(self.model) else self._by_hand)(text, report)

    def _by_generate(self, text: Tensor, report: Callable[[int], None]) -> Tensor:
        """Use the model's own ``generate``, which caches keys and values."""

        def watch(ids: Tensor, scores: Tensor) -> Tensor:
            report(ids.shape[1])
            return scores

        devices = [text.device] if text.device.type == "cuda" else []
        with torch.random.fork_rng(devices):
            torch.manual_seed(int(torch.randint(2**31, (1,), generator=self.generator)))
            return self.model.generate(
                text,
                attention_mask=torch.ones_like(text),
                do_sample=True,
                temperature=self.temperature,
                top_k=0,
                top_p=1.0,
                repetition_penalty=1.0,
                num_beams=1,
                num_return_sequences=1,
                return_dict_in_generate=False,
                max_new_tokens=self.length - text.shape[1],
                min_new_tokens=self.length - text.shape[1],
                suppress_tokens=(~self.allowed).nonzero().flatten().tolist() or None,
                pad_token_id=int(self.allowed.nonzero()[0]),
                logits_processor=[watch],
            )

    def _by_hand(self, text: Tensor, report: Callable[[int], None]) -> Tensor:
        """Run the model on the whole text for every new token."""
        fixed = _needs_length(self.model, self.inputs)
        while text.shape[1] < self.length:
            # A causal model ignores later tokens, so padding may have any value.
            shown = functional.pad(text, (0, fixed - text.shape[1])) if fixed else text
            logits = _any_logits(self.model, like_example(self.inputs, shown), shown)
            assert logits is not None
            scores = logits[:, min(text.shape[1], logits.shape[1]) - 1].float().cpu() / self.temperature
            scores[:, ~self.allowed] = -torch.inf
            token = torch.multinomial(scores.softmax(-1), 1, generator=self.generator)
            text = torch.cat([text, token.to(text)], 1)
            report(text.shape[1])
        return text


_TOGETHER = 80
"""Largest number of sequences that are generated at a time."""


_BEGINNING = 6
"""How many tokens of a sentence a text begins with: enough for a subject."""


def _allowed(model: nn.Module, inputs: ExampleInputs) -> Bool[Tensor, " vocabulary"]:
    """Whether each token may be drawn: all tokens but special ones."""
    example = token_ids(inputs)
    assert example is not None
    with torch.no_grad():
        logits = _any_logits(model, inputs.cloned(), example)
    assert logits is not None
    allowed = torch.ones(logits.shape[-1], dtype=torch.bool)
    special = _special_tokens(getattr(model, "config", None))
    allowed[[token for token in special if token < len(allowed)]] = False
    return allowed


def _only_to_start(model: nn.Module, written: Int[Tensor, "texts tokens"]) -> bool:
    """Whether texts start with a token that the tokenizer beside the weights does not put before texts."""
    begin, tokenizer = getattr(getattr(model, "config", None), "bos_token_id", None), tokenizer_of(model)
    if tokenizer is None or not isinstance(begin, int) or written.shape[1] < 3:
        return False
    return begin not in frame(tokenizer)[0]


def _generates(model: nn.Module) -> bool:
    can = getattr(model, "can_generate", None)
    return callable(can) and bool(can())


def _needs_length(model: nn.Module, inputs: ExampleInputs) -> int:
    """The fixed number of tokens that a model requires; 0 if it runs on fewer."""
    ids = token_ids(inputs)
    assert ids is not None
    try:
        like_example(inputs, ids[:, :1]).call(model)
    except Exception:  # a user's model may raise anything
        return ids.shape[1]
    return 0


def writes_text(model: nn.Module, inputs: ExampleInputs) -> bool:
    """Whether a model is a causal language model: its logits at a position do not depend on later tokens."""
    ids = token_ids(inputs)
    config = getattr(model, "config", None)
    if ids is None or ids.shape[1] < 2 or getattr(config, "is_encoder_decoder", False):
        return False
    if hasattr(model, "can_generate") and not _generates(model):
        return False
    try:
        with torch.no_grad():
            first = _logits(inputs.call(model), ids)
            changed = ids.clone()
            changed[:, -1] = (changed[:, -1] + 1) % 7
            second = _logits(inputs.map(lambda t: changed if t is ids else t).call(model), ids)
    except Exception:  # a user's model may raise anything
        return False
    if first is None or second is None:
        return False
    scale = first.abs().max().clamp_min(1e-6)
    same = (first[:, :-1] - second[:, :-1]).abs().max() <= _ROUNDING * scale
    return bool(same) and bool((first[:, -1] - second[:, -1]).abs().max() > _ROUNDING * scale)


def continues_text(model: nn.Module, inputs: ExampleInputs) -> bool:
    """Whether a model tells the next token of a text: for every position, or only after the last one."""
    if writes_text(model, inputs):
        return True
    ids = token_ids(inputs)
    if ids is None or ids.shape[1] < 2 or getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        return False
    changed = ids.clone()
    changed[:, -1] = (changed[:, -1] + 1) % 7
    try:
        with torch.no_grad():
            texts = [like_example(inputs, text) for text in (ids, changed, ids[:, :-1])]
            found = [_last_logits(model, text.call(model), ids) for text in texts]
    except Exception:  # a user's model may raise anything
        return False
    first, second, shorter = found
    if first is None or second is None or shorter is None:
        return False
    return bool((first - second).abs().max() > _ROUNDING * first.abs().max().clamp_min(1e-6))


def _last_logits(model: nn.Module, output: Any, ids: Tensor) -> Tensor | None:
    """The logits after the last token, as ``[sequences, 1, vocabulary]``, of a model that gives no others.

    They are as many as a table of the model has rows for tokens. A classifier has fewer classes.
    """
    tables = {part.num_embeddings for part in model.modules() if isinstance(part, nn.Embedding)}
    for each in output_tensors(output):
        last = each.unsqueeze(1) if each.dim() == 2 else each
        if each.is_floating_point() and last.dim() == 3 and last.shape[:2] == (len(ids), 1):
            return last if last.shape[2] in tables and last.shape[2] > int(ids.max()) else None
    return None


def _any_logits(model: nn.Module, inputs: ExampleInputs, ids: Tensor) -> Tensor | None:
    """The logits of all positions, or those after the last token, ``[sequences, positions, vocabulary]``."""
    output = inputs.call(model)
    found = _logits(output, ids)
    return _last_logits(model, output, ids) if found is None else found


_ROUNDING = 1e-5
"""Logits count as equal if they differ by less than this share of the largest one."""


def _logits(output: Any, ids: Tensor) -> Tensor | None:
    """The logits ``[sequences, tokens, vocabulary]``: the first output with a vector for each token."""
    found = (t for t in output_tensors(output) if t.is_floating_point() and t.dim() == 3)
    return next((t for t in found if t.shape[:2] == ids.shape and t.shape[2] > int(ids.max())), None)


def _longest(model: nn.Module, ids: Tensor) -> int:
    """The default length, or the model's number of positions if smaller; the example's length if that is unknown."""
    config = getattr(model, "config", None)
    for name in ("max_position_embeddings", "n_positions", "n_ctx", "block_size", "max_seq_len"):
        most = getattr(config, name, None)
        if isinstance(most, int) and most > 0:
            return min(_LENGTH, most)
    return max(2, ids.shape[1])


def _special_tokens(config: Any) -> list[int]:
    """The tokens that start, end or pad a text, and the unknown token."""
    found: list[int] = []
    for name in ("bos_token_id", "eos_token_id", "pad_token_id", "unk_token_id"):
        value = getattr(config, name, None)
        found += [v for v in (value if isinstance(value, list | tuple) else [value]) if isinstance(v, int) and v >= 0]
    return found


@torch.no_grad()
def text_losses(model: nn.Module, texts: ExampleInputs) -> Float[Tensor, " texts"]:
    """The mean loss of each text at predicting the next token, in nats per token.

    Raises:
        InputError: the model does not give logits of the next token.
    """
    found: list[Tensor] = []
    most = held_at_once(ROOM, 2 * held_bytes(model, first_rows(texts)))  # of logits, there are copies
    for part in in_parts(texts, most):
        ids = token_ids(part)
        logits = None if ids is None else _logits(part.cloned().call(model), ids)
        if ids is None or logits is None:
            raise InputError("the model gives no logits of the next token")
        rows = zip(logits, ids, strict=True)
        found += [functional.cross_entropy(row[:-1].float(), wanted[1:].long()) for row, wanted in rows]
        give_back()
    return torch.stack(found)
