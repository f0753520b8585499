"""Generation on this machine: ``cpu`` against PyTorch in fp32 with a key-value cache, the same weights in both.

    python benchmarks/cpu_generation.py [--threads N] [--json]

The model has the shape of Llama and 120 million parameters that nobody trained. Both run in turn, and the best of
several rounds counts: on a machine that others use too, the rest is theirs.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from lockstep.bench.random_models import LlamaShape, llama_graph, random_weights
from lockstep.executors import executor
from lockstep_hls import kernels

SHAPE = LlamaShape(
    vocabulary=32000, features=768, hidden=2048, layers=10, heads=12, kv_heads=12, max_tokens=2048
)  # fmt: skip
PROMPT, NEW = 128, 32


def torch_model(shape: LlamaShape, weights: dict[str, np.ndarray]) -> Any:
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


def measure(run: Callable[[np.ndarray], Callable[[int], int]], prompt: np.ndarray) -> tuple[float, float, list[int]]:
    """Seconds for the prompt, seconds for the new tokens, and these. ``run`` gives a function from a token, or -1 for
    the prompt, to the next token.
    """
    begin = time.perf_counter()
    step = run(prompt)
    tokens = [step(-1)]
    prefilled = time.perf_counter()
    for _ in range(NEW):
        tokens.append(step(tokens[-1]))
    return prefilled - begin, time.perf_counter() - prefilled, tokens


def ours(opened: Any, graph: Any, prompt: np.ndarray) -> Callable[[int], int]:
    session = opened.open_session(graph, len(prompt) + NEW)

    def step(token: int) -> int:
        return int(session.extend(prompt if token < 0 else np.array([token])).argmax())

    return step


def pytorch(model: Any, prompt: np.ndarray) -> Callable[[int], int]:
    cache: Any = None

    @torch.no_grad()
    def step(token: int) -> int:
        nonlocal cache
        ids = torch.from_numpy(prompt if token < 0 else np.array([token]))[None]
        result = model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
        cache = result.past_key_values
        return int(result.logits[0, -1].argmax())

    return step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    parser.add_argument("--rounds", type=int, default=5, help="measurements of each (default 5)")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="of both (default: one for each core)")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    kernels.set_threads(arguments.threads)

    weights = random_weights(SHAPE)
    graph, model = llama_graph(SHAPE, weights), torch_model(SHAPE, weights)
    parameters = sum(array.size for array in weights.values())
    prompt = np.random.default_rng(1).integers(0, SHAPE.vocabulary, PROMPT)
    times: dict[str, list[tuple[float, float, list[int]]]] = {"cpu": [], "pytorch": []}
    with executor("cpu") as opened:
        for _ in range(1 + arguments.rounds):  # the first warms up
            times["cpu"].append(measure(lambda ids: ours(opened, graph, ids), prompt))
            times["pytorch"].append(measure(lambda ids: pytorch(model, ids), prompt))
    rates = {
        name: {
            "prefill_tokens_per_second": round(PROMPT / min(taken[0] for taken in rounds[1:]), 1),
            "decode_tokens_per_second": round(NEW / min(taken[1] for taken in rounds[1:]), 1),
        }
        for name, rounds in times.items()
    }
    result = {
        "parameters": parameters,
        "prompt_tokens": PROMPT,
        "new_tokens": NEW,
        "cores": os.cpu_count(),
        "threads": arguments.threads,
        "load_average": round(os.getloadavg()[0], 1),
        "pytorch": torch.__version__,
        "tokens_per_second": rates,
        "prefill_ratio": round(
            rates["cpu"]["prefill_tokens_per_second"] / rates["pytorch"]["prefill_tokens_per_second"], 2
        ),
        "decode_ratio": round(
            rates["cpu"]["decode_tokens_per_second"] / rates["pytorch"]["decode_tokens_per_second"], 2
        ),
    }
    if arguments.json:
        print(json.dumps(result))
        return
    print(f"{parameters / 1e6:.0f} M parameters, {PROMPT} tokens in, {NEW} out")
    print(f"{arguments.threads} threads on {os.cpu_count()} cores, load average {result['load_average']}")
    print(f"{'':<16}{'prefill':>16}{'decode':>16}")
    for name, label in (("cpu", "cpu (int8)"), ("pytorch", "PyTorch (fp32)")):
        prefill, decode = rates[name].values()
        print(f"{label:<16}{prefill:>10.1f} tok/s{decode:>10.1f} tok/s")
    print(f"{'ratio':<16}{result['prefill_ratio']:>16}{result['decode_ratio']:>16}")


if __name__ == "__main__":
    main()
