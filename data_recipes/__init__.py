"""Recipes that come with the plugin, one YAML per data set. List them with ``umed recipe list``."""
