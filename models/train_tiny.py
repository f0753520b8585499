"""Train the model ``tiny`` on the sources of Python's standard library, and write its folder and its card.

python models/train_tiny.py [--out models/tiny] [--steps N]
"""

from __future__ import annotations

import dataclasses
import datetime
import os
import platform
import shutil
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from bytelm.architecture import parameter_count, tiny_config
from bytelm.card import Facts, Measured, render
from bytelm.corpus import Corpus, read_corpus, sample
from bytelm.evaluation import text_bits
from bytelm.ngram import ByteNgram
from bytelm.tokenizer import BOS, EOS, PAD, build_tokenizer
from bytelm.training import Recipe, train
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from transformers import AutoModelForCausalLM, GenerationConfig, LlamaForCausalLM

WINDOW, STRIDE = 1024, 512
HELD_OUT_SAMPLE = 64 * 1024
PROMPT = "def "

console = Console()


def _progress(unit: str) -> Progress:
    return Progress(
        TextColumn("{task.description:<24}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn(unit + " {task.fields[note]}"),
        TimeRemainingColumn(),
        console=console,
    )


def trained_model(corpus: Corpus, recipe: Recipe) -> LlamaForCausalLM:
    """The model after training, in float32."""
    torch.manual_seed(recipe.seed)
    model = LlamaForCausalLM(tiny_config())
    with _progress("steps") as progress:
        task = progress.add_task("training", total=recipe.steps, note="(compiling)")
        smooth = 8.0

        def report(step: int, bits: float) -> None:
            nonlocal smooth
            smooth += (bits - smooth) * max(0.05, 1 / (step + 1))
            progress.update(task, completed=step + 1, note=f"{smooth:.3f} bits per token")

        train(model, corpus.training, recipe, report)
    return model


def store(model: LlamaForCausalLM, folder: Path) -> LlamaForCausalLM:
    """Write weights (rounded to bfloat16), configuration and tokenizer; returns the model read back, in float32."""
    model.bfloat16().save_pretrained(folder)
    (folder / "model.safetensors").chmod(0o644)  # safetensors writes for its owner alone
    GenerationConfig(bos_token_id=BOS, eos_token_id=EOS, pad_token_id=PAD).save_pretrained(folder)
    build_tokenizer(model.config.max_position_embeddings).save_pretrained(folder)
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def measure(model: LlamaForCausalLM, corpus: Corpus, excerpt: bytes) -> list[Measured]:
    """Bits per byte of the model, a 5-gram and a 7-gram: on all held-out files one by one, and on ``excerpt``."""
    texts = {"held-out files": [document.text for document in corpus.held_out], "`heldout.txt`": [excerpt]}
    sizes = {name: sum(map(len, parts)) for name, parts in texts.items()}
    found: dict[str, dict[int, float]] = {name: {} for name in texts}
    for order in (5, 7):
        with console.status(f"counting {order}-grams"):
            ngram = ByteNgram((document.text for document in corpus.training), order)
            for name, parts in texts.items():
                found[name][order] = sum(map(ngram.bits, parts)) / sizes[name]
    measured = []
    with _progress("bytes") as progress:
        for name, parts in texts.items():
            task = progress.add_task(f"measuring {name}", total=sizes[name], note="")
            advance = partial(progress.advance, task)
            bits = sum(text_bits(model, part, WINDOW, STRIDE, progress=advance) for part in parts)
            measured.append(Measured(name, sizes[name], bits / sizes[name], found[name]))
    return measured


def write_sample(model: LlamaForCausalLM, prompt: str, tokens: int = 400) -> str:
    """``prompt`` and what the model writes after it, at temperature 0.7."""
    ids = torch.tensor([[BOS, *prompt.encode()]])
    torch.manual_seed(0)
    generator: Any = model  # the type hints of generate do not accept the classes that have it
    written = generator.generate(ids, do_sample=True, temperature=0.7, top_k=0, max_new_tokens=tokens)[0].tolist()
    return bytes(token for token in written if token < 256).decode(errors="replace").rstrip()


def put_in_place(folder: Path, out: Path) -> None:
    """Move ``folder`` to ``out``; what stood there goes away once the new one is complete."""
    old = None
    if out.exists():
        old = folder.with_name(folder.name + ".old")
        out.rename(old)
    folder.rename(out)
    if old is not None:
        shutil.rmtree(old)


def main(
    out: Annotated[Path, typer.Option(help="The folder to write; it is replaced as a whole.")] = Path("models/tiny"),
    steps: Annotated[int, typer.Option(min=10, help="Steps of training.")] = Recipe.steps,
    threads: Annotated[int, typer.Option(min=1, help="Threads of PyTorch.")] = 2,
    eager: Annotated[bool, typer.Option("--eager", help="Do not compile: slower, but needs no C++ compiler.")] = False,
) -> None:
    """Train the model tiny, measure it on held-out files beside n-gram models, and write its folder."""
    if out.exists() and not (out / "config.json").is_file():
        raise typer.BadParameter(f"{out} exists and holds no model; name another folder", param_hint="--out")
    if not eager and shutil.which(os.environ.get("CXX", "g++")) is None:
        raise typer.BadParameter("there is no C++ compiler; install g++ or add --eager", param_hint="--eager")
    torch.set_num_threads(threads)
    recipe = dataclasses.replace(Recipe(), steps=steps, compiled=not eager)
    corpus = read_corpus()
    began = time.process_time()
    model = trained_model(corpus, recipe)
    finish(model, corpus, recipe, time.process_time() - began, threads, out)


def finish(
    model: LlamaForCausalLM, corpus: Corpus, recipe: Recipe, cpu_seconds: float, threads: int, out: Path
) -> None:
    """Store, measure and describe a trained model in a folder beside ``out``, then put it there."""
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent) as scratch:
        folder = Path(scratch) / out.name
        stored = store(model, folder)
        excerpt = sample(corpus.held_out, HELD_OUT_SAMPLE)
        (folder / "heldout.txt").write_bytes(excerpt)
        facts = Facts(
            date=datetime.date.today().isoformat(),
            python=platform.python_version(),
            torch=torch.__version__.split("+")[0],
            parameters=parameter_count(stored),
            layers=stored.config.num_hidden_layers,
            intermediate=stored.config.intermediate_size,
            weights_bytes=(folder / "model.safetensors").stat().st_size,
            training_files=len(corpus.training),
            training_bytes=sum(len(document.text) for document in corpus.training),
            held_out_files=[document.path for document in corpus.held_out],
            steps=recipe.steps,
            tokens_per_step=recipe.tokens_per_step,
            cpu_seconds=cpu_seconds,
            threads=threads,
            window=WINDOW,
            stride=STRIDE,
            measured=measure(stored, corpus, excerpt),
            prompt=PROMPT,
            sample=write_sample(stored, PROMPT),
        )
        (folder / "README.md").write_text(render(facts), encoding="utf-8")
        put_in_place(folder, out)
    console.print(f"{out}: {facts.parameters:,} parameters")
    for row in facts.measured:
        ngrams = ", ".join(f"{order}-gram {bits:.3f}" for order, bits in row.ngrams.items())
        console.print(f"{row.text}: {row.model:.3f} bits per byte; {ngrams}")


if __name__ == "__main__":
    typer.run(main)
