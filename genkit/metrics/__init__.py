"""Figures with their protocol; each is an `evaluate.Metric`, too, that works offline."""
