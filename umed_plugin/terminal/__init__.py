"""What reaches a terminal: text without control characters, rich consoles, and progress as a bar or as lines.

File names, answers of models and the output of libraries are not trusted. A terminal obeys escape sequences in them. So
`printable` escapes such characters, and every console and stream of the commands uses it.
"""
