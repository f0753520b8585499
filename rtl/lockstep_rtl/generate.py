"""From a configuration to Verilog: the one text that is simulated and built."""

from __future__ import annotations

from importlib import resources

from amaranth.back import verilog
from amaranth.lib import wiring
from lockstep_isa.config import CoreConfig

#: Module name of the generated core.
TOP = "lockstep_core"


def library_verilog() -> str:
    """The hand-written Verilog modules that generated Verilog instantiates."""
    return (resources.files(__package__) / "verilog" / "lockstep_ram.v").read_text()


def component_verilog(component: wiring.Component, name: str) -> str:
    """Verilog of one component as module ``name``, with the modules that it instantiates."""
    return verilog.convert(component, name=name, emit_src=False, strip_internal_attrs=True) + library_verilog()


def core_verilog(config: CoreConfig) -> str:
    """Verilog of the whole core, module ``lockstep_core``.

    Raises :class:`lockstep_isa.config.ConfigurationError` for a configuration that the RTL does not build.
    """
    from .core import Core

    return component_verilog(Core(config), TOP)
