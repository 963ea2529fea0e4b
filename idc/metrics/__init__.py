"""Metrics: a pure functional core and thin torchmetrics classes. Every class exported here keeps the same contract."""
