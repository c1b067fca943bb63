"""`python -m benchmarks.NAME [--quick] [--out FILE]`: a table for people, then one JSON line."""
