"""One verb per file: parse, call, write, print; no arithmetic."""
