"""Evaluate models: lm-eval tasks, measurements of speed and quality, pictures of results, and the demo."""
