"""What is fast, measured: `python -m benchmarks.NAME [--json FILE]` exits 1 if a bar is missed."""
