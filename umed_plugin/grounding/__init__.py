"""Boxes and class names in text: parsing, formatting, coordinates, and the one scorer of rewards and evaluation."""
