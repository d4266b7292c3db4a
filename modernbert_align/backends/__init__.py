"""The only code that runs a framework: one module for each."""
