"""From a contract graph to programs for a core."""
