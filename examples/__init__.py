"""Programs that use the package. Run them from the repository's root: `python -m examples.<name> --help`."""
