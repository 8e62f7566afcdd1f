"""Evaluation of samplers: feature metrics, the digit-and-motion classifier of the demo, reports."""
