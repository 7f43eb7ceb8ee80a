"""A BERT encoder's forward pass in torch, for inference: weights from safetensors, words from ``tokenizers``.

Knows the architecture of Devlin et al. 2019 (post-norm, learned positions, erf GELU) and sentence pooling (Reimers and
Gurevych 2019). Knows nothing else of what transformers does, and so starts in a fraction of its time.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer
from torch.nn import functional

from agentmem.errors import Corrupt

if TYPE_CHECKING:
    import numpy.typing as npt

__all__ = ["Bert"]

#: Tokens per batch, padding included: enough to fill the vector units, little enough to stay in cache.
BATCH_TOKENS = 4096


class Bert:
    """One model in memory. ``plan`` says its shape and pooling (embed.py); ``dtype`` is a torch dtype's name."""

    def __init__(self, folder: Path, plan: Mapping[str, Any], dtype: str) -> None:
        self._plan = plan
        self._dtype = getattr(torch, dtype)
        self._tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        self._tokenizer.no_padding()
        self._tokenizer.enable_truncation(max_length=plan["tokens"])
        try:
            self._weights = self._fused({key.removeprefix("bert."): value for key, value in _loaded(folder).items()})
        except KeyError as error:
            raise Corrupt(f"{folder / 'model.safetensors'} lacks the tensor {error}: it is no BERT model") from error

    def _fused(self, weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Query, key and value as one matrix; token type 0 added to the positions, since texts here have one part."""
        for layer in range(self._plan["layers"]):
            for part in ("weight", "bias"):
                name = f"encoder.layer.{layer}.attention.self"
                weights[f"{name}.all.{part}"] = torch.cat(
                    [weights.pop(f"{name}.{role}.{part}") for role in ("query", "key", "value")]
                )
        weights["positions"] = (
            weights.pop("embeddings.position_embeddings.weight")
            + weights.pop("embeddings.token_type_embeddings.weight")[0]
        )
        return {key: value.to(self._dtype) for key, value in weights.items() if value.is_floating_point()}

    def embed(self, texts: Sequence[str]) -> npt.NDArray[np.float32]:
        """Float32 [len(texts), dimension], not yet normalised."""
        found = self._tokenizer.encode_batch(list(texts))
        vectors = np.empty((len(found), self._plan["dimension"]), np.float32)
        for batch, hidden, mask in self._batches([item.ids for item in found]):
            vectors[batch] = self._pooled(hidden, mask)
        return vectors

    def encode(
        self, texts: Sequence[str], *, skip: int = 0, half: bool = False
    ) -> tuple[npt.NDArray[np.float32], list[Any], list[list[tuple[int, int]]]]:
        """The vectors of `embed`; per text its token vectors, of length 1; and what characters each stands for.

        Tokens of the first ``skip`` characters (a prompt) are left out, and places count from there; so are the special
        ones. ``half``: token vectors as float16, else float32.
        """
        found = self._tokenizer.encode_batch(list(texts))
        vectors = np.empty((len(found), self._plan["dimension"]), np.float32)
        kept: list[list[int]] = []
        spans: list[list[tuple[int, int]]] = []
        for item in found:
            own = [(place, span) for place, span in enumerate(item.offsets) if span[1] > max(skip, span[0])]
            special = item.special_tokens_mask
            own = [(place, span) for place, span in own if not special[place]]
            kept.append([place for place, _ in own])
            spans.append([(max(start - skip, 0), stop - skip) for _, (start, stop) in own])
        tokens: list[Any] = [None] * len(found)
        for batch, hidden, mask in self._batches([item.ids for item in found]):
            vectors[batch] = self._pooled(hidden, mask)
            unit = functional.normalize(hidden, dim=-1).to(torch.float16 if half else torch.float32).numpy()
            for at, row in enumerate(batch):
                tokens[row] = unit[at, kept[row]]
        return vectors, tokens, spans

    def _pooled(self, hidden: torch.Tensor, mask: torch.Tensor) -> npt.NDArray[np.float32]:
        if self._plan["pooling"] == "cls_token":
            pooled = hidden[:, 0]
        else:
            pooled = (hidden * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
        return cast("npt.NDArray[np.float32]", pooled.numpy())

    def _batches(self, ids: list[list[int]]) -> Iterator[tuple[list[int], torch.Tensor, torch.Tensor]]:
        """Rows of a batch, their last hidden states float32 [batch, tokens, dimension], and which tokens they have."""
        for batch in _batches([len(item) for item in ids]):
            longest = max(len(ids[row]) for row in batch)
            tokens = torch.zeros(len(batch), longest, dtype=torch.long)
            mask = torch.zeros(len(batch), longest, dtype=torch.bool)
            for at, row in enumerate(batch):
                tokens[at, : len(ids[row])] = torch.tensor(ids[row])
                mask[at, : len(ids[row])] = True
            with torch.inference_mode():
                hidden = self._forward(tokens, mask).float()
            yield batch, hidden, mask

    def _forward(self, tokens: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """The last hidden states [batch, tokens, dimension]."""
        weights, heads, epsilon = self._weights, self._plan["heads"], self._plan["epsilon"]
        batch, length = tokens.shape

        def linear(x: torch.Tensor, name: str) -> torch.Tensor:
            return functional.linear(x, weights[f"{name}.weight"], weights[f"{name}.bias"])

        def norm(x: torch.Tensor, name: str) -> torch.Tensor:
            return functional.layer_norm(x, x.shape[-1:], weights[f"{name}.weight"], weights[f"{name}.bias"], epsilon)

        hidden = functional.embedding(tokens, weights["embeddings.word_embeddings.weight"])
        hidden = norm(hidden + weights["positions"][:length], "embeddings.LayerNorm")
        # A batch of equal lengths needs no mask, and then attention takes its fast path.
        seen = None if bool(mask.all()) else mask[:, None, None, :]
        for layer in range(self._plan["layers"]):
            name = f"encoder.layer.{layer}"
            states = linear(hidden, f"{name}.attention.self.all").view(batch, length, 3, heads, -1)
            query, key, value = states.permute(2, 0, 3, 1, 4)
            mixed = functional.scaled_dot_product_attention(query, key, value, attn_mask=seen)
            mixed = mixed.transpose(1, 2).reshape(batch, length, -1)
            hidden = norm(
                hidden + linear(mixed, f"{name}.attention.output.dense"), f"{name}.attention.output.LayerNorm"
            )
            inner = functional.gelu(linear(hidden, f"{name}.intermediate.dense"))
            hidden = norm(hidden + linear(inner, f"{name}.output.dense"), f"{name}.output.LayerNorm")
        return hidden


def _loaded(folder: Path) -> dict[str, torch.Tensor]:
    try:
        return dict(load_file(folder / "model.safetensors"))
    except Exception as error:  # safetensors raises its own class, derived from Exception alone
        raise Corrupt(f"{folder / 'model.safetensors'} can't be read: {error}") from error


def _batches(lengths: Sequence[int]) -> Iterator[list[int]]:
    """Rows in batches of similar length, so that little is computed for padding."""
    batch: list[int] = []
    for row in sorted(range(len(lengths)), key=lengths.__getitem__):
        if batch and (len(batch) + 1) * lengths[row] > BATCH_TOKENS:
            yield batch
            batch = []
        batch.append(row)
    if batch:
        yield batch
