"""A Llama of random weights on ``cpu`` and on what else runs it on a CPU; see ``cpu_peers.py``."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from contenders import Contender, library, quiet
from lockstep.bench.random_models import LlamaShape, llama_graph, random_weights
from lockstep.executors import executor

SHAPE = LlamaShape(
    vocabulary=32000, features=768, hidden=2048, layers=10, heads=12, kv_heads=12, max_tokens=2048
)  # fmt: skip


class Generation:
    """The model and its prompt. Every contender reads the same tokens: those that a user would have it generate are
    drawn here, because contenders differ in rounding and would not agree for long.

    Attributes
    ----------
    work : tokens of each phase.
    """

    def __init__(self, prompt: int, new: int, shape: LlamaShape = SHAPE) -> None:
        self.shape, self.weights = shape, random_weights(shape)
        self.graph = llama_graph(shape, self.weights)
        ids = np.random.default_rng(1).integers(0, shape.vocabulary, prompt + new)
        self.prompt, self.new = ids[:prompt], ids[prompt:]
        self.work = {"prefill": prompt, "decode": new}

    @property
    def parameters(self) -> int:
        return sum(array.size for array in self.weights.values())

    def contenders(self, threads: int) -> dict[str, Callable[[], Contender]]:
        """What opens each contender, which raises ``Missing`` where it cannot be had."""
        return {
            "lockstep": lambda: self.lockstep(threads),
            "pytorch fp32": self.pytorch,
            "llama.cpp Q8_0": lambda: self.llama_cpp(threads),
        }

    def _contender(
        self, begin: Callable[[], None], extend: Callable[[np.ndarray], np.ndarray], close: Callable[[], None]
    ) -> Contender:
        """``extend`` takes the next tokens, behind those that it took since ``begin``, to the logits of the last."""

        def prefill() -> np.ndarray:
            begin()
            return extend(self.prompt)

        def decode() -> np.ndarray:
            logits = np.empty(0)
            for i in range(len(self.new)):
                logits = extend(self.new[i : i + 1])
                logits.argmax()
            return logits

        return Contender({"prefill": prefill, "decode": decode}, close)

    def lockstep(self, threads: int) -> Contender:
        opened = executor("cpu", threads=threads)
        session = opened.open_session(self.graph, len(self.prompt) + len(self.new))
        return self._contender(lambda: session.truncate(0), lambda ids: session.extend(ids)[-1], opened.close)

    def pytorch(self) -> Contender:
        model = torch_model(self.shape, self.weights)
        cache: Any = None

        def begin() -> None:
            nonlocal cache
            cache = None

        @torch.no_grad()
        def extend(ids: np.ndarray) -> np.ndarray:
            nonlocal cache
            given = torch.from_numpy(ids)[None]
            result = model(input_ids=given, past_key_values=cache, use_cache=True, logits_to_keep=1)
            cache = result.past_key_values
            return result.logits[0, -1].numpy()

        return self._contender(begin, extend, lambda: None)

    def llama_cpp(self, threads: int) -> Contender:
        library("gguf")
        llama = library("llama_cpp")
        capacity = len(self.prompt) + len(self.new)
        with tempfile.TemporaryDirectory() as folder, quiet():
            path = Path(folder) / "model.gguf"
            write_gguf(path, self.shape, self.weights)
            model = llama.Llama(
                str(path), n_ctx=capacity, n_batch=len(self.prompt), n_ubatch=len(self.prompt), use_mmap=False,
                n_threads=threads, n_threads_batch=threads, verbose=False, logits_all=False,
            )  # fmt: skip

        def extend(ids: np.ndarray) -> np.ndarray:
            tokens = (llama.llama_token * len(ids))(*ids.tolist())
            if llama.llama_decode(model.ctx, llama.llama_batch_get_one(tokens, len(ids))):
                raise RuntimeError("llama_decode failed")
            return np.ctypeslib.as_array(llama.llama_get_logits_ith(model.ctx, -1), (self.shape.vocabulary,))

        def begin() -> None:
            llama.llama_memory_clear(llama.llama_get_memory(model.ctx), True)

        return self._contender(begin, extend, model.close)


def torch_model(shape: LlamaShape, weights: Mapping[str, np.ndarray]) -> Any:
    """``transformers.LlamaForCausalLM`` with these weights, in fp32 and eager mode."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=shape.vocabulary,
        hidden_size=shape.features,
        intermediate_size=shape.hidden,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        max_position_embeddings=shape.max_tokens,
        rms_norm_eps=shape.eps,
        tie_word_embeddings=False,
    )
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    model = model.to_empty(device="cpu").eval()
    model.load_state_dict({name: torch.from_numpy(array) for name, array in weights.items()})
    model.model.rotary_emb = type(model.model.rotary_emb)(config)  # its buffers are no part of the weights
    return model


#: llama.cpp's names of a layer's tensors.
_LAYER = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
_WHOLE = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}


def write_gguf(path: Path, shape: LlamaShape, weights: Mapping[str, np.ndarray]) -> None:
    """These weights as a model of llama.cpp without a vocabulary: matrices in Q8_0, norms in fp32."""
    import gguf

    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(shape.max_tokens)
    writer.add_embedding_length(shape.features)
    writer.add_block_count(shape.layers)
    writer.add_feed_forward_length(shape.hidden)
    writer.add_head_count(shape.heads)
    writer.add_head_count_kv(shape.kv_heads)
    writer.add_rope_dimension_count(shape.head_dim)
    writer.add_rope_freq_base(shape.theta)
    writer.add_layer_norm_rms_eps(shape.eps)
    writer.add_vocab_size(shape.vocabulary)
    writer.add_tokenizer_model("no_vocab")
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_Q8_0)
    q8_0 = gguf.GGMLQuantizationType.Q8_0
    for name, array in weights.items():
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            array = _neighbouring_pairs(array, shape.head_dim)
        if array.ndim == 1:
            writer.add_tensor(_gguf_name(name), array)
        else:
            writer.add_tensor(_gguf_name(name), gguf.quants.quantize(array, q8_0), raw_dtype=q8_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _neighbouring_pairs(weight: np.ndarray, head_dim: int) -> np.ndarray:
    """Channels in the order of llama.cpp's rotary embedding, which turns neighbours and not halves of a head."""
    return weight.reshape(-1, 2, head_dim // 2, weight.shape[1]).swapaxes(1, 2).reshape(weight.shape)


def _gguf_name(name: str) -> str:
    stem = name.removesuffix(".weight")
    if stem in _WHOLE:
        return f"{_WHOLE[stem]}.weight"
    _, _, layer, rest = stem.split(".", 3)
    return f"blk.{layer}.{_LAYER[rest]}.weight"
