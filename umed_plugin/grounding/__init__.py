"""Boxes and the words that name them: parsing, formatting, coordinates, and the one scorer of rewards and evaluation."""
