"""Options that let tokens and heads leave a model, as :meth:`lockstep.model.Model.pruned` takes them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from lockstep.model import Model

PruneOption = Annotated[
    list[str] | None,
    typer.Option(
        metavar="LAYER:SHARE",
        help="Behind this layer, that share of its tokens stay, those with most attention; may be given again.",
    ),
]
PruneHeadsOption = Annotated[
    list[str] | None,
    typer.Option(
        metavar="LAYER:SHARE",
        help="Behind this layer, that share of all heads stay, those that say most; may be given again.",
    ),
]


class Leaving:
    """What the options ask for.

    Attributes
    ----------
    tokens, heads : shares that stay, by layer. Raises ``InputError`` for what is no LAYER:SHARE.
    """

    def __init__(self, prune: list[str] | None, prune_heads: list[str] | None) -> None:
        from lockstep.pruning import schedule_of

        self.tokens, self.heads = schedule_of(prune or []), schedule_of(prune_heads or [])

    def of(self, model: Model) -> Model:
        """The model from which they leave."""
        if not self.tokens and not self.heads:
            return model
        return model.pruned(self.tokens or None, heads=self.heads or None)

    @property
    def report(self) -> dict[str, dict[int, float]]:
        """The same as JSON has it."""
        return {"pruned": self.tokens, "pruned_heads": self.heads}
