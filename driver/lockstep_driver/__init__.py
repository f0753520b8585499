"""From a program to a device: URIs, buffers, command rings, fences and errors."""
