"""A model as transformers sees one: ``generate`` and pipelines of transformers, on any executor.

wrapped = lockstep.load(folder, device="fast:laptop").as_transformers()
pipe = transformers.pipeline("text-generation", model=wrapped, tokenizer=wrapped.lockstep.tokenizer)
"""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from transformers import GenerationConfig, GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.cache_utils import Cache
from transformers.modeling_outputs import CausalLMOutputWithPast

from lockstep.errors import InputError, ModelError
from lockstep.generation import Generator
from lockstep.sampling import GENERATION_CONFIG
from lockstep.session import Session

if TYPE_CHECKING:
    from lockstep.model import Model


class SessionCache(Cache):
    """The cache of transformers over sessions, one for each sequence of a batch; keys and values stay in them."""

    def __init__(self, sessions: list[Session]) -> None:
        super().__init__(layers=[])
        self.sessions = sessions
        #: Columns of ``input_ids`` that went in, padding included.
        self.columns = 0
        weakref.finalize(self, _close, sessions)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens that went in, padding included."""
        return self.columns

    def crop(self, max_length: int) -> None:
        """Refused: transformers crops caches for assisted generation, in which padding is not told from tokens."""
        raise ModelError("assisted generation is not possible with a Lockstep model; generate without an assistant")

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Refused: a beam search copies caches."""
        raise ModelError("a beam search is not possible with a Lockstep model; generate with num_beams=1")


def _close(sessions: list[Session]) -> None:
    for session in sessions:
        session.close()
    sessions.clear()


class LockstepForCausalLM(PreTrainedModel, GenerationMixin):
    """A causal language model of transformers whose logits a Lockstep executor computes.

    It has no parameters of its own and cannot be trained. Sequences of a batch run one after the other; padding, on
    the left as transformers wants it, is left out by the attention mask.

    Parameters
    ----------
    model : its device is where everything runs; close it when done.
    context : most tokens of a sequence; as many as the model has positions if none.

    Raises :class:`ModelError` if the model is none that generates.
    """

    main_input_name = "input_ids"
    config_class = PretrainedConfig

    def __init__(self, model: Model, context: int | None = None) -> None:
        Generator(model, model.executor)  # refuses what cannot generate
        super().__init__(_configuration(model))
        self.lockstep = model
        self._context = model.graph.max_tokens if context is None else context
        if model.folder is not None and (model.folder / GENERATION_CONFIG).is_file():
            self.generation_config = GenerationConfig.from_pretrained(model.folder, local_files_only=True)
        self.eval()

    @property
    def device(self) -> torch.device:
        """Where tensors must be: the host."""
        return torch.device("cpu")

    @property
    def dtype(self) -> torch.dtype:
        """Of the logits."""
        return torch.float32

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False  # forward makes the cache

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        past_key_values: SessionCache | None = None,
        use_cache: bool = True,
        logits_to_keep: int = 0,
        return_dict: bool = True,
        **ignored: Any,
    ) -> Any:
        """Logits: ``float32[batch, n, vocabulary]`` of all tokens, or only of the last one with ``logits_to_keep=1``.

        Parameters
        ----------
        input_ids : int64[batch, n], those that are not in the cache yet. attention_mask : [batch, tokens so far],
            0 for padding. past_key_values : what an earlier call returned.
        """
        cache = past_key_values
        if cache is None:
            opened: list[Session] = []
            cache = SessionCache(opened)
            for _ in input_ids:
                opened.append(self.lockstep.executor.open_session(self.lockstep.graph, self._context))
        if len(cache.sessions) != len(input_ids):
            raise InputError(f"the cache is of {len(cache.sessions)} sequences, but there are {len(input_ids)}")
        columns = input_ids.shape[1]
        present = torch.ones_like(input_ids) if attention_mask is None else attention_mask[:, -columns:]
        last = logits_to_keep == 1
        rows = [
            self._extend(session, ids.numpy(), mask.numpy() != 0, last)
            for session, ids, mask in zip(cache.sessions, input_ids, present, strict=True)
        ]
        cache.columns += columns
        logits = torch.from_numpy(np.stack(rows))
        if logits_to_keep > 1:
            logits = logits[:, -logits_to_keep:]
        result = CausalLMOutputWithPast(logits=logits, past_key_values=cache if use_cache else None)
        return result if return_dict else result.to_tuple()

    @staticmethod
    def _extend(session: Session, ids: np.ndarray, present: np.ndarray, last: bool) -> np.ndarray:
        if last and not present[-1]:
            raise InputError("the last token is padding; set padding_side='left' in the tokenizer")
        logits = session.extend(ids[present], "last" if last else "all")
        if last:
            return logits
        full = np.zeros((len(ids), logits.shape[1]), np.float32)
        full[present] = logits
        return full


def wrap(model: Model, context: int | None = None) -> LockstepForCausalLM:
    """``model`` as a :class:`LockstepForCausalLM`."""
    names = _configuration(model).architectures or []
    # Pipelines know the models that they serve by the names of their classes.
    kind = type(names[0], (LockstepForCausalLM,), {}) if names else LockstepForCausalLM
    return kind(model, context)


def _configuration(model: Model) -> PretrainedConfig:
    """What transformers asks a model for."""
    if model.folder is not None:
        from transformers import AutoConfig

        return AutoConfig.from_pretrained(model.folder, local_files_only=True)
    ends = sorted(model.generation_defaults.end_tokens)
    result: Any = PretrainedConfig()
    result.eos_token_id = ends or None
    return result
