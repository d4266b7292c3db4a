"""Plain numpy and standard library: table, checkpoint, conversion, metrics, tolerance, verdict."""
