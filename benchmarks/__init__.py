"""Measurements: ratios against rivals, side by side in one run. Each module is a command: ``python -m benchmarks.NAME --help``."""
