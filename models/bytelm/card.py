"""The model card: what the model is, what it was trained on, what was measured."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Measured:
    """Bits per byte of the stored weights and of the baselines (order of the n-gram -> bits per byte) on one text."""

    text: str
    bytes: int
    model: float
    ngrams: dict[int, float]


@dataclass(frozen=True)
class Facts:
    """What the card says beyond its fixed text."""

    date: str
    python: str
    torch: str
    parameters: int
    layers: int
    intermediate: int
    weights_bytes: int
    training_files: int
    training_bytes: int
    held_out_files: list[str]
    steps: int
    tokens_per_step: int
    cpu_seconds: float
    threads: int
    window: int
    stride: int
    measured: list[Measured]
    prompt: str
    sample: str


def _measured_table(measured: list[Measured]) -> str:
    orders = sorted(measured[0].ngrams)
    lines = [
        "| text | bytes | this model | " + " | ".join(f"{order}-gram" for order in orders) + " |",
        "| --- " * (3 + len(orders)) + "|",
    ]
    for row in measured:
        figures = [f"{row.model:.4f}", *(f"{row.ngrams[order]:.4f}" for order in orders)]
        lines.append(f"| {row.text} | {row.bytes:,} | " + " | ".join(figures) + " |")
    return "\n".join(lines)


def render(facts: Facts) -> str:
    """The text of ``README.md``. Figures stand in tables, so that tests can read them."""
    held_out = ", ".join(f"`{path}`" for path in facts.held_out_files)
    tokens = facts.steps * facts.tokens_per_step
    return f"""---
license: apache-2.0
library_name: transformers
pipeline_tag: text-generation
tags: [llama, byte-level, python]
---

# tiny

A small causal language model of the Llama architecture that reads and writes bytes. It was trained on the sources of
Python's standard library and writes text that looks like them. It is there to be run, on a simulated accelerator and in
tests; it knows nothing.

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("models/tiny")
tokenizer = AutoTokenizer.from_pretrained("models/tiny")
```

## Facts

| fact | value |
| --- | --- |
| parameters | {facts.parameters:,} |
| weights | bfloat16, {facts.weights_bytes:,} bytes; rounded once, at the end of training |
| layers | {facts.layers}, with 4 heads of 64 features |
| hidden and intermediate size | 256 and {facts.intermediate} |
| positions | 1024 |
| tokens | the 256 bytes, token = byte; 256 begins a text, 257 ends it, 258 pads; rows 259 to 271 are never used |
| trained on | {facts.training_bytes:,} bytes in {facts.training_files:,} files of Python {facts.python} |
| training | {facts.steps:,} steps of {facts.tokens_per_step:,} tokens ({tokens:,} in all) |
| time | {facts.cpu_seconds:,.0f} s of CPU time, {facts.threads} thread{"s" if facts.threads > 1 else ""} |
| made on | {facts.date}, with PyTorch {facts.torch} |

## Bits per byte

{_measured_table(facts.measured)}

Lower is better; measured by `models/train_tiny.py`. Both kinds of model were trained on the same files and measured on
files that neither has seen. The model runs in PyTorch with the stored weights in float32, in windows of {facts.window}
tokens that start every {facts.stride} tokens; each byte is scored in the first window that holds it. The n-gram
models are interpolated, with modified Kneser-Ney smoothing. Each held-out file is a text of its own, `heldout.txt` is
one text.

## What it writes

Drawn at temperature 0.7, seed 0, after `{facts.prompt.encode("unicode_escape").decode()}`:

```python
{facts.sample}
```

## Data

Every `.py` file of the standard library, without installed packages, tests, and the folders that some distributions
ship apart (`bytelm/corpus.py` names them). One file in twelve, chosen by a hash of its path, is held out:
{held_out}.

`heldout.txt` holds the beginnings of these files. Its text is part of Python and under the
[licence of the Python Software Foundation](https://docs.python.org/3/license.html), copyright © 2001 Python Software
Foundation; all rights reserved.

## Make it again

```
python models/train_tiny.py --out models/tiny
```

takes about the CPU time above, and needs a C++ compiler (or `--eager`, slower). The seed and the number of steps are
fixed. Another version of Python has other sources, and another processor or number of threads rounds differently, so
the figures come out nearly the same, not exactly.
"""
