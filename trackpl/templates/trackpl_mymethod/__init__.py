"""The tracker `mymethod` for trackpl."""
