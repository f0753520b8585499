"""One token of a language model behind a cache: what decode costs, beside the bytes that it must read.

Weights are random, and so are the keys and values in the cache: the same ones on the core and in the reference. Cycles
depend on neither.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
from lockstep_driver import Counters, Device
from lockstep_isa import operations
from lockstep_isa.int4_cache import quantise_keys, quantise_values
from lockstep_isa.selectors import Blocks

from lockstep.cache_policy import WHOLE, CachePolicy, asked_policy, hosted
from lockstep.compiler.cache_form import CacheForm
from lockstep.compiler.execute import DeviceExecutor
from lockstep.compiler.sketch import BLOCK
from lockstep.graph import Attention, Graph, Value
from lockstep.quantisation.formats import Format
from lockstep.session import CacheRows, HostSession

from .limits import decode_bytes, decode_limit
from .measure import Bench, BenchError, Measurement, Ran
from .random_models import Gpt2Shape, LlamaShape, gpt2_graph, llama_graph, random_weights
from .random_weights import INT8, format_of, names_of
from .sizes import DecodeSizes

#: Name -> features, features of the feed-forward layer, heads, heads of keys and values, vocabulary. GPT-2's have
#: layer norms, biases and GELU; Llama's have RMS norms, rotary embeddings and a gate.
GPT2 = {"gpt2-medium": (1024, 4096, 16, 16, 50257)}
LLAMA = {
    "llama-tiny": (256, 640, 4, 4, 272),
    "llama-160m": (768, 2048, 12, 12, 32000),
    "llama-1b": (2048, 8192, 32, 8, 128256),
}
SHAPES = GPT2 | LLAMA
DEFAULT_SHAPES = ["gpt2-medium", "llama-160m"]
DEFAULT_CONTEXTS = [128, 512, 1024]
#: Entries of the embedding table where no logits are computed: the host looks a token up, whatever their number.
EMBEDDINGS = 64


def check_shape(name: str, kv_heads: int | None) -> None:
    """Raises :class:`BenchError` for a shape that is none, or that cannot have so many heads of keys and values."""
    if name not in SHAPES:
        raise BenchError(f"'{name}' is no shape; there are {', '.join(SHAPES)}")
    if kv_heads is None:
        return
    if name in GPT2:
        raise BenchError(
            f"{name} has a head of keys and values for each of queries; give --kv-heads with --shape, one of "
            f"{', '.join(LLAMA)}"
        )
    heads = LLAMA[name][2]
    if kv_heads < 1 or heads % kv_heads:
        divisors = [str(n) for n in range(1, heads + 1) if heads % n == 0]
        raise BenchError(
            f"{kv_heads} heads of keys and values do not divide the {heads} of queries of {name}; give --kv-heads one "
            f"of {', '.join(divisors)}"
        )


def model(
    name: str,
    layers: int,
    positions: int,
    head: bool,
    seed: int = 0,
    kv_heads: int | None = None,
    format: Format = INT8,
) -> Graph:
    """A model with random weights in ``format``, and with ``kv_heads`` heads of keys and values if given; raises as
    :func:`check_shape` does.
    """
    check_shape(name, kv_heads)
    features, hidden, heads, own_kv_heads, vocabulary = SHAPES[name]
    vocabulary = vocabulary if head else EMBEDDINGS
    if name in GPT2:
        gpt2 = Gpt2Shape(vocabulary, features, hidden, layers, heads, positions, head=head)
        return gpt2_graph(gpt2, random_weights(gpt2, seed), format)
    llama = LlamaShape(vocabulary, features, hidden, layers, heads, kv_heads or own_kv_heads, positions, head=head)
    return llama_graph(llama, random_weights(llama, seed), format)


def random_cache(graph: Graph, tokens: int, seed: int = 0, bits: int = 8) -> dict[Value, CacheRows]:
    """Keys and values of ``tokens`` tokens as a model leaves them: all of ``bits``, at scales for values about 1."""
    if bits == 4:
        return {node.value: int4_rows(node, tokens, seed + node.value) for node in graph.of(Attention)}
    rng = np.random.default_rng(seed)
    caches = {}
    for node in graph.of(Attention):
        parts = [
            (
                rng.integers(-127, 128, (tokens, node.kv_heads * node.head_dim), np.int8),
                rng.uniform(0.01, 0.03, (tokens, node.kv_heads)).astype(np.float32),
            )
            for _ in range(2)
        ]
        caches[node.value] = (*parts[0], *parts[1])
    return caches


def int4_rows(node: Attention, tokens: int, seed: int) -> CacheRows:
    """Keys and values of 4 bits for one attention."""
    rng = np.random.default_rng(seed)
    parts: list[np.ndarray] = []
    for quantise in (quantise_keys, quantise_values):
        rows, scales = quantise(rng.normal(size=(tokens * node.kv_heads, node.head_dim)).astype(np.float32))
        parts += [rows.reshape(tokens, -1), scales.reshape(tokens, -1)]
    keys, key_scales, values, value_scales = parts
    return keys, key_scales, values, value_scales


def run(sizes: DecodeSizes, bench: Bench) -> Iterator[Measurement]:
    """Every shape behind every context."""
    shapes, contexts = sizes.shape or DEFAULT_SHAPES, sizes.context or DEFAULT_CONTEXTS
    if min(contexts) < 1 or sizes.layers < 1:
        raise BenchError(
            "a model has at least one layer, and a context at least one token; give --layers and --context"
        )
    for name in shapes:
        check_shape(name, sizes.kv_heads)
    format = format_of(sizes.weights, sizes.sparsity)
    for name in shapes:
        bench.say(f"making {sizes.layers} layers of {name}")
        graph = model(name, sizes.layers, max(contexts) + 1, sizes.head, sizes.seed, sizes.kv_heads, format)
        for context in contexts:
            bench.say(f"decode of {name} behind {context} tokens on {bench.uri}")
            yield _measure(name, graph, context, sizes, bench)


def _measure(name: str, graph: Graph, context: int, sizes: DecodeSizes, bench: Bench) -> Measurement:
    policy = asked_policy(sizes.evict, sizes.keep, sizes.select, sizes.cache_bits)
    for part, reason in hosted(policy):
        raise BenchError(f"{part} would run on the host, which has no cycles: {reason}; ask for one of them alone")
    kept = _most_kept(policy)
    if policy.bits == WHOLE.bits and (kept is None or kept >= context):
        return _token(name, graph, context, WHOLE, sizes, bench).token
    bare, full = (_token(name, graph, tokens, WHOLE, sizes, bench).token for tokens in (0, context))
    found = _token(name, graph, context, policy, sizes, bench)
    for other in (bare, full):
        if not other.identical:
            raise BenchError(f"{other.differences:,} values of a whole cache are not golden's on {bench.uri}")
    # A token pays its share of the block of keys that it completes.
    sketch = sum(found.sketch_cycles) / max(1, len(found.sketch_cycles)) / BLOCK
    before, after = full.cycles - bare.cycles, found.token.cycles - bare.cycles + sketch
    bytes_before, bytes_after = (run.bytes - bare.bytes for run in (full, found.token))
    cached = found.token.limit.cycles - bare.limit.cycles
    figures = {
        "full_cycles": full.cycles,
        "full_attention_cycles": before,
        "attention_cycles": after,
        "attention_speedup": before / after,
        "attention_limit_cycles": cached,
        "attention_ratio": after / cached,
        "full_cache_bytes": bytes_before,
        "cache_bytes": bytes_after,
        "cache_bytes_ratio": bytes_before / bytes_after,
    }
    if found.sketch_cycles:
        figures["sketch_cycles"] = sketch
    return dataclasses.replace(found.token, figures=figures)


def _most_kept(policy: CachePolicy) -> int | None:
    """Keys that a token attends to at most; none for all."""
    if policy.eviction is not None:
        return policy.eviction.budget
    return policy.selector.keys if isinstance(policy.selector, Blocks) else None


@dataclass(frozen=True)
class _Decoded:
    """One token, and the cycles of each block of keys that was sketched in front of it."""

    token: Measurement
    sketch_cycles: list[int]


def _token(name: str, graph: Graph, context: int, policy: CachePolicy, sizes: DecodeSizes, bench: Bench) -> _Decoded:
    """One token behind ``context`` others, with a cache as the policy says."""
    held = context if policy.eviction is None else policy.eviction.budget
    caches = random_cache(graph, held, sizes.seed, policy.bits)
    token = np.array([sizes.seed % EMBEDDINGS])
    reference = HostSession(graph, context + 1, operations, policy)
    reference.restore(context, caches)
    expected = reference.extend(token)
    # What makes room is there no more when the new token is.
    seen = held if policy.eviction is None else held - 1
    chosen = policy.selector.keys if isinstance(policy.selector, Blocks) else None
    needed, form = decode_bytes(bench.config, graph, seen), CacheForm(policy.bits)
    asked: dict[str, object] = {"kv_heads": sizes.kv_heads}
    if policy != WHOLE:
        asked |= {"keep": sizes.keep, "evict": sizes.evict, "select": sizes.select, "cache_bits": sizes.cache_bits}
    given = {field: value for field, value in asked.items() if value is not None}
    packed = names_of(format_of(sizes.weights, sizes.sparsity))
    sketch_cycles: list[int] = []

    def work(device: Device) -> Ran:
        *sketches, ran = _decode(device, graph, context, caches, token, policy)
        sketch_cycles[:] = [counters.cycles for counters in sketches]
        return ran

    found = bench.measure(
        "decode",
        {"shape": name, "context": context, "layers": sizes.layers, "head": sizes.head, **given, **packed},
        decode_limit(bench.config, bench.parsed.timing, graph, seen, chosen, form),
        work,
        [expected],
        # Programs, tables and buffers are small beside weights and the rounded cache with its sketch.
        memory_bytes=needed.weights + 2 * needed.cache + (8 << 20) + needed.weights // 8,
    )
    return _Decoded(found, sketch_cycles)


def _decode(
    device: Device,
    graph: Graph,
    context: int,
    caches: Mapping[Value, CacheRows],
    token: np.ndarray,
    policy: CachePolicy,
) -> tuple[*tuple[Counters, ...], Ran]:
    """Counters of the programs in front of the token's, and what that one left."""
    counted: list[Counters] = []
    executor = DeviceExecutor(device, counted.append)
    try:
        session = executor.open_session(graph, context + 1, policy)
        session.restore(context, caches)
        values = session.extend(token)
        session.close()
    finally:
        executor.close()
    *before, counters = counted
    return *before, Ran([values], counters)
