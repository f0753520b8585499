"""From a configuration to Verilog: the one text that is simulated and built."""

from __future__ import annotations

from importlib import resources

from amaranth.back import verilog
from amaranth.hdl import Value
from amaranth.hdl._ir import PortDirection
from amaranth.lib import wiring
from lockstep_isa.config import CoreConfig

#: Module name of the generated core.
TOP = "lockstep_core"


def library_verilog() -> str:
    """The hand-written Verilog modules that generated Verilog instantiates."""
    return (resources.files(__package__) / "verilog" / "lockstep_ram.v").read_text()


def component_verilog(component: wiring.Component, name: str) -> str:
    """Verilog of one component as module ``name``, with the modules that it instantiates.

    Ports are called by their path with single underscores, ``memory_read_ar_valid``.
    """
    directions = {wiring.In: PortDirection.Input, wiring.Out: PortDirection.Output}
    ports = {
        "_".join(map(str, path)): (Value.cast(value), directions[member.flow])
        for path, member, value in component.signature.flatten(component)
    }
    text = verilog.convert(component, name=name, ports=ports, emit_src=False, strip_internal_attrs=True)
    return text + library_verilog()


def core_verilog(config: CoreConfig) -> str:
    """Verilog of the whole core, module ``lockstep_core``.

    Raises :class:`lockstep_isa.config.ConfigurationError` for a configuration that the RTL does not build.
    """
    from .core import Core

    return component_verilog(Core(config), TOP)
