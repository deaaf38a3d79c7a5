"""Metrics as arithmetic over features or detections, and the one report format of published numbers."""
