"""Two blocks of a transformer as programs with a known limit: see :mod:`.block`."""
