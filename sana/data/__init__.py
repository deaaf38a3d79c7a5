"""Prompts, images and captions: what goes into training and generation. No dataset holds a model."""
