"""The quality laboratory: tasks small enough to run every method of distillation on, and judges of what comes out."""
