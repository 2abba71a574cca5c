"""The flags by what they are about, one dataclass a group; `umed_plugin.flags.definition` puts them together."""
