"""Options that say how a key-value cache is treated, as :func:`lockstep.cache_policy.asked_policy` takes them."""

from __future__ import annotations

from typing import Annotated

import typer

KeepOption = Annotated[int | None, typer.Option(help="Tokens that the cache keeps; as many as there are by default.")]
EvictOption = Annotated[
    str | None,
    typer.Option(help="Which token leaves a full cache: streaming (or streaming:SINKS), h2o (or h2o:RECENT), spatten."),
]
SelectOption = Annotated[
    str | None,
    typer.Option(
        help="Keys that each token attends to, in blocks of 16 that the core chooses; or a selector with its number: "
        "sinks:KEYS, a3:ROUNDS, elsa:MARGIN, sanger:THRESHOLD, energon:ALPHA. All keys by default."
    ),
]
CacheBitsOption = Annotated[
    int | None, typer.Option(help="Bits of a key or value in the cache: 8, or 4 for half the bytes.")
]
