"""MiniLM on one text, on ``cpu`` and on what else runs it on a CPU; see ``cpu_peers.py``."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from importlib import resources
from pathlib import Path
from typing import Any

import lockstep
import numpy as np
import torch
from contenders import Contender, library, quiet
from lockstep.checkpoint import load_checkpoint
from lockstep.executors import executor

CALIBRATION_TEXTS = 32


class Encoder:
    """The model, its input and texts to calibrate with; ids are int64[tokens].

    Attributes
    ----------
    work : tokens of one run.
    """

    def __init__(self, tokens: int) -> None:
        self.model = lockstep.load("minilm")
        assert self.model.folder is not None
        self.torch_model = load_checkpoint(self.model.folder).module.eval()
        text = (resources.files("lockstep") / "data" / "calibration.txt").read_text(encoding="utf-8")
        whole = np.concatenate(self.model.tokenize(text.splitlines()))
        count = len(whole) // tokens
        if not count:
            raise SystemExit(f"the bundled texts have {len(whole)} tokens; give --tokens up to that")
        self.texts = [whole[i * tokens : (i + 1) * tokens] for i in range(min(count, 1 + CALIBRATION_TEXTS))]
        self.ids, self.calibration = self.texts[0], self.texts[1:] or self.texts
        self.work = {"tokens": tokens}
        self._converted: dict[str, Any] = {}

    def contenders(self, threads: int) -> dict[str, Callable[[], Contender]]:
        """What opens each contender, which raises ``Missing`` where it cannot be had."""
        return {
            "lockstep": lambda: self.lockstep(threads),
            "pytorch fp32": self.pytorch,
            "openvino int8": lambda: self.openvino(threads),
            "onnxruntime int8": lambda: self.onnxruntime(threads),
        }

    def lockstep(self, threads: int) -> Contender:
        opened = executor("cpu", threads=threads)
        given = [{self.model.input_name: self.ids}]
        return Contender({"tokens": lambda: opened.run(self.model.graph, given)[0]}, opened.close)

    def pytorch(self) -> Contender:
        inputs = {name: torch.from_numpy(array) for name, array in self._batch(self.ids).items()}

        @torch.no_grad()
        def run() -> np.ndarray:
            return self.torch_model(**inputs).last_hidden_state[0].numpy()

        return Contender({"tokens": run})

    def openvino(self, threads: int) -> Contender:
        """W8A8 by nncf's post-training quantisation for transformers, one request at a time."""
        openvino = library("openvino")
        if "openvino" not in self._converted:
            self._converted["openvino"] = self._quantised_openvino(openvino)
        options = {"INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY", "NUM_STREAMS": 1}
        request = openvino.Core().compile_model(self._converted["openvino"], "CPU", options).create_infer_request()
        inputs = self._batch(self.ids)
        return Contender({"tokens": lambda: request.infer(inputs)["last_hidden_state"][0]})

    def _quantised_openvino(self, openvino: Any) -> Any:
        nncf = library("nncf")
        batches = [self._batch(ids) for ids in self.calibration]
        with quiet():
            example = {name: torch.from_numpy(array) for name, array in batches[0].items()}
            shapes = [(name, list(array.shape), openvino.Type.i64) for name, array in batches[0].items()]
            converted = openvino.convert_model(self.torch_model, example_input=example, input=shapes)
            converted.outputs[0].get_tensor().set_names({"last_hidden_state"})
            return nncf.quantize(
                converted, nncf.Dataset(batches), model_type=nncf.ModelType.TRANSFORMER, subset_size=len(batches)
            )

    def onnxruntime(self, threads: int) -> Contender:
        """int8 weights, activations quantised as they come: ``onnxruntime.quantization.quantize_dynamic``."""
        onnxruntime = library("onnxruntime")
        if "onnx" not in self._converted:
            self._converted["onnx"] = self._quantised_onnx()
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
        session = onnxruntime.InferenceSession(self._converted["onnx"], options, providers=["CPUExecutionProvider"])
        inputs = self._batch(self.ids)
        return Contender({"tokens": lambda: session.run(None, inputs)[0][0]})

    def _quantised_onnx(self) -> bytes:
        library("onnx")
        library("onnxscript")
        from onnxruntime.quantization import QuantType, quantize_dynamic

        example = {name: torch.from_numpy(array) for name, array in self._batch(self.ids).items()}
        with tempfile.TemporaryDirectory() as folder, quiet():
            exported, quantised = Path(folder) / "float.onnx", Path(folder) / "int8.onnx"
            program: Any = torch.onnx.export(self.torch_model, (), kwargs=example, dynamo=True, verbose=False)
            program.save(exported)
            quantize_dynamic(exported, quantised, weight_type=QuantType.QInt8)
            return quantised.read_bytes()

    @staticmethod
    def _batch(ids: np.ndarray) -> dict[str, np.ndarray]:
        return {"input_ids": ids[None].astype(np.int64), "attention_mask": np.ones((1, len(ids)), np.int64)}
