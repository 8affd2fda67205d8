"""What the benchmarks share: cases, thresholds, baselines, the layer under test, and the end-to-end benchmark."""
