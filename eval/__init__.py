"""Evaluation: lm-eval tasks, speed and quality measurements, and the demo."""
