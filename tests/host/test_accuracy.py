"""How close W8A8 comes to PyTorch's float32 on real weights, on sentences that calibration never saw."""

from __future__ import annotations

import numpy as np
import pytest
from lockstep.evaluate import run_float
from lockstep.model import HostExecutor, Model
from lockstep.quantise import quantise
from lockstep_hls import kernels
from lockstep_isa import operations
from sample_sentences import SENTENCES


@pytest.fixture(scope="module")
def wanted(minilm: Model) -> np.ndarray:
    """PyTorch's embeddings: float32[sentences, 384], each of length one."""
    return np.stack(
        [minilm.pooling(run_float(minilm.float_graph, {"input_ids": ids})) for ids in minilm.tokenize(SENTENCES)]
    )


def cosines(vectors: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    return (vectors.astype(np.float64) * wanted).sum(axis=1)


def test_with_pre_scale_the_mean_cosine_is_above_0_9985(minilm: Model, wanted: np.ndarray) -> None:
    cosine = cosines(minilm.embed(SENTENCES, HostExecutor(kernels)), wanted)
    print(f"with the bundled pre-scale: mean {cosine.mean():.4f}, least {cosine.min():.4f}")
    assert cosine.mean() >= 0.9985, f"mean {cosine.mean():.5f}"
    assert cosine.min() >= 0.995, f"{cosine.min():.5f} for {SENTENCES[int(cosine.argmin())]!r}"


def test_without_pre_scale_the_mean_cosine_is_above_0_995(minilm: Model, wanted: np.ndarray) -> None:
    plain = quantise(minilm.float_graph)
    hidden = HostExecutor(kernels).run(plain, [{"input_ids": ids} for ids in minilm.tokenize(SENTENCES)])
    cosine = cosines(np.stack([minilm.pooling(rows) for rows in hidden]), wanted)
    print(f"without: mean {cosine.mean():.4f}, least {cosine.min():.4f}")
    assert cosine.mean() >= 0.995, f"mean {cosine.mean():.5f}"
    assert cosine.min() >= 0.98, f"{cosine.min():.5f} for {SENTENCES[int(cosine.argmin())]!r}"


def test_golden_model_and_kernels_give_the_same_hidden_states(minilm: Model) -> None:
    ids = minilm.tokenize(["Two implementations, one answer."])[0]
    golden = minilm.hidden_states(ids, operations)
    compiled = minilm.hidden_states(ids, kernels)
    assert golden.dtype == compiled.dtype == np.float32
    assert np.array_equal(golden.view(np.uint32), compiled.view(np.uint32))
